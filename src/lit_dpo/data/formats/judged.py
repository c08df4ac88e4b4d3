"""A prompt, two completions, and what one set of data has to say which of them is better: a place, a sign, scores."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lit_dpo.data.formats.base import Message, PreferenceFormat, Ranking
from lit_dpo.data.formats.cells import ANY, read_number, short
from lit_dpo.data.formats.turns import (
    answers,
    is_turns,
    judged,
    messages,
    text_in,
    transcript,
    user,
)
from lit_dpo.errors import DataError


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
        scores = [abs(preference) * (preference < 0), abs(preference) * (preference > 0)]
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
    r"""Rows of summarize-from-feedback: `info` (a post or an article), two `summaries`, and the `choice`, 0 or 1.

    Prompt and summaries are text: a post with its title and `TL;DR:` at the end, as in arXiv 2009.01325.

    Example:
        >>> from lit_dpo.data.formats import SummaryComparisons
        >>> row = {"info": {"post": "I add."}, "summaries": [{"text": " Sums."}, {"text": " Fish."}], "choice": 0}
        >>> SummaryComparisons().read(row)[:2]
        ('POST: I add.\n\nTL;DR:', [' Sums.', ' Fish.'])
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
