"""A prompt, two completions, and a cell that says which of them is better: by its name, number, or sign."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lit_dpo.data.formats.base import Message, Preference, PreferenceFormat, Ranking, Skipped
from lit_dpo.data.formats.cells import ANY, read_number, short
from lit_dpo.data.formats.questions import instructed
from lit_dpo.data.formats.turns import (
    answers,
    apart,
    check_sides,
    is_turns,
    judged,
    messages,
    parsed,
    text_in,
    transcript,
    user,
)
from lit_dpo.errors import DataError

_NAMED = {
    **dict.fromkeys(("a", "model_a", "response_a", "output_1", "1", "first"), 1.0),
    **dict.fromkeys(("b", "model_b", "response_b", "output_2", "2", "second"), 2.0),
    **dict.fromkeys(("tie", "same", "equal", "0"), 1.5),
}


@dataclass(frozen=True)
class LabelledPairs(PreferenceFormat):
    """Rows with a prompt, two answers and a label, such as AlpacaFarm's and AlpacaEval's (`output_1`, `output_2`).

    A label is a number, true or false, a name (`A`, `model_b`, `tie`), or a list of these by several annotators. Ties
    are rankings of equal ranks: `data.ties` decides.

    Args:
        prompt: name of the column that holds what was asked. `input`, `history` and `system` beside it are read as in
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
        if isinstance(label, str) and self.coding == "1_2":
            number = _NAMED.get(label.strip().lower())
        else:
            number = None
        if number is None:
            number = read_number(self.label, {self.label: int(label) if isinstance(label, bool) else label}, *ANY)
        if self.coding == "1_2" and not isinstance(label, bool):
            number = 0.5 if number == 0 else number - 1
        elif self.coding == "first":
            number = 1 - number
        if isinstance(label, bool) and self.coding == "1_2" or not 0 <= number <= 1:
            raise DataError(f"Expected a label by the coding `{self.coding}` in `{self.label}` but got {short(label)}.")
        return number


@dataclass(frozen=True)
class SHP(PreferenceFormat):
    """Rows of the Stanford Human Preferences: `history`, two answers, and `labels`, 1 where the first is better.

    Example:
        >>> from lit_dpo.data.formats import SHP
        >>> SHP().read({"history": "2 + 2?", "human_ref_A": "5", "human_ref_B": "4", "labels": 0}).ranks
        [2.0, 1.0]
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of this layout."""
        return "history", "human_ref_A", "human_ref_B", "labels"

    def read(self, row: Mapping[str, Any]) -> Ranking:
        """Read the row's cells.

        Raises:
            DataError: for a missing or empty text, or a label that is not 0 or 1.
        """
        found = {name: row.get(name) for name in ("human_ref_A", "human_ref_B")}
        return judged([user(text_in("history", row))], found, 1 - place_in("labels", row))


