"""Text of data and models, shown: in a terminal, in a logger; nothing in it steers, marks up or hides anything."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from lit_dpo.data.formats import Message
from lit_dpo.errors import TrainingError, printable


def shown(text: str, encoding: str) -> Any:
    """Text for a terminal as it is: no markup, nothing that steers the terminal, only what its encoding has."""
    from rich.text import Text

    return Text(printable(text).encode(encoding, "replace").decode(encoding))


def question(prompt: str | list[Message]) -> str:
    """Return the text of a prompt, or what the user said last in a conversation."""
    if isinstance(prompt, str):
        return prompt
    said = [message["content"] for message in prompt if message["role"] == "user"]
    return str(said[-1] if said else prompt[-1].get("content") or "")


def prompts_of_file(path: Path) -> list[Any]:
    """Read prompts: JSON Lines with a `prompt` each, text or a conversation, or else one in each line that has any.

    Raises:
        TrainingError: naming file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"Expected `prompts` to be a file of prompts but {path}: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix not in (".jsonl", ".json"):
        return [line for _, line in numbered]
    return [_prompt_of(path, number, line) for number, line in numbered]


def _prompt_of(path: Path, number: int, line: str) -> Any:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError) as error:
        raise TrainingError(f'Expected {{"prompt": ...}} in line {number} of {path} but got {line[:60]!r}.') from error
    said = isinstance(prompt, list) and prompt and all(isinstance(one, dict) and "role" in one for one in prompt)
    if not (said or (isinstance(prompt, str) and prompt)):
        raise TrainingError(
            f"Expected text, or a list of messages, as `prompt` in line {number} of {path} but got {prompt!r}."
        )
    return prompt


def print_table(title: str, columns: Mapping[str, Sequence[str]], rows: int) -> None:
    """Print the first rows, each as high as its text."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    table = Table(*(Column(name, overflow="fold") for name in columns), title=title, show_lines=True)
    for row in list(zip(*columns.values(), strict=True))[:rows]:
        table.add_row(*(shown(text, console.encoding) for text in row))
    console.print(table)


def print_shares(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Print the share of completions that each label has, before and after."""
    from rich.console import Console

    console = Console()
    for label in sorted({*before, *after}):
        was, now = before.get(label, 0.0), after.get(label, 0.0)
        console.print(shown(f"share of {label} completions: {was:.2f} before, {now:.2f} after", console.encoding))


def log_table(logger: Logger, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
    """Give a table of texts to a logger that takes text; others get nothing.

    Args:
        logger: of Lightning, with `log_text` of its own (Weights & Biases), or whose `experiment` has `add_text`
            (TensorBoard).
        name: under which it is found.
        columns: their names.
        rows: a text for each column.
        step: optimizer steps that were made.
    """
    if callable(log_text := getattr(logger, "log_text", None)):
        log_text(key=name, columns=list(columns), data=[list(row) for row in rows], step=step)
    elif callable(add_text := getattr(getattr(logger, "experiment", None), "add_text", None)):
        add_text(name, markdown_table(columns, rows), step)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown that shows each text as it is.

    Example:
        >>> print(markdown_table(["a"], [["*b*"]]))
        | a |
        |---|
        | &#42;b&#42; |
    """
    lines = [columns, *rows]
    head, *body = ["| " + " | ".join(map(_escaped, line)) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(columns), *body])


def _escaped(text: str) -> str:
    """Text for a cell: each mark that may mean something in Markdown or HTML as a number, each line by itself."""
    plain = printable(text).encode("utf-8", "replace").decode("utf-8").replace("\t", " ")
    return re.sub(r"[^\w\s]", lambda mark: f"&#{ord(mark[0])};", plain).replace("_", "&#95;").replace("\n", "<br>")
