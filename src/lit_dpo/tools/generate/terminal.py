"""What is printed: completions as they come, without what would steer the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from transformers import TextStreamer

from lit_dpo.tools.plain import plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Streamer(TextStreamer):
    """Prints a completion as its tokens come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is sure by now; blanks before the first word are left out."""
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        say(text, end="\n" if stream_end else "")


def say(text: str, end: str = "\n") -> None:
    """Print text of a model or of data."""
    sys.stdout.write(plain(text, sys.stdout.encoding) + end)
    sys.stdout.flush()


def heading(text: str, *, strong: bool = False) -> None:
    """Print what follows: a prompt, or whose completion it is; bold or dim on a terminal."""
    shown: Any = plain(text.strip(), sys.stdout.encoding)
    mark = f"# {shown}" if strong else f"[{shown}]"
    if sys.stdout.isatty():
        mark = f"\x1b[{1 if strong else 2}m{mark}\x1b[0m"
    sys.stdout.write(f"{mark}\n")
    sys.stdout.flush()
