"""Where in the configuration files of a command line a key or a value stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_dpo.aliases import repeats_endlessly


def file_with(
    name: str, typed: Sequence[str], of: Callable[[Any], Iterator[str]] | None = None
) -> tuple[str, str] | None:
    """Find the file of the command line, or one that it names, that has a key or a value; and where in it."""
    for path in files_of(typed):
        for key in (of or dotted)(_content(path)):
            if key == name or key.rpartition(".")[2] == name:
                return str(path), key
    return None


def files_of(typed: Sequence[str]) -> Iterator[Path]:
    """List the files of a command line, and those that they name."""
    words = [part for one in typed for part in one.split("=", 1)]
    todo = [Path(one) for one in words if one.endswith((".yaml", ".yml")) and Path(one).is_file()]
    while todo:
        path = todo.pop(0)
        yield path
        values = [one for one in dotted_values(_content(path)) if one.endswith((".yaml", ".yml"))]
        todo += [path.parent / one for one in values if (path.parent / one).is_file()]


def files_without_end(typed: Sequence[str]) -> Iterator[Path]:
    """List those of a command line whose aliases repeat one another, so that no walk through them ends."""
    for path in files_of(typed):
        try:
            if repeats_endlessly(path.read_text(encoding="utf-8")):
                yield path
        except (OSError, ValueError):
            pass  # whoever reads it for its values says what is wrong


def _content(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return None if repeats_endlessly(text) else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def dotted(content: Any, before: str = "") -> Iterator[str]:
    """Name the keys of what a file holds, each with those above it."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield f"{before}{key}"
            yield from dotted(value, f"{before}{key}.")
    elif isinstance(content, list):
        for value in content:
            yield from dotted(value, before)


def dotted_values(content: Any) -> Iterator[str]:
    """List the texts among the values of what a file holds."""
    if isinstance(content, str):
        yield content
    for one in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from dotted_values(one)
