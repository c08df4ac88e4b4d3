"""A prompt, two completions, and a label: a number, a name, several annotators' ones, or an arena's winner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lit_dpo.data.formats.base import Preference, PreferenceFormat, Ranking, Skipped
from lit_dpo.data.formats.cells import ANY, read_number, short
from lit_dpo.data.formats.questions import instructed
from lit_dpo.data.formats.turns import answers, apart, assistant, check_sides, judged, messages, parsed, user
from lit_dpo.errors import DataError

_NAMED = {
    **dict.fromkeys(("a", "model_a", "response_a", "output_1", "1", "first"), 1.0),
    **dict.fromkeys(("b", "model_b", "response_b", "output_2", "2", "second"), 2.0),
    **dict.fromkeys(("tie", "same", "equal", "0"), 1.5),
}
_OUTCOMES = ("winner_model_a", "winner_model_b", "winner_tie")


@dataclass(frozen=True)
class LabelledPairs(PreferenceFormat):
    """Rows with a prompt, two answers and a label, such as AlpacaFarm's and AlpacaEval's (`output_1`, `output_2`).

    A label is a number, true or false, a name (`A`, `model_b`, `tie`), or a list of these by several annotators. Ties
    are rankings of equal ranks: `data.ties` decides.

    Args:
        prompt: name of the column that holds what was asked. Columns `input`, `history` and `system` are read as in
            `Alpaca`.
        first: name of the column that holds an answer.
        second: name of the column that holds the other one.
        label: name of the column that says which is better.
        coding: what a number means. `1_2`: 1 the first is better, 2 the second, between them the share of those who
            say the second, 0 a tie; names need no other. `first`: 1 or true, the first is better; 0 or false, the
            second; between them the share. `second`: 1 or true, the second is better.
        probability: give the share of those who say so as the column `probability`, instead of the majority alone.

    Example:
        >>> from lit_dpo.data.formats import LabelledPairs
        >>> row = {"instruction": "2 + 2?", "output_1": "5", "output_2": "4", "preference": [2, 2, 1, 2]}
        >>> LabelledPairs().read(row).ranks
        [2.0, 1.0]
        >>> LabelledPairs(probability=True).read(row).columns
        {'probability': 0.75}
    """

    prompt: str = "instruction"
    first: str = "output_1"
    second: str = "output_2"
    label: str = "preference"
    coding: Literal["1_2", "first", "second"] = "1_2"
    probability: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The four columns."""
        return self.prompt, self.first, self.second, self.label

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """What else belongs to the prompt."""
        return "input", "history", "system"

    def fits(self, rows: Any) -> bool:
        """Whether they can be read, and 2 is there as well as 1: of 0 and 1 nobody can tell what they mean."""
        return super().fits(rows) and (
            self.coding != "1_2" or any(self._can_read(row) and self._share(row) > 0.5 for row in rows)
        )

    def read(self, row: Mapping[str, Any]) -> Preference | Ranking:
        """Read the row's cells.

        Raises:
            DataError: for a missing or empty prompt or answer, or a label that has no meaning by `coding`.
        """
        prompt = instructed(self.prompt, row)
        completions = {name: row.get(name) for name in (self.first, self.second)}
        share = self._share(row)
        if not self.probability:
            return judged(prompt, completions, None if share == 0.5 else int(share > 0.5))
        prompt, sides = answers(prompt, completions)
        chosen, rejected = sides if share <= 0.5 else sides[::-1]
        return Preference(prompt, chosen, rejected, {"probability": max(share, 1 - share)})

    def _share(self, row: Mapping[str, Any]) -> float:
        """Return the share of those who say that the second is better."""
        cell = parsed(row.get(self.label))
        labels = cell if isinstance(cell, list) and cell else [cell]
        return sum(map(self._share_of, labels)) / len(labels)

    def _share_of(self, label: Any) -> float:
        if self.coding == "1_2":
            named = _NAMED.get(label.strip().lower(), label) if isinstance(label, str) else label
            number = read_number(self.label, {self.label: named}, *ANY)
            share = 0.5 if number == 0 else number - 1
        else:
            share = read_number(self.label, {self.label: int(label) if isinstance(label, bool) else label}, *ANY)
            share = 1 - share if self.coding == "first" else share
        if not 0 <= share <= 1:
            raise DataError(f"Expected a label by the coding `{self.coding}` in `{self.label}` but got {short(label)}.")
        return share


