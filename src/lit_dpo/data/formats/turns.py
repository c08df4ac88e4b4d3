"""Turns of conversations, however they are written: names of roles, typed parts, transcripts, tools."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lit_dpo.data.formats.base import Message, Preference, PreferenceFormat, Ranking, Skipped
from lit_dpo.data.formats.cells import check_text, parsed, read_content, short, with_calls, without_nulls
from lit_dpo.errors import DataError

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
}
TEMPLATE = "chat_template_kwargs"
"""The column that may hold arguments of the chat template for a row alone, whatever its layout."""
# what a chat template may read of a message; the rest are identifiers, times and weights, in which equal turns differ
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")


def user(text: str) -> Message:
    """Write what was asked as a message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """Write a completion as a message."""
    return {"role": "assistant", "content": text}


def text_in(name: str, row: Mapping[str, Any]) -> str:
    """Return the text in a column.

    Raises:
        DataError: if there is none.
    """
    cell = row.get(name)
    if not isinstance(cell, str) or not cell.strip():
        raise DataError(f"Expected text in `{name}` but got {'nothing (null)' if cell is None else short(cell)}.")
    return cell


def said(name: str, row: Mapping[str, Any]) -> str:
    """Return the text in a column that may be absent or empty."""
    return "" if row.get(name) is None or row[name] == "" else text_in(name, row)


def system_turn(name: str, row: Mapping[str, Any]) -> list[Message]:
    """Return a message for what a column says to the model before all, if it does."""
    text = said(name, row)
    return [{"role": "system", "content": text}] if text else []


def is_turns(cell: Any) -> bool:
    """Whether a cell holds messages, as a list, as one object, or as a string of these."""
    found = parsed(cell)
    found = [found] if isinstance(found, dict) else found
    return isinstance(found, list) and bool(found) and all(isinstance(one, dict) for one in found)


def messages(name: str, cell: Any) -> list[Message]:
    """Return a cell's messages as chat templates read them: `role` and `content`, roles by their usual names.

    Raises:
        DataError: for a cell without messages, an unknown role, a part that is no text.
    """
    if not is_turns(cell):
        raise DataError(f"Expected a list of messages in `{name}` but got {short(cell)}.")
    found = parsed(cell)
    return [
        _message(f"message {n} of `{name}`", one) for n, one in enumerate([found] if isinstance(found, dict) else found)
    ]


def _message(where: str, message: Mapping[str, Any]) -> Message:
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"Expected a role in {where}, one of {', '.join(ROLES)}, but got {short(role)}.")
    message = with_calls(where, message)
    content = read_content(where, message.get("content", message.get("value")))
    found: Message = {"role": ROLES[role], "content": content}
    found |= {key: without_nulls(message[key]) for key in _KEPT if message.get(key) is not None}
    if role == "function_call" and (calls := _calls(content)):
        found |= {"content": "", "tool_calls": calls}
    if not (found["content"] or found.get("tool_calls") or role in ("system", "tool", "observation")):
        raise DataError(f"Expected text in {where} but it is empty.")
    return found


def _calls(text: str) -> list[Any]:
    """Read tool calls that are written as JSON; none where they are written in another way, as text."""
    found = parsed(text)
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(one, dict) and "name" in one for one in found):
        return []
    return [{"type": "function", "function": one} for one in found]


def tools_in(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tools in a column, if there are any, as arguments of the chat template.

    Raises:
        DataError: if they are no JSON objects.
    """
    found = parsed(row.get(name))
    if found is None or found in ("", []):
        return {}
    tools = [parsed(one) for one in (found if isinstance(found, list) else [found])]
    if not all(isinstance(one, dict) for one in tools):
        raise DataError(f"Expected a list of tools in `{name}`, or one as JSON, but got {short(row[name])}.")
    tools = [without_nulls(one) for one in tools]
    return {"tools": [one if "function" in one else {"type": "function", "function": one} for one in tools]}


def read_row(format: PreferenceFormat, row: Mapping[str, Any]) -> Preference | Ranking | Skipped:
    """Let a format read a row, and give it the arguments of the chat template that the row has in a column of its own.

    Raises:
        DataError: as the format does, or if they are no JSON object.
    """
    found = format.read(row)
    given = parsed(row.get(TEMPLATE))
    if given in (None, "") or not isinstance(found, Preference | Ranking):
        return found
    if not isinstance(given, dict):
        raise DataError(f"Expected an object, or one as JSON, in `{TEMPLATE}` but got {short(row[TEMPLATE])}.")
    return found._replace(template={**without_nulls(given), **found.template})


def transcript(name: str, text: str, mark: re.Pattern[str]) -> list[Message]:
    """Split a text into turns; the same one's in a row are one.

    Args:
        name: of the column.
        text: a transcript.
        mark: stands before each turn; its one group is the speaker.

    Raises:
        DataError: if the text does not begin with a turn.
    """
    before, *parts = mark.split(text)
    if before.strip() or not parts:
        raise DataError(f"Expected a transcript in `{name}` but got {short(text)}.")
    turns: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = ROLES[speaker.lower()]
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{content.strip()}".strip()
        else:
            turns.append({"role": role, "content": content.strip()})
    return turns


def apart(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Return what two conversations share at their beginning, and how each goes on, by at least one message."""
    most = min(len(chosen), len(rejected)) - 1
    shared = next((n for n in range(most) if chosen[n] != rejected[n]), most)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def check_sides(prompt: Sequence[Message], sides: Mapping[str, Sequence[Message]]) -> None:
    """See that something was asked, and that each side ends with what the assistant says.

    Raises:
        DataError: if not.
    """
    if not any(message["role"] == "user" for message in prompt):
        raise DataError(
            f"Expected a user's message before the completions in {' and '.join(map('`{}`'.format, sides))}."
        )
    for name, side in sides.items():
        if side[-1]["role"] != "assistant":
            raise DataError(f"Expected an assistant's message at the end of `{name}` but it is {side[-1]['role']}'s.")


def answers(prompt: list[Message], completions: Mapping[str, Any]) -> tuple[list[Message], list[list[Message]]]:
    """Return a prompt and completions that are texts, by the names of their columns, as messages.

    Raises:
        DataError: if one says nothing.
    """
    for name, text in completions.items():
        text_in(name, completions)
        check_text(name, text)
    return prompt, [[assistant(text)] for text in completions.values()]


def pair(
    prompt: list[Message], completions: Mapping[str, Any], template: Mapping[str, Any] | None = None
) -> Preference:
    """Return the preference of the first of two texts."""
    prompt, (chosen, rejected) = answers(prompt, completions)
    return Preference(prompt, chosen, rejected, template=template or {})


def judged(prompt: list[Message], completions: Mapping[str, Any], better: int | None) -> Ranking:
    """Return the ranking of two texts: the place of the better one, or None for a tie."""
    ranks = [1.0 if better in (None, place) else 2.0 for place in range(2)]
    return Ranking(*answers(prompt, completions), ranks=ranks)
