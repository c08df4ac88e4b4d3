"""What cells may hold: numbers, text, messages. Each error names the column."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from lit_dpo.data.formats.base import Message
from lit_dpo.errors import DataError

ANY = (-math.inf, math.inf)
_A_MESSAGE = re.compile(r"^\s*\[\s*\{")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
RANGES = {"weight": (0, math.inf), "probability": (0, 1)}


def read_number(name: str, row: Mapping[str, Any], low: float, high: float) -> float:
    """Read the number in a column; cells of `.csv` are text."""
    cell = row.get(name)
    try:
        number = math.nan if isinstance(cell, bool) or cell is None else float(cell)
    except (TypeError, ValueError, OverflowError):  # the last one for an integer of some hundred digits
        number = math.nan
    if not (math.isfinite(number) and low <= number <= high):
        wanted = "a number" + (f" >= {low:g}" if high == math.inf else f" in [{low:g}, {high:g}]") * (low > -math.inf)
        raise DataError(f"Expected {wanted} in `{name}` but got {short(cell) if cell is not None else 'nothing'}.")
    return number


def kind_of(name: str, cell: object) -> str:
    """Say `"text"` or `"messages"`."""
    if isinstance(cell, str):
        return "text"
    if isinstance(cell, list):
        return "messages"
    came = "nothing (null)" if cell is None else f"{type(cell).__name__} {short(cell)}"
    raise DataError(f"Expected text or a list of messages in `{name}` but got {came}.")


def read_messages(name: str, cell: list[Any]) -> list[Message]:
    """Return the cell's messages: typed parts as one text, without what Arrow fills with null for other rows' sake."""
    if not cell:
        raise DataError(f"Expected at least one message in `{name}` but the list is empty.")
    return [_read_message(f"message {number} of `{name}`", message) for number, message in enumerate(cell)]


def _read_message(where: str, message: Any) -> Message:
    calls = isinstance(message, dict) and (message.get("tool_calls") or message.get("function_call"))
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not ("content" in message or calls):
        raise DataError(f"Expected a `role` and a `content` in {where} but got {short(message)}.")
    content = message.get("content")
    if content is None and not calls:
        raise DataError(f"Expected text as the `content` of {where} but got None.")
    message = with_calls(where, message)
    rest = {key: without_nulls(value) for key, value in message.items() if value is not None and key != "content"}
    return {"role": rest.pop("role"), "content": read_content(where, content), **rest}


def with_calls(where: str, message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message with its one call, as OpenAI wrote it once, among its `tool_calls`.

    Raises:
        DataError: for a message with something that is no text, such as images.
    """
    if media := [name for name in MEDIA if message.get(name)]:
        raise DataError(f"Expected text alone in {where} but it holds `{media[0]}`: not supported.")
    if not message.get("function_call"):
        return message
    calls = [*(message.get("tool_calls") or ()), {"type": "function", "function": message["function_call"]}]
    return {key: value for key, value in message.items() if key != "function_call"} | {"tool_calls": calls}


def read_content(where: str, content: Any) -> str:
    """Return the text of a message, which may be in typed parts; none is none.

    Raises:
        DataError: for a part that is no text, such as an image.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise DataError(f"Expected text as the content of {where} but got {short(content)}.")
    return "".join(_part(where, part) for part in content)


def _part(where: str, part: Mapping[str, Any]) -> str:
    if part.get("type") not in ("text", "input_text", "output_text"):
        raise DataError(f"Expected text in {where} but it holds {part.get('type') or short(part)}: not supported.")
    text = part.get("text", part.get("value"))
    if not isinstance(text, str):
        raise DataError(f"Expected `text` in a part of {where} but got {short(part)}.")
    return text


def parsed(cell: Any) -> Any:
    """Return what a cell holds that is written as a string: JSON, or the Python that pandas writes to `.csv`."""
    if not isinstance(cell, str) or cell.lstrip()[:1] not in ("[", "{"):
        return cell
    for read in (json.loads, ast.literal_eval, _literal_array):
        try:
            return read(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return cell


def is_written_conversation(cell: Any) -> bool:
    """Whether a cell is a string that holds a list of messages, rather than text that begins with a bracket."""
    if not isinstance(cell, str) or cell.lstrip()[:1] != "[" or not _A_MESSAGE.search(cell):
        return False
    found = parsed(cell)
    return isinstance(found, list) and bool(found) and all(_is_message(one) for one in found)


def _is_message(one: Any) -> bool:
    return isinstance(one, dict) and bool({"role", "from"} & one.keys()) and bool({"content", "value"} & one.keys())


def _literal_array(cell: str) -> Any:
    """Read the array of objects that pandas writes, with no comma between them."""
    return ast.literal_eval(re.sub(r"\}\s*\n\s*\{", "}, {", cell))


def without_nulls(value: Any) -> Any:
    """Leave out what Arrow adds to objects because those of other rows have it."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def check_text(name: str, text: str) -> None:
    """See that a completion says something."""
    if not text.strip():
        raise DataError(f"Expected a completion in `{name}` but got {text!r}.")


def check_messages(name: str, messages: list[Message]) -> None:
    """See that a completion is the assistant's alone, and says something."""
    others = [message["role"] for message in messages if message["role"] in ("system", "user")]
    if others:
        raise DataError(
            f"Expected only the completion in `{name}` but it holds a conversation with a {others[0]} message. "
            "Put the messages before the completion in the prompt column."
        )
    if not any(says_something(message) for message in messages if message["role"] == "assistant"):
        raise DataError(f"Expected an assistant message with text in `{name}` but got {short(messages)}.")


def says_something(message: Message) -> bool:
    """Whether a message has text, or calls a tool."""
    return bool((message.get("content") or "").strip() or message.get("tool_calls"))


def short(value: object, limit: int = 80) -> str:
    """Quote a value in an error."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


NumericColumns: TypeAlias = list[str] | dict[str, str]
_OPTIONS = {"weight", "score_margin", "probability"}


def numeric(known: Mapping[str, str | None], more: NumericColumns) -> dict[str, str]:
    """Names of the columns of numbers, by the names that they travel under.

    Args:
        known: columns with a meaning, by that; None for those that are not read.
        more: other columns, or from the name that each travels under to its own.
    """
    more = more if isinstance(more, dict) else dict(zip(more, more, strict=True))
    return {name: column for name, column in known.items() if column is not None} | more


def check_names(columns: tuple[str, ...], more: NumericColumns) -> None:
    """See that nothing is read from the same column, or travels under the same name, as something else.

    Raises:
        ValueError: if something is.
    """
    if taken := _OPTIONS & {*more}:
        raise ValueError(f"Expected other names in `numeric_columns` but got {sorted(taken)}: these are options.")
    if len(set(columns)) < len(columns):
        raise ValueError(f"Expected different column names but got {columns}.")
