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
from lit_dpo.errors import DataError
from lit_dpo.writing import written_whole

if TYPE_CHECKING:
    from lit_dpo.data.table import PromptTable

OnBadRow: TypeAlias = Literal["error", "drop"]

_KINDS, _EXAMPLES, _WIDTH = 8, 3, 200
_MANY = 4  # kinds, from which on each has one example: a report is 20 lines at most
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
    file = _written(table, bad)
    lost = _all_bad(table, bad)
    if len(bad) == 1 and not lost:
        said = f"{_place(table, *bad[0])}"
    else:
        said = "\n".join([f"{split}: {len(bad)} of {_total(table)} rows cannot be used:", *_by_form(table, bad)])
    if lost:
        raise DataError(f"{said}\nNo row of {lost} can be used. All of them: {file}")
    if on_bad_row == "error":
        raise DataError(f"{said}\n`--data.on_bad_row drop` leaves them out. All of them: {file}")
    return f"{said}\nLeft out (on_bad_row=drop). All of them: {file}"


def _total(table: PromptTable) -> int:
    return sum(len(source.rows) for source in table.sources)


def _place(table: PromptTable, row: int, reason: str) -> str:
    return _cut(f"{table.place(row)}: {reason}") + ("" if reason.endswith((".", "!", "?", "…")) else ".")


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 2 * _WIDTH else line[: 2 * _WIDTH - 1] + "…"


def _by_form(table: PromptTable, bad: Sequence[tuple[int, str]]) -> Iterator[str]:
    """Quote the first rows of each kind, the most frequent kind first."""
    found = defaultdict[str, list[tuple[int, str]]](list)
    for row, reason in bad:
        found[form(reason)].append((row, reason))
    ordered = sorted(found.items(), key=lambda one: -len(one[1]))
    examples = _EXAMPLES if len(ordered) <= _MANY else 1
    for kind, rows in ordered[:_KINDS]:
        yield f"  {len(rows)}: {_cut(kind)}"
        yield from (f"    {_place(table, *one)}" for one in rows[:examples])
    if rest := ordered[_KINDS:]:
        yield f"  {sum(len(rows) for _, rows in rest)}: {len(rest)} other reasons"


def _all_bad(table: PromptTable, bad: Sequence[tuple[int, str]]) -> str | None:
    """Name the first file that has bad rows only."""
    counts = [0] * len(table.sources)
    for row, _ in bad:
        counts[table.find(row)[0]] += 1
    found = zip(table.sources, counts, strict=True)
    return next((source.name for source, count in found if count and count == len(source.rows)), None)


def _written(table: PromptTable, bad: Sequence[tuple[int, str]]) -> Path:
    """Write all bad rows to a file, if it is not there, which is named by what it says."""
    lines = [[table.place(row), reason] for row, reason in bad]
    key = hashlib.blake2b(json.dumps(lines).encode(), digest_size=8).hexdigest()
    path = cache_root() / "bad_rows" / f"{key}.jsonl"
    if not path.is_file():
        with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for row, reason in bad:
                number, inside = table.find(row)
                source = table.sources[number]
                where = {"file": source.name, "row": source.number(inside), "line": source.rows.line(inside)}
                said = {**where, "reason": reason, "raw": source.rows.raw(inside)}
                file.write(json.dumps(said, ensure_ascii=False, default=str) + "\n")
    return path
