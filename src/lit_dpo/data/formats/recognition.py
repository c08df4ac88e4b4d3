"""Which layout a file has, by its columns and by what its first rows hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lit_dpo.data.formats.base import Message, Preference, PreferenceFormat, Ranking, Skipped
from lit_dpo.data.formats.cells import short
from lit_dpo.data.formats.conversations import OpenAIPreferences, ShareGPT
from lit_dpo.data.formats.implicit import ImplicitPrompt, Transcripts
from lit_dpo.data.formats.judged import SHP, SafeRLHF, SignedPairs, SummaryComparisons, WebGPT
from lit_dpo.data.formats.labelled import Arena, ArenaColumns, LabelledPairs
from lit_dpo.data.formats.questions import Alpaca, AlpacaOutputs, Orca, StackExchange
from lit_dpo.data.formats.ranked import OneRight, RankedObjects
from lit_dpo.data.formats.rankings import Rankings
from lit_dpo.data.formats.trees import Trees
from lit_dpo.data.formats.triples import Triples
from lit_dpo.data.formats.turns import is_turns
from lit_dpo.errors import DataError

LAYOUTS: tuple[PreferenceFormat, ...] = (
    Triples(),
    Triples("request"),
    Triples("question"),
    Triples("query"),
    ImplicitPrompt(),
    ImplicitPrompt("chosen_messages", "rejected_messages"),
    Transcripts(),
    ShareGPT(),
    ShareGPT("messages"),
    ShareGPT("messages", "chosen_response", "rejected_response"),
    OpenAIPreferences(),
    Alpaca(),
    AlpacaOutputs(),
    Orca(),
    Orca("prompt"),
    Orca("input"),
    StackExchange(),
    SHP(),
    SafeRLHF(),
    SignedPairs(),
    SignedPairs("context", "response1", "response2", "overall_preference"),
    WebGPT(),
    SummaryComparisons(),
    Arena(),
    ArenaColumns(),
    LabelledPairs(),
    LabelledPairs("prompt"),
    LabelledPairs("prompt", "response_a", "response_b", "winner"),
    Rankings(),
    Rankings(scores=None, ranks="ranks"),
    RankedObjects(),
    RankedObjects("prompt", "answers", "answer"),
    RankedObjects("instruction", "completions", "response", rank=None, score="overall_score"),
    RankedObjects("question", "answers", "text", rank=None, score="pm_score"),
    OneRight(),
    Trees(),
)
"""The layouts that are recognised, each a format with its options."""

HEAD = 100
"""Rows of a file that are looked at."""

_OF_THE_PROMPT = ("system", "tools", "history", "images", "image", "videos", "audios")


@dataclass(frozen=True)
class Auto(Triples):
    """The layout that is recognised by the columns and the first rows of a file; with options, `Triples` with these.

    Args:
        prompt: as in `Triples`.
        chosen: as in `Triples`.
        rejected: as in `Triples`.
        weight: as in `Triples`.
        score_margin: as in `Triples`.
        probability: as in `Triples`.
        numeric_columns: as in `Triples`.

    Example:
        >>> from lit_dpo.data.formats import Auto
        >>> Auto().of("a.jsonl", [{"question": "2 + 2?", "response_j": "4", "response_k": "5"}])
        StackExchange(question='question', chosen='response_j', rejected='response_k')
        >>> Auto(prompt="request").of("a.jsonl", []).columns
        ('request', 'chosen', 'rejected')
    """

    def of(self, name: str, rows: Sequence[Mapping[str, Any]]) -> PreferenceFormat:
        """Return the format that reads a file with these first rows.

        Raises:
            DataError: see `recognise`.
        """
        if self != Auto():
            return Triples(*(getattr(self, one.name) for one in fields(Triples)))
        return recognise(name, rows)


def recognise(
    name: str, rows: Sequence[Mapping[str, Any]], layouts: Sequence[PreferenceFormat] = LAYOUTS
) -> PreferenceFormat:
    """Find the one layout that rows have; of two that fit, one that reads all that the other does, and more.

    Args:
        name: of the file, for errors.
        rows: the first ones, with all columns.
        layouts: to choose from.

    Raises:
        DataError: if none fits, with what was seen and the nearest layouts; if two do, with how to name one; if the
            file has something of the prompt that the layout does not read.
    """
    there = set().union(*rows)
    found = [one for one in layouts if {*one.columns} <= there and one.fits(rows)]
    read = [{*one.columns, *one.optional_columns} & there for one in found]
    found = [one for one, own in zip(found, read, strict=True) if not any(own < other for other in read)]
    if not found:
        raise DataError(_none_fits(name, rows, layouts))
    if len(found) > 1:
        named = " or ".join(f"`{option(one)}`" for one in found)
        raise DataError(f"{name}: the rows fit {len(found)} layouts: name the one that is meant with {named}.")
    (format,) = found
    for column in sorted(there.difference(format.columns, format.optional_columns).intersection(_OF_THE_PROMPT)):
        if any(row.get(column) for row in rows):
            raise DataError(
                f"{name}: the rows fit `{type(format).__name__}`, which does not read `{column}`, and this looks like "
                f"a part of the prompt. Leave it out with `{option(format)}`, or read it with a format of your own."
            )
    return format


def option(format: PreferenceFormat) -> str:
    """Write a format as on a command line, with the options that are not its defaults."""
    name = type(format).__name__
    own = [(one.name, getattr(format, one.name), one.default) for one in fields(format)]
    given = [
        f" --data.format.{key} {'null' if value is None else value}"
        for key, value, default in own
        if value != default and not (isinstance(value, list | dict) and not value)
    ]
    return f"--data.format {name}" + "".join(given)


def choice(format: PreferenceFormat, rows: Sequence[Mapping[str, Any]]) -> str:
    """Say in a line which layout was recognised, with an example and the columns that it does not read."""
    there = list(dict.fromkeys(column for row in rows for column in row))
    unread = [column for column in there if column not in (*format.columns, *format.optional_columns)]
    left = f"; not read: {_quoted(unread)}" if unread else ""
    example = next((shown for row in rows if (shown := _shown(format, row))), "")
    return f"read by `{option(format)}`{left}. {example}"


def _shown(format: PreferenceFormat, row: Mapping[str, Any]) -> str:
    try:
        found = next((one for one in map(format.read, format.examples(row)) if not isinstance(one, Skipped)), None)
    except DataError:
        return ""
    if found is None:
        return ""
    if isinstance(found, Preference):
        return f"Prompt {_said(found.prompt)}, chosen {_said(found.chosen)}, rejected {_said(found.rejected)}"
    return f"Prompt {_said(found.prompt)}, completions {', '.join(map(_said, found.completions))}{_worth(found)}"


def _worth(found: Ranking) -> str:
    return next(
        f", {name} {list(values)}"
        for name in ("scores", "ranks", "comparisons")
        if (values := getattr(found, name)) is not None
    )


def _said(part: str | Sequence[Message]) -> str:
    """Quote the end of a prompt, or the beginning of a completion."""
    return short(part if isinstance(part, str) else part[-1]["content"], 60)


def _none_fits(name: str, rows: Sequence[Mapping[str, Any]], layouts: Sequence[PreferenceFormat]) -> str:
    first: Mapping[str, Any] = rows[0] if rows else {}
    seen = ", ".join(f"`{column}` ({_kind(cell)})" for column, cell in first.items())
    nearest = sorted(layouts, key=lambda one: (len({*one.columns} - {*first}), -len(one.columns)))[:2]
    tries = " ".join(_why_not(one, rows) for one in nearest)
    return (
        f"{name}: no known layout fits. It has {seen}. The nearest ones: {tries} Name other columns with "
        "`--data.format.prompt`, `.chosen` and `.rejected`, or write a format (docs/extending.md)."
    )


def _why_not(format: PreferenceFormat, rows: Sequence[Mapping[str, Any]]) -> str:
    title = f"`{option(format)}`"
    if missing := [column for column in format.columns if not any(column in row for row in rows)]:
        return f"{title}: {_quoted(missing)} is missing."
    for number, row in enumerate(rows):
        try:
            list(map(format.read, format.examples(row)))
        except DataError as error:
            return f"{title}: row {number} (from 0): {error}"
    return f"{title}: nothing says which answer is better."


def _kind(cell: Any) -> str:
    if is_turns(cell):
        return "messages" if isinstance(cell, list | dict) else "messages as a string"
    kinds = {str: "text", list: "list", dict: "object", bool: "true or false", type(None): "null"}
    return kinds.get(type(cell), type(cell).__name__)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
