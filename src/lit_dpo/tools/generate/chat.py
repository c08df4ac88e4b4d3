"""`--chat`: a conversation, in which each turn sees all earlier ones."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lit_dpo.data.formats import Message
from lit_dpo.errors import DataError
from lit_dpo.tools.generate.completing import Completer
from lit_dpo.tools.generate.prompts import Prompt, encode
from lit_dpo.tools.generate.terminal import Streamer, heading, say

_HELP = "/reset begins a new conversation, /exit or Ctrl-D ends; Ctrl-C stops a completion"


def chat(model: Completer, first: list[Message], template: Mapping[str, Any], *, compare: bool) -> None:
    """Read what is said line by line, from a terminal or a pipe, and complete it.

    Args:
        model: completes.
        first: messages that every conversation begins with.
        template: arguments of the chat template.
        compare: the reference completes, too, what the policy was asked; the conversation goes on with the policy's.
    """
    talks = sys.stdin.isatty()
    if talks:
        with suppress(ImportError):  # lines can be edited then; there is none on Windows
            import readline  # noqa: F401
        say(_HELP)
    said = list(first)
    while True:
        try:
            line = input("> " if talks else "").strip()
        except (EOFError, KeyboardInterrupt):
            if talks:
                say("")
            return
        if line == "/exit":
            return
        if line == "/reset":
            said = list(first)
        elif line.startswith("/"):
            say(f"{line.split()[0]} is no command: {_HELP}")
        elif line:
            said = _turn(model, said, line, template, compare)


def _turn(
    model: Completer, said: list[Message], line: str, template: Mapping[str, Any], compare: bool
) -> list[Message]:
    """Complete one turn; the conversation as it is then, or as it was where it cannot go on."""
    asked: list[Message] = [*said, {"role": "user", "content": line}]
    try:
        ids = encode(model.tokenizer, Prompt(asked), template)
        model.check(ids, "the conversation")
    except DataError as error:
        say(f"{error} /reset begins a new one.")
        return said
    found = None
    for side in ("policy", "reference")[: 1 + compare]:
        if compare:
            heading(side)
        with model.side(side):
            try:
                (completion,) = model.complete([ids], Streamer(model.tokenizer))
            except KeyboardInterrupt:
                say("\n(stopped; the conversation is as it was)")
                return said
        found = completion if found is None else found
    return [*asked, {"role": "assistant", "content": str(found).strip()}]
