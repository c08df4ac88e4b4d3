"""Three columns: prompt, chosen, rejected; and any number of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_dpo.data.formats.base import Preference, PreferenceFormat
from lit_dpo.data.formats.cells import (
    ANY,
    RANGES,
    NumericColumns,
    check_messages,
    check_names,
    check_text,
    is_written_conversation,
    kind_of,
    numeric,
    parsed,
    read_messages,
    read_number,
)
from lit_dpo.data.formats.turns import tools_in
from lit_dpo.errors import DataError


@dataclass(frozen=True)
class Triples(PreferenceFormat):
    """Rows with a prompt and two completions: three texts, or three lists of messages `{"role": …, "content": …}`.

    Lists that are all written as strings, JSON or Python, as in `.csv`, are read as lists.

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
    numeric_columns: NumericColumns = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            ValueError: if two things would be read from the same column, or travel under the same name.
        """
        check_names(self.columns, self.numeric_columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """The three column names, and those of the numbers that are asked for."""
        return self.prompt, self.chosen, self.rejected, *self._numbers.values()

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """The tools of a conversation, as a list or as JSON."""
        return ("tools",)

    @property
    def _numbers(self) -> dict[str, str]:
        known = {"weight": self.weight, "score_margin": self.score_margin, "probability": self.probability}
        return numeric(known, self.numeric_columns)

    def read(self, row: Mapping[str, Any]) -> Preference:
        """Read the row's cells.

        Raises:
            DataError: for a missing cell, an empty prompt or completion, text next to messages, a message without role
                or content, a completion in which the assistant says nothing, one that repeats the conversation, or a
                number that is none or out of its range.
        """
        numbers = {name: read_number(column, row, *RANGES.get(name, ANY)) for name, column in self._numbers.items()}
        template = tools_in("tools", row)
        columns = (self.prompt, self.chosen, self.rejected)
        if all(is_written_conversation(row.get(name)) for name in columns):
            row = {name: parsed(row[name]) for name in columns}
        kinds = {name: kind_of(name, row.get(name)) for name in columns}
        if len(set(kinds.values())) > 1:
            found = ", ".join(f"`{name}` is {kind}" for name, kind in kinds.items())
            raise DataError(f"Expected three texts or three lists of messages but {found}.{_hint(row, kinds)}")
        if "text" in kinds.values():
            _check_texts(row, columns)
            return Preference(row[self.prompt], row[self.chosen], row[self.rejected], numbers, template)
        prompt, chosen, rejected = (read_messages(name, row[name]) for name in columns)
        check_messages(self.chosen, chosen)
        check_messages(self.rejected, rejected)
        return Preference(prompt, chosen, rejected, numbers, template)


def _check_texts(row: Mapping[str, Any], columns: tuple[str, str, str]) -> None:
    prompt, *completions = columns
    if not row[prompt]:
        raise DataError(f"Expected text in `{prompt}` but it is empty.")
    for name in completions:
        check_text(name, row[name])


def _hint(row: Mapping[str, Any], kinds: Mapping[str, str]) -> str:
    """Say what to do where a text prompt stands next to whole conversations, as in many data sets."""
    for name, kind in kinds.items():
        if kind == "messages" and any(isinstance(m, dict) and m.get("role") == "user" for m in row[name]):
            return f" `{name}` holds a whole conversation: put all but the completion in the prompt, as messages."
    return ""
