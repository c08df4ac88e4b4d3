"""What cells may hold: numbers, text, messages. Each error names the column."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from lit_dpo.data.formats.base import Message
from lit_dpo.errors import DataError

ANY = (-math.inf, math.inf)
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
    """Return the cell's messages, without the keys that Arrow fills with null because another row has them."""
    if not cell:
        raise DataError(f"Expected at least one message in `{name}` but the list is empty.")
    for number, message in enumerate(cell):
        where = f"message {number} of `{name}`"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"Expected a `role` and a `content` in {where} but got {short(message)}.")
        calls = message["content"] is None and message.get("tool_calls")
        if not (isinstance(message["content"], str) or calls):
            raise DataError(f"Expected text as the `content` of {where} but got {short(message['content'])}.")
    return [{key: value for key, value in message.items() if value is not None} for message in cell]


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
    if not any(_says_something(message) for message in messages if message["role"] == "assistant"):
        raise DataError(f"Expected an assistant message with text in `{name}` but got {short(messages)}.")


def _says_something(message: Message) -> bool:
    return bool(message.get("content", "").strip() or message.get("tool_calls"))


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
