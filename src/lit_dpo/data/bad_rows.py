"""Rows that cannot be used: all of them are found before any is reported, and they are reported together."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from lit_dpo.data.sources.base import cache_root
from lit_dpo.errors import DataError, sentence
from lit_dpo.writing import written_whole

if TYPE_CHECKING:
    from lit_dpo.data.sources import RowSource
    from lit_dpo.data.table import PromptTable

OnBadRow: TypeAlias = Literal["error", "drop"]

_LINES, _EXAMPLES, _WIDTH = 18, 3, 300
# names in back-ticks stay; quoted values and numbers go
_OWN = re.compile(r"(`[^`]*`)|'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\b\d[\d.,]*\b")


def form(reason: str) -> str:
    """Return what is wrong with a row without what is the row's own, so that rows can be counted by it.

    Example:
        >>> form("Expected text in message 3 of `chosen` but got {'role': 'user'}.")
        'Expected text in message … of `chosen`'
    """
    wanted = re.split(r",? but (?:got|it|one) ", reason)[0]
    return _OWN.sub(lambda found: found[1] or "…", wanted).rstrip(".")


def check_bad_rows(split: str, table: PromptTable, on_bad_row: OnBadRow) -> str | None:
    """See that the rows of a split can be used, or say which are left out.

    Returns:
        What there is to be said, with the name of a file of all bad rows; None if there are none.

    Raises:
        DataError: with that, if bad rows are errors, or a file has no others.
    """
    bad = table.bad
    if not bad:
        return None
    file, lost = _written(table, bad), _all_bad(table, bad)
    if len(bad) == 1 and not lost:
        said, what = _quoted(table, *bad[0]), "leaves it out. It is in"
    else:
        said = "\n".join([f"{split}: {len(bad)} of {_total(table)} rows cannot be used:", *_by_form(table, bad)])
        what = "leaves them out. All are in"
    if lost:
        raise DataError(f"{said}\nNo row of {lost} can be used. All are in {file}")
    if on_bad_row == "error":
        raise DataError(f"{said}\n`--data.on_bad_row drop` {what} {file}")
    return f"{said}\n`on_bad_row=drop` {what} {file}"


def _total(table: PromptTable) -> int:
    return sum(len(source.rows) for source in table.sources)


def _quoted(table: PromptTable, row: int, reason: str) -> str:
    return f"{table.place(row)}: {sentence(_cut(reason))}"


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"


def _by_form(table: PromptTable, bad: Sequence[tuple[int, str]]) -> list[str]:
    """Quote the first rows of each kind, the most frequent kind first; fewer of them if there are many kinds."""
    found = defaultdict[str, list[tuple[int, str]]](list)
    for row, reason in bad:
        found[form(reason)].append((row, reason))
    ordered = sorted(found.items(), key=lambda one: -len(one[1]))
    lines = list[str]()
    for most in (_EXAMPLES, 1):
        parts = [_kind(table, kind, rows, most) for kind, rows in ordered[: _LINES + 1]]
        if sum(map(len, parts)) <= _LINES:
            return [line for part in parts for line in part]
    shown = 0
    while len(lines) + len(parts[shown]) < _LINES:
        lines += parts[shown]
        shown += 1
    rest = ordered[shown:]
    return [*lines, f"  {sum(len(rows) for _, rows in rest)}: {len(rest)} other reasons"]


def _kind(table: PromptTable, kind: str, rows: Sequence[tuple[int, str]], most: int) -> list[str]:
    if len(rows) == 1:
        return [f"  1: {_quoted(table, *rows[0])}"]
    return [f"  {len(rows)}: {_cut(kind)}", *(f"    {_quoted(table, *one)}" for one in rows[:most])]


def _by_source(table: PromptTable, bad: Sequence[tuple[int, str]]) -> Iterator[tuple[RowSource, list[int], list[str]]]:
    """Return the sources that have bad rows, the numbers of these in them, and what is wrong with each."""
    found = defaultdict[int, list[tuple[int, str]]](list)
    for row, reason in bad:
        number, inside = table.find(row)
        found[number].append((inside, reason))
    for number, rows in found.items():
        yield table.sources[number], [inside for inside, _ in rows], [reason for _, reason in rows]


def _all_bad(table: PromptTable, bad: Sequence[tuple[int, str]]) -> str | None:
    """Name the first file that has bad rows only."""
    return next((source.name for source, rows, _ in _by_source(table, bad) if len(rows) == len(source.rows)), None)


def _written(table: PromptTable, bad: Sequence[tuple[int, str]]) -> Path:
    """Write all bad rows to a file, which has the same name in every run."""
    key = [[[source.name, source.content] for source in table.sources], bad]
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()
    path = cache_root() / "bad_rows" / f"{digest}.jsonl"
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for source, rows, reasons in _by_source(table, bad):
            for row, reason, (line, raw) in zip(rows, reasons, source.rows.found(rows), strict=True):
                said = {"file": source.name, "row": source.number(row), "line": line, "reason": reason, "raw": raw}
                file.write(json.dumps(said, ensure_ascii=False, default=str) + "\n")
    return path
