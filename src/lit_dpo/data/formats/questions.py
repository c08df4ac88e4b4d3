"""A question in some columns of text, and two answers of which it is said by their names which one is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_dpo.data.formats.base import Message, Preference, PreferenceFormat, Ranking
from lit_dpo.data.formats.cells import parsed, short
from lit_dpo.data.formats.turns import answers, assistant, pair, said, system_turn, text_in, user
from lit_dpo.errors import DataError


@dataclass(frozen=True)
class Alpaca(PreferenceFormat):
    r"""Rows with an `instruction` and, where there is one, its `input`: LLaMA-Factory's Alpaca sets, rasbt's.

    Instruction and input are one message of the user's, with a newline between them; `system` and `history` (a list of
    questions with their answers) stand before it.

    Args:
        instruction: name of the column that holds what was asked.
        chosen: name of the column that holds the preferred answer.
        rejected: name of the column that holds the other one.

    Example:
        >>> from lit_dpo.data.formats import Alpaca
        >>> row = {"instruction": "Add.", "input": "2, 2", "chosen": "4", "rejected": "5"}
        >>> Alpaca().read(row).prompt
        [{'role': 'user', 'content': 'Add.\n2, 2'}]
    """

    instruction: str = "instruction"
    chosen: str = "chosen"
    rejected: str = "rejected"

    @property
    def columns(self) -> tuple[str, ...]:
        """The instruction and the answers."""
        return self.instruction, self.chosen, self.rejected

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """What else belongs to the prompt."""
        return "input", "history", "system"

    def read(self, row: Mapping[str, Any]) -> Preference:
        """Read the row's cells.

        Raises:
            DataError: for a missing or empty instruction or answer, or a history that is none.
        """
        return pair(instructed(self.instruction, row), {name: row.get(name) for name in (self.chosen, self.rejected)})


@dataclass(frozen=True)
class AlpacaOutputs(PreferenceFormat):
    """Rows as in `Alpaca` whose `output` is a list of two or more answers, the best one first.

    Example:
        >>> from lit_dpo.data.formats import AlpacaOutputs
        >>> AlpacaOutputs().read({"instruction": "2 + 2?", "output": ["4", "5", "fish"]}).ranks
        [1.0, 2.0, 3.0]
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """The instruction and the answers."""
        return "instruction", "output"

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """What else belongs to the prompt."""
        return "input", "history", "system"

    def read(self, row: Mapping[str, Any]) -> Ranking:
        """Read the row's cells.

        Raises:
            DataError: for a missing or empty instruction, or an `output` that is no list of texts.
        """
        found = parsed(row.get("output"))
        if not isinstance(found, list):
            raise DataError(f"Expected a list of answers, the best one first, in `output` but got {short(found)}.")
        completions = {f"output[{place}]": one for place, one in enumerate(found)}
        ranks = [float(rank) for rank in range(1, len(found) + 1)]
        return Ranking(*answers(instructed("instruction", row), completions), ranks=ranks)


def instructed(instruction: str, row: Mapping[str, Any]) -> list[Message]:
    """Return an instruction with its input, after what was said before."""
    asked = "\n".join(filter(None, (text_in(instruction, row), said("input", row))))
    return [*system_turn("system", row), *_history(row), user(asked)]


def _history(row: Mapping[str, Any]) -> list[Message]:
    found = parsed(row.get("history")) or []
    if not isinstance(found, list) or not all(isinstance(one, list | tuple) and len(one) == 2 for one in found):
        raise DataError(f"Expected a list of questions with their answers in `history` but got {short(found)}.")
    return [turn for asked, answer in found for turn in (user(str(asked)), assistant(str(answer)))]


@dataclass(frozen=True)
class Orca(PreferenceFormat):
    """Rows with a `system` message, a `question` and two answers, such as Intel's Orca DPO pairs.

    Args:
        question: name of the column that holds what was asked.
        system: name of the column that holds the system's message, which may be empty in some rows.
        chosen: name of the column that holds the preferred answer.
        rejected: name of the column that holds the other one.

    Example:
        >>> from lit_dpo.data.formats import Orca
        >>> row = {"system": "Be brief.", "question": "2 + 2?", "chosen": "4", "rejected": "The sum is 5."}
        >>> [message["role"] for message in Orca().read(row).prompt]
        ['system', 'user']
    """

    question: str = "question"
    system: str = "system"
    chosen: str = "chosen"
    rejected: str = "rejected"

    @property
    def columns(self) -> tuple[str, ...]:
        """The four columns."""
        return self.system, self.question, self.chosen, self.rejected

    def read(self, row: Mapping[str, Any]) -> Preference:
        """Read the row's cells.

        Raises:
            DataError: for a missing or empty question or answer.
        """
        prompt = [*system_turn(self.system, row), user(text_in(self.question, row))]
        return pair(prompt, {name: row.get(name) for name in (self.chosen, self.rejected)})


@dataclass(frozen=True)
class StackExchange(PreferenceFormat):
    """Rows with a question, a better and a worse answer (`response_j`, `response_k`), as StackLLaMA pairs them.

    Args:
        question: name of the column that holds what was asked.
        chosen: name of the column that holds the answer with more votes.
        rejected: name of the column that holds the other one.

    Example:
        >>> from lit_dpo.data.formats import StackExchange
        >>> StackExchange().read({"question": "2 + 2?", "response_j": "4", "response_k": "5"}).rejected
        [{'role': 'assistant', 'content': '5'}]
    """

    question: str = "question"
    chosen: str = "response_j"
    rejected: str = "response_k"

    @property
    def columns(self) -> tuple[str, ...]:
        """The three columns."""
        return self.question, self.chosen, self.rejected

    def read(self, row: Mapping[str, Any]) -> Preference:
        """Read the row's cells.

        Raises:
            DataError: for a missing or empty question or answer.
        """
        prompt = [user(text_in(self.question, row))]
        return pair(prompt, {name: row.get(name) for name in (self.chosen, self.rejected)})
