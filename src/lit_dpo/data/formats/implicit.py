"""Two whole conversations; the prompt is what they share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_dpo.data.formats.base import Message, Preference, PreferenceFormat, Skipped
from lit_dpo.data.formats.cells import is_written_conversation
from lit_dpo.data.formats.turns import (
    apart,
    check_sides,
    messages,
    said,
    system_turn,
    text_in,
    tools_in,
    transcript,
    user,
)
from lit_dpo.errors import DataError


@dataclass(frozen=True)
class ImplicitPrompt(PreferenceFormat):
    """Rows with two whole conversations, such as UltraFeedback-binarized, Tülu 3, Skywork, Capybara, torchtune's.

    The prompt is their longest common beginning in messages; where they part before the last turn, each goes on by
    itself. A prompt column too, text or messages, has to be part of it; if the sides are only the answers, it
    is the prompt.

    Args:
        chosen: name of the column that holds the preferred conversation.
        rejected: name of the column that holds the other one.
        prompt: name of a column that may repeat the prompt.
        system: name of a column that may hold the system's message.
        tools: name of a column that may hold tools, as a list or as JSON.

    Example:
        >>> from lit_dpo.data.formats import ImplicitPrompt
        >>> ask = {"role": "user", "content": "2 + 2?"}
        >>> row = {name: [ask, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
        >>> ImplicitPrompt().read(row).prompt
        [{'role': 'user', 'content': '2 + 2?'}]
    """

    chosen: str = "chosen"
    rejected: str = "rejected"
    prompt: str = "prompt"
    system: str = "system"
    tools: str = "tools"

    @property
    def columns(self) -> tuple[str, ...]:
        """The two conversations."""
        return self.chosen, self.rejected

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """What a file may have too."""
        return self.prompt, self.system, self.tools

    def read(self, row: Mapping[str, Any]) -> Preference:
        """Read the row's cells.

        Raises:
            DataError: for a side that is no conversation, or has not the prompt column's; sides that share nothing.
        """
        sides = {name: messages(name, row.get(name)) for name in (self.chosen, self.rejected)}
        shared, chosen, rejected = apart(*sides.values())
        prompt = system_turn(self.system, row) + self._checked(row, shared)
        if len(prompt) > 1 and prompt[0] == prompt[1]:  # the column repeats it
            prompt = prompt[1:]
        check_sides(prompt, {self.chosen: chosen, self.rejected: rejected})
        return Preference(prompt, chosen, rejected, template=tools_in(self.tools, row))

    def _checked(self, row: Mapping[str, Any], shared: list[Message]) -> list[Message]:
        """Return the prompt, after a look at its own column."""
        given = row.get(self.prompt)
        if (isinstance(given, list) and given) or is_written_conversation(given):
            given = messages(self.prompt, given)
            if shared[: len(given)] != given:
                raise DataError(f"Expected `{self.chosen}` and `{self.rejected}` to begin with `{self.prompt}`.")
            return shared
        text = said(self.prompt, row).strip()
        if not any(message["role"] == "user" for message in shared):
            return [*shared, user(text)] if text else shared
        told = [message["content"].strip() for message in shared if message["role"] == "user"]
        if text and not any(text in one or one in text for one in told):
            raise DataError(f"Expected `{self.prompt}` to be in what `{self.chosen}` and `{self.rejected}` share.")
        return shared


HUMAN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Transcripts(PreferenceFormat):
    r"""Rows with two whole transcripts, `\n\nHuman: …\n\nAssistant: …`, such as Anthropic's HH-RLHF.

    The prompt is the turns that they share; where they part before the last turn, each goes on by itself. A row in
    which the assistant ends with nothing is left out and counted.

    Args:
        chosen: name of the column that holds the preferred transcript.
        rejected: name of the column that holds the other one.

    Example:
        >>> from lit_dpo.data.formats import Transcripts
        >>> start = "\n\nHuman: Hello\n\nAssistant: "
        >>> Transcripts().read({"chosen": start + "Hello!", "rejected": start + "What?"}).chosen
        [{'role': 'assistant', 'content': 'Hello!'}]
    """

    chosen: str = "chosen"
    rejected: str = "rejected"

    @property
    def columns(self) -> tuple[str, ...]:
        """The two transcripts."""
        return self.chosen, self.rejected

    def read(self, row: Mapping[str, Any]) -> Preference | Skipped:
        """Read the row's cells.

        Raises:
            DataError: for a cell that is no transcript, or does not end with the assistant.
        """
        sides = {name: transcript(name, text_in(name, row), HUMAN) for name in self.columns}
        shared, chosen, rejected = apart(*sides.values())
        check_sides(shared, {self.chosen: chosen, self.rejected: rejected})
        if not (chosen[-1]["content"] and rejected[-1]["content"]):
            return Skipped("a completion is empty")
        return Preference(shared, chosen, rejected)
