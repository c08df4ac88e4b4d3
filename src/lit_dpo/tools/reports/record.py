"""What is reported, and its JSON."""

from __future__ import annotations

import json
import unicodedata
from typing import Any, NamedTuple

from lit_dpo import __version__
from lit_dpo.data.doctor import Examined, Finding
from lit_dpo.data.doctor.findings import Example
from lit_dpo.data.doctor.texts import shortened


class Inspected(NamedTuple):
    """What `lit-dpo inspect` reports.

    Attributes:
        data: where the training data are from.
        tokenizer: what lengths are counted in.
        notes: what is otherwise than in a run, and what was not looked for.
        examined: what was found.
        steps: optimizer steps of the configured run and its epochs, on one device; None if it has no end.
        plan: memory and hours, in words; empty if nobody asked.
    """

    data: str
    tokenizer: str
    notes: list[str]
    examined: Examined
    steps: tuple[int, float] | None = None
    plan: str = ""


def as_json(given: Inspected) -> str:
    """Write all of it as JSON, with other names for nothing."""
    examined = given.examined
    tokens = examined.tokens
    record: dict[str, Any] = {
        "lit_dpo": __version__,
        "data": given.data,
        "tokenizer": given.tokenizer,
        "notes": given.notes,
        "splits": [one._asdict() for one in examined.splits],
        "columns": examined.columns,
        "lengths": examined.lengths.percentiles,
        "tokens": {**tokens._asdict(), "saved": saved(tokens.row, tokens.pairs)},
        "completions_per_prompt": examined.completions_per_prompt,
        "steps": given.steps and given.steps[0],
        "epochs": given.steps and given.steps[1],
        "plan": given.plan or None,
        "findings": [_finding(one) for one in examined.findings],
        "shortcuts": [one._asdict() for one in examined.shortcuts],
        "frequent_completions": [one._asdict() for one in examined.frequent],
        "examples": [
            {**one._asdict(), "completions": [list(part) for part in one.completions]} for one in examined.examples
        ],
    }
    return json.dumps(record, indent=2, ensure_ascii=True) + "\n"


def _finding(one: Finding) -> dict[str, Any]:
    return {
        "name": one.kind.name,
        "above": one.above,
        "what": one.kind.what,
        "count": one.counted,
        "of": one.of,
        "share": one.share,
        "compared": one.low,
        "threshold": one.kind.threshold,
        "detail": one.detail,
        "remedy": one.kind.remedy,
        "examples": [example._asdict() for example in one.examples],
    }


def saved(fewer: int, more: int) -> float:
    """Return the part of the tokens that is not computed.

    Example:
        >>> saved(75, 100)
        0.25
    """
    return 1 - fewer / more if more else 0.0


def visible(text: str) -> str:
    r"""Write characters that steer a terminal, or turn text around, as what they are; lines and tabs stay.

    Example:
        >>> print(visible("red: \x1b[31m, nothing: \x00, backwards: \u202e"))
        red: \x1b[31m, nothing: \x00, backwards: \u202e
    """
    return "".join(one if one in "\n\t" or one.isprintable() or one == "\u3000" else _escaped(one) for one in text)


def _escaped(one: str) -> str:
    if unicodedata.category(one) in ("Zs", "Cf") and not 0x200E <= ord(one) <= 0x206F:
        return one  # a space, or what joins letters of some scripts
    return one.encode("unicode_escape", "surrogatepass").decode("ascii")


def excerpt(text: str, most: int = 700) -> str:
    """Return the beginning and the end of a text.

    Example:
        >>> excerpt("one two three", 8)
        'one tw […] ee'
    """
    return text if len(text) <= most else f"{text[: most * 3 // 4]} […] {text[-(most // 4) :]}"


def noted(one: Example) -> str:
    """Write the note of a row."""
    return f"{one.note} {file_name(one.other)}" if one.other else one.note


def file_name(place: str) -> str:
    """Leave out the folders of a place; what is no file stays.

    Example:
        >>> file_name("/data/pairs.jsonl, row 3 (from 0)")
        'pairs.jsonl, row 3 (from 0)'
    """
    return place.rpartition("/")[2] if place.startswith(("/", ".", "~")) else place


__all__ = ["Inspected", "as_json", "excerpt", "file_name", "noted", "saved", "shortened", "visible"]
