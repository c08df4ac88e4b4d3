"""One prompt, a list of completions, and a list of what they are worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_dpo.data.formats.base import Message, PreferenceFormat, Ranking
from lit_dpo.data.formats.cells import (
    ANY,
    RANGES,
    NumericColumns,
    check_messages,
    check_names,
    check_text,
    kind_of,
    numeric,
    read_messages,
    read_number,
    short,
)
from lit_dpo.errors import DataError


@dataclass(frozen=True)
class Rankings(PreferenceFormat):
    """Rows with a prompt, a list of two or more completions, and a list of their scores or ranks.

    The prompt is text and the completions are texts, or all are lists of messages `{"role": …, "content": …}`. Which of
    the completions are compared is the data module's `comparisons`.

    Args:
        prompt: name of the column that holds the prompt.
        completions: name of the column that holds the completions, without the prompt.
        scores: name of the column that holds a number for each completion, higher is better; the difference of a
            comparison's scores travels as `score_margin`.
        ranks: name of the column that holds the rank of each completion; 1 is the best, equal ranks are ties. Instead
            of `scores`, which is None then.
        weight: name of a column of numbers ≥ 0 by which the loss of each of the row's comparisons is multiplied.
        numeric_columns: names of more columns of numbers, one for the row, as in `Triples`.

    Example:
        >>> from lit_dpo.data.formats import Rankings
        >>> row = {"prompt": "2 + 2?", "completions": [" 4", " 5", " 22"], "stars": [5, 2, 1]}
        >>> Rankings(scores="stars").read(row).scores
        [5.0, 2.0, 1.0]
    """

    prompt: str = "prompt"
    completions: str = "completions"
    scores: str | None = "scores"
    ranks: str | None = None
    weight: str | None = None
    numeric_columns: NumericColumns = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            ValueError: if not one of `scores` and `ranks` is given, if two things would be read from the same column,
                or travel under the same name.
        """
        if (self.scores is None) == (self.ranks is None):
            raise ValueError(
                f"Expected one of `scores` and `ranks` but got {self.scores!r} and {self.ranks!r}: name the column "
                "that says which completions are better, and set the other one to null."
            )
        check_names(self.columns, self.numeric_columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """The column names of prompt, completions, their values, and of the numbers that are asked for."""
        return self.prompt, self.completions, self._values, *self._numbers.values()

    @property
    def _values(self) -> str:
        name = self.scores if self.ranks is None else self.ranks
        assert name is not None
        return name

    @property
    def _numbers(self) -> dict[str, str]:
        return numeric({"weight": self.weight}, self.numeric_columns)

    def read(self, row: Mapping[str, Any]) -> Ranking:
        """Read the row's cells.

        Raises:
            DataError: for a missing cell, one that is no list, fewer than two completions, lists of different lengths,
                an empty prompt or completion, text next to messages, a number that is none or out of its range, and
                for messages what `Triples` refuses.
        """
        numbers = {name: read_number(column, row, *RANGES.get(name, ANY)) for name, column in self._numbers.items()}
        completions, values = _list(self.completions, row), _list(self._values, row)
        if len(completions) < 2:
            raise DataError(f"Expected at least two completions in `{self.completions}` but got {len(completions)}.")
        if len(values) != len(completions):
            raise DataError(
                f"Expected a number in `{self._values}` for each of the {len(completions)} completions in "
                f"`{self.completions}` but got {len(values)}."
            )
        cells = {f"{self._values}[{place}]": value for place, value in enumerate(values)}
        found = [read_number(name, cells, *ANY) for name in cells]
        scores, ranks = (found, None) if self.ranks is None else (None, found)
        return Ranking(*self._parts(row, completions), scores=scores, ranks=ranks, columns=numbers)

    def _parts(self, row: Mapping[str, Any], completions: list[Any]) -> tuple[Any, Any]:
        kind = kind_of(self.prompt, row.get(self.prompt))
        named = {f"{self.completions}[{place}]": one for place, one in enumerate(completions)}
        for name, one in named.items():
            if (own := kind_of(name, one)) != kind:
                raise DataError(f"Expected {kind} in `{name}`, as in `{self.prompt}`, but it is {own}.")
        if kind == "messages":
            return read_messages(self.prompt, row[self.prompt]), [_said(name, one) for name, one in named.items()]
        if not row[self.prompt]:
            raise DataError(f"Expected text in `{self.prompt}` but it is empty.")
        for name, one in named.items():
            check_text(name, one)
        return row[self.prompt], completions


def _said(name: str, cell: list[Any]) -> list[Message]:
    found = read_messages(name, cell)
    check_messages(name, found)
    return found


def _list(name: str, row: Mapping[str, Any]) -> list[Any]:
    cell = row.get(name)
    if not isinstance(cell, list):
        came = "nothing (null)" if cell is None else f"{type(cell).__name__} {short(cell)}"
        raise DataError(f"Expected a list in `{name}` but got {came}.")
    return cell
