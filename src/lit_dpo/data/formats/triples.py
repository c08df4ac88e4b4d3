"""Three columns: prompt, chosen, rejected; and any number of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
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
        numeric_columns: names of more columns of numbers, which travel with the pairs under their own names: to losses
            and metrics as `pairs.column("NAME")`, and into the predictions. Or a mapping, from the name that they
            travel under to that of the column.

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
    numeric_columns: list[str] | dict[str, str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            ValueError: if two things would be read from the same column, or travel under the same name.
        """
        if taken := {"weight", "score_margin", "probability"} & {*self.numeric_columns}:
            raise ValueError(f"Expected other names in `numeric_columns` but got {sorted(taken)}: these are options.")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"Expected different column names but got {self.columns}.")

    @property
    def columns(self) -> tuple[str, ...]:
        """The three column names, and those of the numbers that are asked for."""
        return self.prompt, self.chosen, self.rejected, *self._numbers.values()

    @property
    def _numbers(self) -> dict[str, str]:
        """The names of columns of numbers, by the names that they travel under."""
        known = {"weight": self.weight, "score_margin": self.score_margin, "probability": self.probability}
        more = self.numeric_columns
        more = more if isinstance(more, dict) else dict(zip(more, more, strict=True))
        return {name: column for name, column in known.items() if column is not None} | more

    def read(self, row: Mapping[str, Any]) -> Preference:
        """Read the row's cells.

        Raises:
            DataError: for a missing cell, an empty prompt or completion, text next to messages, a message without role
                or content, a completion in which the assistant says nothing, one that repeats the conversation, or a
                number that is none or out of its range.
        """
        numbers = {name: _number(column, row, *_RANGES.get(name, _ANY)) for name, column in self._numbers.items()}
        columns = (self.prompt, self.chosen, self.rejected)
        kinds = {name: _kind(name, row.get(name)) for name in columns}
        if len(set(kinds.values())) > 1:
            found = ", ".join(f"`{name}` is {kind}" for name, kind in kinds.items())
            raise DataError(f"Expected three texts or three lists of messages but {found}.{_hint(row, kinds)}")
        if "text" in kinds.values():
            _check_texts(row, columns)
            return Preference(row[self.prompt], row[self.chosen], row[self.rejected], numbers)
        prompt, chosen, rejected = (_messages(name, row[name]) for name in columns)
        _check_completion(self.chosen, chosen)
        _check_completion(self.rejected, rejected)
        return Preference(prompt, chosen, rejected, numbers)


_ANY = (-math.inf, math.inf)
_RANGES = {"weight": (0, math.inf), "probability": (0, 1)}


def _number(name: str, row: Mapping[str, Any], low: float, high: float) -> float:
    """Read the number in a column; cells of `.csv` are text."""
    cell = row.get(name)
    try:
        number = math.nan if isinstance(cell, bool) or cell is None else float(cell)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and low <= number <= high):
        wanted = "a number" + (f" >= {low:g}" if high == math.inf else f" in [{low:g}, {high:g}]") * (low > -math.inf)
        raise DataError(f"Expected {wanted} in `{name}` but got {_short(cell) if cell is not None else 'nothing'}.")
    return number


def _kind(name: str, cell: object) -> str:
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
    """Return the cell's messages, without the keys that Arrow fills with null because another row has them."""
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
    """Say what to do where a text prompt stands next to whole conversations, as in many data sets."""
    for name, kind in kinds.items():
        if kind == "messages" and any(isinstance(m, dict) and m.get("role") == "user" for m in row[name]):
            return f" `{name}` holds a whole conversation: put all but the completion in the prompt, as messages."
    return ""


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