@dataclass(frozen=True)
class Arena(PreferenceFormat):
    """Rows of a chatbot arena: the same questions to two models, and the `winner`.

    The prompt is what both conversations share, the first question alone where the answers differ from the first one
    on. A tie is a ranking of equal ranks (`data.ties`); a row of which both are said to be bad is left out and counted.

    Args:
        first: name of the column that holds the conversation of `model_a`.
        second: name of the column that holds the conversation of `model_b`.
        winner: name of the column that says `model_a`, `model_b`, `tie`, `tie (bothbad)` or `both_bad`.

    Example:
        >>> from lit_dpo.data.formats import Arena
        >>> ask = {"role": "user", "content": "2 + 2?"}
        >>> row = {f"conversation_{one}": [ask, {"role": "assistant", "content": one}] for one in "ab"}
        >>> Arena().read(row | {"winner": "model_b"}).ranks
        [2.0, 1.0]
        >>> Arena().read(row | {"winner": "tie (bothbad)"})
        Skipped(reason='both completions are said to be bad')
    """

    first: str = "conversation_a"
    second: str = "conversation_b"
    winner: str = "winner"

    @property
    def columns(self) -> tuple[str, ...]:
        """The three columns."""
        return self.first, self.second, self.winner

    def read(self, row: Mapping[str, Any]) -> Ranking | Skipped:
        """Read the row's cells.

        Raises:
            DataError: for what is no conversation, conversations that share nothing, or an unknown winner.
        """
        sides = {name: messages(name, row.get(name)) for name in (self.first, self.second)}
        prompt, *completions = apart(*sides.values())
        check_sides(prompt, dict(zip(sides, completions, strict=True)))
        winner = str(row.get(self.winner)).strip().lower()
        if "bad" in winner:
            return Skipped("both completions are said to be bad")
        if winner not in _NAMED:
            raise DataError(
                f"Expected model_a, model_b or tie in `{self.winner}` but got {short(row.get(self.winner))}."
            )
        share = _NAMED[winner] - 1
        return Ranking(prompt, completions, ranks=[1.0 + (share > 0.5), 1.0 + (share < 0.5)])


@dataclass(frozen=True)
class ArenaColumns(PreferenceFormat):
    """Rows of LMSYS's 55,000 arena battles: lists of turns, often as JSON strings, and a column of 0 and 1 per outcome.

    The prompt is the first question; where a battle has several turns, each side goes on by itself.

    Example:
        >>> from lit_dpo.data.formats import ArenaColumns
        >>> row = {"prompt": '["2 + 2?"]', "response_a": '["5"]', "response_b": '["4"]'}
        >>> row |= {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
        >>> ArenaColumns().read(row).ranks
        [2.0, 1.0]
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of this layout."""
        return "prompt", "response_a", "response_b", *_OUTCOMES

    def read(self, row: Mapping[str, Any]) -> Ranking | Skipped:
        """Read the row's cells.

        Raises:
            DataError: for what is no list of texts, lists of different lengths, or not one outcome.
        """
        given = {name: parsed(row.get(name)) for name in self.columns[:3]}
        turns = [one for one in given.values() if isinstance(one, list) and one]
        if len(turns) < 3 or len({*map(len, turns)}) > 1:
            raise DataError(
                f"Expected lists of turns, equally many, in `prompt` and both responses but got {short(given)}."
            )
        if any(one is None or one == "" for side in turns for one in side):
            return Skipped("a completion is empty")
        flags = [read_number(name, row, 0, 1) for name in _OUTCOMES]
        if sorted(flags) != [0, 0, 1]:
            raise DataError(f"Expected one 1 and two 0 in {', '.join(map('`{}`'.format, _OUTCOMES))} but got {flags}.")
        asked, *sides = turns
        conversations = [
            [
                turn
                for question, answer in zip(asked, side, strict=True)
                for turn in (user(str(question)), assistant(str(answer)))
            ]
            for side in sides
        ]
        completions = [conversation[1:] for conversation in conversations]
        return Ranking(conversations[0][:1], completions, ranks=[2 - flags[0] - flags[2], 2 - flags[1] - flags[2]])
