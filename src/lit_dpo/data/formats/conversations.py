"""A conversation, and two ways in which the assistant goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_dpo.data.formats.base import Message, Preference, PreferenceFormat
from lit_dpo.data.formats.cells import check_messages, check_text, short
from lit_dpo.data.formats.turns import assistant, check_sides, is_turns, messages, system_turn, tools_in
from lit_dpo.errors import DataError


@dataclass(frozen=True)
class ShareGPT(PreferenceFormat):
    """Rows with a conversation and two answers, such as LLaMA-Factory's `ranking` sets, MedicalGPT's, When2Call's.

    Messages are `{"from": "human", "value": …}` or `{"role": "user", "content": …}`; an answer is a message, a list of
    messages, or text.

    Args:
        conversations: name of the column that holds the conversation.
        chosen: name of the column that holds the preferred answer.
        rejected: name of the column that holds the other one.
        system: name of a column that may hold the system's message.
        tools: name of a column that may hold tools, as a list or as JSON.

    Example:
        >>> from lit_dpo.data.formats import ShareGPT
        >>> row = {"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": "4", "rejected": "5"}
        >>> ShareGPT().read(row)[:2]
        ([{'role': 'user', 'content': '2 + 2?'}], [{'role': 'assistant', 'content': '4'}])
    """

    conversations: str = "conversations"
    chosen: str = "chosen"
    rejected: str = "rejected"
    system: str = "system"
    tools: str = "tools"

    @property
    def columns(self) -> tuple[str, ...]:
        """The conversation and the answers."""
        return self.conversations, self.chosen, self.rejected

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """What a file may have too."""
        return self.system, self.tools

    def read(self, row: Mapping[str, Any]) -> Preference:
        """Read the row's cells.

        Raises:
            DataError: for a missing cell, an unknown role, an answer with a user's turn or without any text.
        """
        prompt = system_turn(self.system, row) + messages(self.conversations, row.get(self.conversations))
        sides = {name: self._side(name, row.get(name)) for name in (self.chosen, self.rejected)}
        check_sides(prompt, sides)
        chosen, rejected = sides.values()
        return Preference(prompt, chosen, rejected, template=tools_in(self.tools, row))

    def _side(self, name: str, cell: Any) -> list[Message]:
        if isinstance(cell, dict | list) or is_turns(cell):
            found = messages(name, cell)
            check_messages(name, found)
            return found
        if not isinstance(cell, str):
            raise DataError(f"Expected an answer in `{name}` but got {short(cell)}.")
        check_text(name, cell)
        return [assistant(cell)]


@dataclass(frozen=True)
class OpenAIPreferences(PreferenceFormat):
    """Rows as OpenAI's preference fine-tuning takes them: `input` with messages and tools, and two outputs.

    Example:
        >>> from lit_dpo.data.formats import OpenAIPreferences
        >>> row = {"input": {"messages": [{"role": "user", "content": "2 + 2?"}]}}
        >>> row |= {name: [{"role": "assistant", "content": "4"}] for name in OpenAIPreferences().columns[1:]}
        >>> OpenAIPreferences().read(row).chosen
        [{'role': 'assistant', 'content': '4'}]
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of this layout."""
        return "input", "preferred_output", "non_preferred_output"

    def read(self, row: Mapping[str, Any]) -> Preference:
        """Read the row's cells.

        Raises:
            DataError: for a missing cell, and for messages what `ShareGPT` refuses.
        """
        given = row.get("input")
        if not isinstance(given, dict):
            raise DataError(f"Expected an object with `messages` in `input` but got {short(given)}.")
        names = ("preferred_output", "non_preferred_output")
        return ShareGPT("messages", *names).read(given | {name: row.get(name) for name in names})
