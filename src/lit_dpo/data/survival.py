"""What of some messages is still there in the text that was rendered from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lit_dpo.data.formats.base import Message

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # transformers copies each to the others
_THINK = re.compile(r"</?think(?:ing)?>|</?thought>|\[/?THINK\]")


class Surviving(NamedTuple):
    """What is left.

    Attributes:
        lost: what is not, in words; None if all is there.
        without_thoughts: whether a thought of an earlier turn is missing, which may be.
    """

    lost: str | None = None
    without_thoughts: bool = False


_ALL = Surviving()


def surviving(text: str, messages: Sequence[Message], *, earlier: bool = False) -> Surviving:
    r"""Look for all that some messages say, without the blanks around it, in a text that was rendered from them.

    Args:
        text: the rendered one.
        messages: with text as their content, or typed parts of it.
        earlier: whether they are turns before the completion, of which a thought may be missing.

    Example:
        >>> said = [{"role": "assistant", "content": "<think>2, 4</think> Four."}]
        >>> surviving("A: Four.\n", said).lost
        'the text (with its thought) of a message of `assistant`'
        >>> surviving("A: Four.\n", said, earlier=True)
        Surviving(lost=None, without_thoughts=True)
    """
    if _are_plain(messages) and _in_order(text, [message["content"].strip() for message in messages]):
        return _ALL
    there: list[tuple[str, str]] = []
    without_thoughts = False
    for message in messages:
        role, may_think = message["role"], earlier and message["role"] == "assistant"
        for name, part in _parts(message):
            pieces = _pieces(text, part)
            if pieces is None and may_think:
                pieces, without_thoughts = _after_thought(text, name, part), True
            if pieces is None:
                thought = " (with its thought)" if _THINK.search(part) else ""
                return Surviving(f"{name}{thought} of a message of `{role}`")
            there += [(f"{name} of a message of `{role}`", one) for one in pieces]
        if lost := _lost_call(text, message):
            return Surviving(f"{lost} of a message of `{role}`")
    return Surviving(_lost_among(text, there), without_thoughts)


def lost_of_template(text: str, arguments: Mapping[str, Any]) -> str | None:
    """Say what of a row's own tools and documents is not in its rendered prompt; None if all is."""
    for tool in arguments.get("tools") or ():
        function = tool.get("function", tool) if isinstance(tool, dict) else {"name": getattr(tool, "__name__", "")}
        if str(function.get("name", "")) not in text:
            return "a tool"
    for one in arguments.get("documents") or ():
        said = one.get("text", one.get("content", one.get("contents", ""))) if isinstance(one, dict) else one
        if not _pieces(text, str(said).strip()):
            return "a document"
    return None


def text_of(message: Message) -> str:
    """Return what a message says, in one text or in typed parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _are_plain(messages: Sequence[Message]) -> bool:
    """Whether they have a role and a text alone, as nearly all; looking at these takes a third of the time."""
    return all(len(message) == 2 and isinstance(message["content"], str) for message in messages)


def _parts(message: Message) -> Iterator[tuple[str, str]]:
    thought = next((message[name] for name in _THOUGHTS if isinstance(message.get(name), str)), "").strip()
    if thought:
        yield "the thought", thought
    if content := text_of(message).strip():
        yield "the text", content


def _pieces(text: str, part: str) -> list[str] | None:
    """Return a part as it is in a text, or its thought and the rest, between which blanks may have changed."""
    for form in _forms(part):
        if form in text:
            return [form]
    pieces = [one.strip() for one in _THINK.split(part)]
    if len(pieces) > 1 and all(one in text for one in pieces):
        return [one for one in pieces if one]
    return None


def _after_thought(text: str, name: str, part: str) -> list[str] | None:
    """Return what is there of an earlier turn whose thought is left out; None if that is lost too."""
    if name == "the thought":
        return []
    *thoughts, rest = (one.strip() for one in _THINK.split(part))
    if not thoughts:
        return None
    return _pieces(text, rest) if rest else []


def _lost_among(text: str, there: Sequence[tuple[str, str]]) -> str | None:
    """Name a part that is only there within another one: each has its own place in the order, or they are counted."""
    if _in_order(text, [part for _, part in there]):
        return None
    for name, part in there:
        if text.count(part) < sum(other.count(part) for _, other in there):
            return name
    return None


def _in_order(text: str, parts: Iterable[str]) -> bool:
    place = 0
    for part in parts:
        found = text.find(part, place)
        if found < 0:
            return False
        place = found + len(part)
    return True


def _lost_call(text: str, message: Message) -> str | None:
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else {}
        if str(function.get("name", "")) not in text:
            return "a tool call"
        arguments = function.get("arguments")
        if isinstance(arguments, dict) and arguments and str(arguments) in text:
            return "the JSON of a tool call"  # written as Python writes it
        if not all(any(form in text for form in _forms(leaf)) for leaf in _leaves(arguments)):
            return "arguments of a tool call"
    return None


def _leaves(value: Any) -> Iterator[str]:
    """Names and values, but true, false and null, which each template writes as it likes."""
    if isinstance(value, dict):
        yield from map(str, value)
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield str(value).strip()


def _forms(said: str) -> Iterator[str]:
    """Ways to write a text: as it is, in JSON, in JSON within JSON."""
    yield said
    for ascii_only in (False, True):
        once = json.dumps(said, ensure_ascii=ascii_only)[1:-1]
        yield once
        yield json.dumps(once, ensure_ascii=ascii_only)[1:-1]