@dataclass(frozen=True)
class SafeRLHF(PreferenceFormat):
    """Rows of PKU-SafeRLHF: `prompt`, two responses, and the numbers of the better and of the safer one.

    Args:
        by: `better` or `safer`: which of the two numbers is the preference.

    Example:
        >>> from lit_dpo.data.formats import SafeRLHF
        >>> row = {"prompt": "2 + 2?", "response_0": "5", "response_1": "4", "better_response_id": 1}
        >>> SafeRLHF().read(row).ranks
        [2.0, 1.0]
    """

    by: Literal["better", "safer"] = "better"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of this layout."""
        return "prompt", "response_0", "response_1", f"{self.by}_response_id"

    def read(self, row: Mapping[str, Any]) -> Ranking:
        """Read the row's cells.

        Raises:
            DataError: for a missing or empty text, or a number that is not 0 or 1.
        """
        found = {name: row.get(name) for name in ("response_0", "response_1")}
        return judged([user(text_in("prompt", row))], found, place_in(f"{self.by}_response_id", row))


_EXTRA_ID = re.compile(r"(?:^|\n)<extra_id_1>(User|Assistant)\n")


@dataclass(frozen=True)
class SignedPairs(PreferenceFormat):
    """Rows with a preference from −3 to 3, such as HelpSteer2's and HelpSteer3's; below 0 the first one is better.

    How strong it is travels as `score_margin`.

    Args:
        prompt: name of the column that holds the prompt: text (of several turns, as HelpSteer2 marks them) or messages.
        first: name of the column that holds a response.
        second: name of the column that holds the other one.
        preference: name of the column that holds the number.

    Example:
        >>> from lit_dpo.data.formats import SignedPairs
        >>> row = {"prompt": "2 + 2?", "response_1": "4", "response_2": "5", "preference_strength": -3}
        >>> SignedPairs().read(row).scores
        [3.0, 0.0]
    """

    prompt: str = "prompt"
    first: str = "response_1"
    second: str = "response_2"
    preference: str = "preference_strength"

    @property
    def columns(self) -> tuple[str, ...]:
        """The four columns."""
        return self.prompt, self.first, self.second, self.preference

    def read(self, row: Mapping[str, Any]) -> Ranking:
        """Read the row's cells.

        Raises:
            DataError: for a missing or empty prompt or response, or a preference that is no number.
        """
        preference = read_number(self.preference, row, *ANY)
        scores = [max(-preference, 0.0), max(preference, 0.0)]
        completions = {name: row.get(name) for name in (self.first, self.second)}
        return Ranking(*answers(self._prompt(row), completions), scores=scores)

    def _prompt(self, row: Mapping[str, Any]) -> list[Message]:
        if is_turns(row.get(self.prompt)):
            return messages(self.prompt, row[self.prompt])
        text = text_in(self.prompt, row)
        if _EXTRA_ID.search(text):  # the first turn has no mark
            return transcript(self.prompt, "<extra_id_1>User\n" + text, _EXTRA_ID)
        return [user(text)]


@dataclass(frozen=True)
class WebGPT(PreferenceFormat):
    """Rows of WebGPT's comparisons: `question` with its `full_text`, two answers and their scores from −1 to 1.

    Example:
        >>> from lit_dpo.data.formats import WebGPT
        >>> row = {"question": {"full_text": "2 + 2?"}, "answer_0": "4", "score_0": 1, "answer_1": "5", "score_1": -1}
        >>> WebGPT().read(row).scores
        [1.0, -1.0]
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of this layout."""
        return "question", "answer_0", "score_0", "answer_1", "score_1"

    def read(self, row: Mapping[str, Any]) -> Ranking:
        """Read the row's cells.

        Raises:
            DataError: for a missing or empty text, or a score that is no number.
        """
        question = row.get("question")
        prompt = [user(text_in("full_text", question if isinstance(question, dict) else {}))]
        scores = [read_number(f"score_{place}", row, *ANY) for place in range(2)]
        completions = {name: row.get(name) for name in ("answer_0", "answer_1")}
        return Ranking(*answers(prompt, completions), scores=scores)


@dataclass(frozen=True)
class SummaryComparisons(PreferenceFormat):
    """Rows of summarize-from-feedback: `info` (a post or an article), two `summaries`, and the `choice`, 0 or 1.

    Prompt and summaries are text: a post with its title and `TL;DR:` at the end, as in arXiv 2009.01325.

    Example:
        >>> from lit_dpo.data.formats import SummaryComparisons
        >>> row = {"info": {"post": "I add."}, "summaries": [{"text": " Sums."}, {"text": " Fish."}], "choice": 0}
        >>> SummaryComparisons().read(row)[:2]
        ('POST: I add.\\n\\nTL;DR:', [' Sums.', ' Fish.'])
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of this layout."""
        return "info", "summaries", "choice"

    def read(self, row: Mapping[str, Any]) -> Ranking:
        """Read the row's cells.

        Raises:
            DataError: for a row without a post or an article, other than two summaries, or a choice that is none.
        """
        info, summaries = row.get("info"), row.get("summaries")
        if not isinstance(info, dict) or not (info.get("post") or info.get("article")):
            raise DataError(f"Expected a `post` or an `article` in `info` but got {short(info)}.")
        if not isinstance(summaries, list) or len(summaries) != 2:
            raise DataError(f"Expected two summaries in `summaries` but got {short(summaries)}.")
        subreddit, title = info.get("subreddit"), info.get("title")
        parts = [f"SUBREDDIT: r/{subreddit}"] * bool(subreddit) + [f"TITLE: {title}"] * bool(title)
        parts = [*parts, f"POST: {info['post']}"] if info.get("post") else [str(info["article"])]
        texts = [text_in("text", one if isinstance(one, dict) else {}) for one in summaries]
        better = place_in("choice", row)
        return Ranking("\n\n".join([*parts, "TL;DR:"]), texts, ranks=[1.0 + (better != place) for place in range(2)])


@dataclass(frozen=True)
class Arena(PreferenceFormat):
    """Rows of a chatbot arena: the same questions to two models, and the `winner`.

    The prompt is what both conversations share, the first question alone where the answers differ from the first one
    on. A tie is a ranking of equal ranks (`data.ties`); where both were said to be bad, the row is left out and counted.

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


def place_in(name: str, row: Mapping[str, Any]) -> int:
    """Return the 0 or 1 in a column.

    Raises:
        DataError: for anything else.
    """
    cell = row.get(name)
    number = read_number(name, {name: int(cell) if isinstance(cell, bool) else cell}, *ANY)
    if number not in (0, 1):
        raise DataError(f"Expected 0 or 1 in `{name}` but got {short(row.get(name))}.")
    return int(number)
