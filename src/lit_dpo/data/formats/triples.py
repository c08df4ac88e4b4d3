"""Three columns: prompt, chosen, rejected; and up to three of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_dpo.data.formats.base import Message, Preference, PreferenceFormat
from lit_dpo.errors import DataError


@dataclass(frozen=True)
class Triples(PreferenceFormat):
    """Rows with a prompt and two completions: three texts, or three lists of messages `{"role": …, "content": …}`.

    Args:
        prompt: name of the column that holds the prompt.
        chosen: name of the column that holds the preferred completion, without the prompt.
        rejected: name of the column that holds the other completion, without the prompt.
        weight: name of a column of numbers ≥ 0 by which each pair's loss is multiplied. None: all pairs count the same.
        score_margin: name of a column of numbers: the chosen completion's score minus the other's; `ODPOLoss` reads it.
        probability: name of a column of numbers in [0, 1]: the probability that the chosen completion is the better
            one; `SoftDPOLoss` reads it.

    Example:
        >>> from lit_dpo.data.formats import Triples
        >>> row = {"request": "2 + 2?", "chosen": " 4", "rejected": " 5", "agreement": 0.9}
        >>> Triples(prompt="request", probability="agreement").read(row)[:3]
        ('2 + 2?', ' 4', ' 5')
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    weight: str | None = None
    score_margin: str | None = None
    probability: str | None = None

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            ValueError: if two things would be read from the same column.
        """
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"Expected different column names but got {self.columns}.")

    @property
    def columns(self) -> tuple[str, ...]:
        """The three column names, and those of the numbers that are asked for."""
        numbers = (self.weight, self.score_margin, self.probability)
        return self.prompt, self.chosen, self.rejected, *(name for name in numbers if name is not None)

    def read(self, row: Mapping[str, Any]) -> Preference:
        """The row's cells.

        Raises:
            DataError: for a missing cell, an empty prompt or completion, text next to messages, a message without role
                or content, a completion in which the assistant says nothing, one that repeats the conversation, or a
                number that is none or out of its range.
        """
        numbers = (
            _number(self.weight, row, 0, math.inf),
            _number(self.score_margin, row, -math.inf, math.inf),
            _number(self.probability, row, 0, 1),
        )
        columns = (self.prompt, self.chosen, self.rejected)
        kinds = {name: _kind(name, row.get(name)) for name in columns}
        if len(set(kinds.values())) > 1:
            found = ", ".join(f"`{name}` is {kind}" for name, kind in kinds.items())
            raise DataError(f"Expected three texts or three lists of messages but {found}.{_hint(row, kinds)}")
        if "text" in kinds.values():
            _check_texts(row, columns)
            return Preference(row[self.prompt], row[self.chosen], row[self.rejected], *numbers)
        prompt, chosen, rejected = (_messages(name, row[name]) for name in columns)
        _check_completion(self.chosen, chosen)
        _check_completion(self.rejected, rejected)
        return Preference(prompt, chosen, rejected, *numbers)


def _number(name: str | None, row: Mapping[str, Any], low: float, high: float) -> float | None:
    """The number in a column; cells of `.csv` are text."""
    if name is None:
        return None
    cell = row.get(name)
    try:
        number = math.nan if isinstance(cell, bool) or cell is None else float(cell)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and low <= number <= high):
        wanted = "a number" + (f" >= {low:g}" if high == math.inf else f" in [{low:g}, {high:g}]") * (low > -math.inf)
        raise DataError(f"Expected {wanted} in `{name}` but got {_short(cell) if cell is not None else 'nothing'}.")
    return number


def _kind(name: str, cell: Any) -> str:
    """`"text"` or `"messages"`."""
    if isinstance(cell, str):
        return "text"
    if isinstance(cell, list):
        return "messages"
    came = "nothing (null)" if cell is None else f"{type(cell).__name__} {_short(cell)}"
    raise DataError(f"Expected text or a list of messages in `{name}` but got {came}.")


def _check_texts(row: Mapping[str, Any], columns: tuple[str, str, str]) -> None:
    prompt, *completions = columns
    if not row[prompt]:
        raise DataError(f"Expected text in `{prompt}` but it is empty.")
    for name in completions:
        if not row[name].strip():
            raise DataError(f"Expected a completion in `{name}` but got {row[name]!r}.")


def _messages(name: str, cell: list[Any]) -> list[Message]:
    """The cell's messages, without the keys that Arrow fills with null because another row has them."""
    if not cell:
        raise DataError(f"Expected at least one message in `{name}` but the list is empty.")
    for number, message in enumerate(cell):
        where = f"message {number} of `{name}`"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"Expected a `role` and a `content` in {where} but got {_short(message)}.")
        calls = message["content"] is None and message.get("tool_calls")
        if not (isinstance(message["content"], str) or calls):
            raise DataError(f"Expected text as the `content` of {where} but got {_short(message['content'])}.")
    return [{key: value for key, value in message.items() if value is not None} for message in cell]


def _check_completion(name: str, messages: list[Message]) -> None:
    others = [message["role"] for message in messages if message["role"] in ("system", "user")]
    if others:
        raise DataError(
            f"Expected only the completion in `{name}` but it holds a conversation with a {others[0]} message. "
            "Put the messages before the completion in the prompt column."
        )
    if not any(_says_something(message) for message in messages if message["role"] == "assistant"):
        raise DataError(f"Expected an assistant message with text in `{name}` but got {_short(messages)}.")


def _says_something(message: Message) -> bool:
    return bool(message.get("content", "").strip() or message.get("tool_calls"))


def _hint(row: Mapping[str, Any], kinds: Mapping[str, str]) -> str:
    """What to do where a text prompt stands next to whole conversations, a layout that many data sets have."""
    for name, kind in kinds.items():
        if kind == "messages" and any(isinstance(m, dict) and m.get("role") == "user" for m in row[name]):
            return f" `{name}` holds a whole conversation: put all but the completion in the prompt, as messages."
    return ""


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
