"""The interface of preference formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

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
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    columns: Mapping[str, float] = MappingProxyType({})

    @property
    def is_conversation(self) -> bool:
        """Whether the parts are messages, which the tokenizer's chat template renders."""
        return not isinstance(self.prompt, str)


@dataclass(frozen=True)
class PreferenceFormat(ABC):
    """A reader of rows: which columns it needs, and how one row becomes a `Preference`.

    Subclass it anywhere; nothing has to be registered. Options are dataclass fields, so that they are command-line
    arguments too (`--data.format my_lab.formats.QuestionAnswers --data.format.separator ": "`), and a changed option
    encodes the data anew.

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

    @abstractmethod
    def read(self, row: Mapping[str, Any]) -> Preference:
        """One row as a preference.

        Raises:
            DataError: if a cell cannot be used, naming the column; the caller adds the file and the row number.
        """
