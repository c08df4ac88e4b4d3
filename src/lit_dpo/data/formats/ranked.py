"""A prompt, and a list of objects, each a completion with what it is worth; or one right answer and several wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_dpo.data.formats.base import Message, PreferenceFormat, Ranking, Skipped
from lit_dpo.data.formats.cells import ANY, check_messages, parsed, read_number, short
from lit_dpo.data.formats.implicit import HUMAN
from lit_dpo.data.formats.turns import (
    answers,
    assistant,
    check_sides,
    is_turns,
    messages,
    text_in,
    tools_in,
    transcript,
    user,
)
from lit_dpo.errors import DataError


@dataclass(frozen=True)
class RankedObjects(PreferenceFormat):
    r"""Rows with a prompt and a list of completions as objects, such as NeMo's, Nectar's, UltraFeedback's.

    A completion is text or messages; a prompt is messages, text, or a transcript (`\n\nHuman: …`).

    Args:
        prompt: name of the column that holds the prompt.
        completions: name of the column that holds the list.
        text: where an object holds the completion.
        rank: where it holds the rank, lower is better.
        score: where it holds the score, higher is better; differences travel as `score_margin`. Instead of `rank`,
            which is None then.

    Example:
        >>> from lit_dpo.data.formats import RankedObjects
        >>> row = {"prompt": "2 + 2?", "answers": [{"answer": "5", "rank": 2}, {"answer": "4", "rank": 1}]}
        >>> RankedObjects("prompt", "answers", "answer").read(row).ranks
        [2.0, 1.0]
    """

    prompt: str = "context"
    completions: str = "completions"
    text: str = "completion"
    rank: str | None = "rank"
    score: str | None = None

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            ValueError: if not one of `rank` and `score` is given.
        """
        if (self.rank is None) == (self.score is None):
            raise ValueError(f"Expected one of `rank` and `score` but got {self.rank!r} and {self.score!r}.")

    @property
    def columns(self) -> tuple[str, ...]:
        """The prompt and the list."""
        return self.prompt, self.completions

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Tools."""
        return ("tools",)

    def read(self, row: Mapping[str, Any]) -> Ranking | Skipped:
        """Read the row's cells.

        Raises:
            DataError: for a missing prompt, what is no list of objects, an empty completion, or a number
                that is none.
        """
        found = parsed(row.get(self.completions))
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise DataError(f"Expected a list of objects in `{self.completions}` but got {short(found)}.")
        if len(found) < 2:
            return Skipped("fewer than two completions")
        prompt = self._prompt(row)
        sides = {f"{self.completions}[{n}].{self.text}": self._side(one, n) for n, one in enumerate(found)}
        check_sides(prompt, sides)
        value = self.rank or self.score or ""
        named = [(f"{self.completions}[{place}].{value}", one.get(value)) for place, one in enumerate(found)]
        values = [read_number(name, {name: cell}, *ANY) for name, cell in named]
        ranks, scores = (values, None) if self.score is None else (None, values)
        return Ranking(prompt, list(sides.values()), scores, ranks, template=tools_in("tools", row))

    def _prompt(self, row: Mapping[str, Any]) -> list[Message]:
        if is_turns(row.get(self.prompt)):
            return messages(self.prompt, row[self.prompt])
        text = text_in(self.prompt, row)
        if not HUMAN.match(text):
            return [user(text)]
        turns = transcript(self.prompt, text, HUMAN)
        return turns if turns[-1]["content"] else turns[:-1]  # it ends with `\n\nAssistant: `

    def _side(self, completion: Mapping[str, Any], place: int) -> list[Message]:
        name, cell = f"{self.completions}[{place}].{self.text}", completion.get(self.text)
        if not isinstance(cell, dict | list):
            return [assistant(text_in(name, {name: cell}))]
        found = messages(name, cell)
        check_messages(name, found)
        return found


@dataclass(frozen=True)
class OneRight(PreferenceFormat):
    """Rows with a question and answers by name, one of them right and all others wrong, such as When2Call's.

    Args:
        prompt: name of the column that holds the question, as text or messages.
        answers: name of the column that holds the answers: an object of texts by name.
        right: name of the column that holds the name of the right one.
        tools: name of a column that may hold tools, as a list or as JSON.

    Example:
        >>> from lit_dpo.data.formats import OneRight
        >>> row = {"question": "2 + 2?", "answers": {"a": "5", "b": "4", "c": "fish"}, "correct_answer": "b"}
        >>> OneRight().read(row).comparisons
        [(1, 0), (1, 2)]
    """

    prompt: str = "question"
    answers: str = "answers"
    right: str = "correct_answer"
    tools: str = "tools"

    @property
    def columns(self) -> tuple[str, ...]:
        """The question, the answers, the right one's name."""
        return self.prompt, self.answers, self.right

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Tools."""
        return (self.tools,)

    def read(self, row: Mapping[str, Any]) -> Ranking:
        """Read the row's cells.

        Raises:
            DataError: for a missing question, fewer than two answers, or a right one that is none of them.
        """
        found = parsed(row.get(self.answers))
        given = {name: text for name, text in found.items() if text} if isinstance(found, dict) else {}
        right = row.get(self.right)
        if len(given) < 2 or not isinstance(right, str) or right not in given:
            raise DataError(
                f"Expected an object of two or more answers in `{self.answers}`, one of them {short(right)} (by "
                f"`{self.right}`), but got {short(found)}."
            )
        asked = row.get(self.prompt)
        prompt = messages(self.prompt, asked) if is_turns(asked) else [user(text_in(self.prompt, row))]
        best = list(given).index(right)
        comparisons = [(best, place) for place in range(len(given)) if place != best]
        completions = {f"{self.answers}.{name}": text for name, text in given.items()}
        return Ranking(*answers(prompt, completions), comparisons=comparisons, template=tools_in(self.tools, row))
