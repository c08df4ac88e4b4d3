"""The interface of preference formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from lit_dpo.errors import DataError

Message: TypeAlias = dict[str, Any]
"""One turn of a conversation: `{"role": "user", "content": "Hello"}`, and whatever else the chat template reads."""


class Preference(NamedTuple):
    """One preference: a prompt and two completions, all three plain text or all three lists of messages.

    Attributes:
        prompt: what was asked.
        chosen: the completion that was preferred, without the prompt.
        rejected: the other completion, without the prompt.
        columns: numbers about the pair, by name; all rows of a split have the same ones. `weight` ≥ 0 multiplies the
            pair's loss; `score_margin` is how much better the chosen completion was scored than the other;
            `probability` in [0, 1] that it is the better one: the share of annotators who said so. Any other name
            travels as it is, to losses, metrics and predictions.
        template: of a conversation, arguments of the chat template for this row alone: `{"tools": […]}`. A row is
            refused if they change nothing of what is rendered. Those in the column `chat_template_kwargs` are added.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    columns: Mapping[str, float] = MappingProxyType({})
    template: Mapping[str, Any] = MappingProxyType({})

    @property
    def is_conversation(self) -> bool:
        """Whether the parts are messages, which the tokenizer's chat template renders."""
        return not isinstance(self.prompt, str)


class Ranking(NamedTuple):
    """Many completions of one prompt, and which of them are better; all plain text or all lists of messages.

    Exactly one of `scores`, `ranks` and `comparisons` says what is better.

    Attributes:
        prompt: what was asked.
        completions: two or more, without the prompt.
        scores: a number for each completion; higher is better, equal ones are ties.
        ranks: a number for each completion; 1 is the best, equal ones are ties.
        comparisons: which completions are compared: places among them, from 0, the better one's first.
        columns: numbers by name, as in `Preference`: one for the row, which each of its comparisons gets; or with
            `comparisons` one for each of these. With `scores` their difference is the column `score_margin`.
        template: as in `Preference`.

    Example:
        >>> Ranking("2 + 2?", [" 4", " four, I think", " 5"], scores=[1.0, 0.5, 0.0]).is_conversation
        False
    """

    prompt: str | list[Message]
    completions: Sequence[str] | Sequence[list[Message]]
    scores: Sequence[float] | None = None
    ranks: Sequence[float] | None = None
    comparisons: Sequence[tuple[int, int]] | None = None
    columns: Mapping[str, float | Sequence[float]] = MappingProxyType({})
    template: Mapping[str, Any] = MappingProxyType({})

    @property
    def is_conversation(self) -> bool:
        """Whether the parts are messages, which the tokenizer's chat template renders."""
        return not isinstance(self.prompt, str)


class Skipped(NamedTuple):
    """A row that is right and yet prefers nothing: both completions are bad, or one is empty. Left out and counted.

    A tie is none of these: it is a `Ranking` of equal ranks, of which `data.ties` decides.

    Attributes:
        reason: in words, without the row's own; rows are counted by it.
    """

    reason: str


@dataclass(frozen=True)
class PreferenceFormat(ABC):
    """A reader of rows: which columns it needs, and how one row becomes a `Preference` or a `Ranking`.

    Subclass it anywhere; nothing has to be registered. Options are dataclass fields, so that they are command-line
    arguments too (`--data.format my_lab.formats.QuestionAnswers --data.format.separator ": "`), and a changed option
    encodes the data anew.

    What `read` returns is looked at behind every format: parts and numbers that can be trained on, completions that do
    not begin with the prompt, and that nothing is lost where the chat template renders it. A column that looks like a
    part of the prompt or like a label and is among no `columns` is refused (`--data.ignore_columns`).

    Example:
        >>> from dataclasses import dataclass
        >>> from lit_dpo.data.formats import Preference, PreferenceFormat
        >>> @dataclass(frozen=True)
        ... class QuestionAnswers(PreferenceFormat):
        ...     separator: str = " "
        ...     @property
        ...     def columns(self):
        ...         return ("question", "good", "bad")
        ...     def read(self, row):
        ...         return Preference(row["question"] + self.separator, row["good"], row["bad"])
        >>> QuestionAnswers().read({"question": "2 + 2?", "good": "4", "bad": "5"}).prompt
        '2 + 2? '
    """

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns that `read` uses. A file without one of them is refused before any row is read."""

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Columns that `read` uses where a file has them."""
        return ()

    def fits(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a file that begins with these rows is of this layout: at least half of them can be read."""
        return sum(self._can_read(row) for row in rows) * 2 >= max(len(rows), 1)

    def _can_read(self, row: Mapping[str, Any]) -> bool:
        try:
            return all(map(self.read, self.examples(row)))
        except DataError:
            return False

    def examples(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Return what `read` is given of a row of a file: itself, or the cells of each example that it holds."""
        return (row,)

    @abstractmethod
    def read(self, row: Mapping[str, Any]) -> Preference | Ranking | Skipped:
        """One row as a preference, as a ranking of many completions, or as one that prefers nothing.

        Raises:
            DataError: if a cell cannot be used, naming the column; the caller adds the file and the row number.
        """
