"""Rows of `.csv` and `.tsv` files. Every cell is text: a completion may be `None`, `NA` or `42`."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from lit_dpo.data.sources.columns import is_index, quoted
from lit_dpo.data.sources.store import Line
from lit_dpo.data.sources.text import flaw, legible
from lit_dpo.errors import DataError

_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}


def tsv_rows(lines: Iterable[str], notes: list[str]) -> Iterator[Line]:
    """Read rows whose cells are separated by tabs; see `csv_rows`."""
    return _rows(lines, "\t")


def csv_rows(lines: Iterable[str], notes: list[str]) -> Iterator[Line]:
    """Read rows whose cells are separated by commas, or by what separates the names of the columns.

    Raises:
        DataError: for columns without names, or of equal ones; for a quote that is not closed.
    """
    lines = iter(lines)
    header = list(_header(lines))
    separator = _separator("".join(header))
    if separator != ",":
        notes.append(f"cells are separated by {_SEPARATORS[separator]}s, as the names of the columns are")
    return _rows(chain(header, lines), separator)


def _header(lines: Iterator[str]) -> Iterator[str]:
    """Return the lines of the names: all that a cell in quotes may go over."""
    quotes = 0
    for line in lines:
        yield line
        quotes += line.count('"')
        if quotes % 2 == 0 and line.strip():
            return


def _separator(header: str) -> str:
    """Find what separates names: the comma, unless it separates none."""
    try:
        counts = {sign: len(next(_reader([header], sign), [])) for sign in _SEPARATORS}
    except csv.Error as error:  # a line that ends within itself, as by a carriage return
        raise DataError(f"line 1 is no CSV: {error}") from None
    return "," if counts[","] > 1 else max(counts, key=lambda sign: counts[sign])


def _reader(lines: Iterable[str], separator: str, *, strict: bool = False) -> Any:
    csv.field_size_limit(sys.maxsize)  # of this process; 131072 characters without
    return csv.reader(lines, delimiter=separator, strict=strict)


def _rows(lines: Iterable[str], separator: str) -> Iterator[Line]:
    reader = _reader(lines, separator, strict=True)
    names = _names(reader)
    kept = [place for place, name in enumerate(names) if not is_index(name)]
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if str(error) == "unexpected end of data":
                raise DataError(f"line {line}: a quote opens in this row that is never closed") from None
            yield Line("", line, reason=f"line {line} is no CSV: {error}; a quote inside a cell is written twice")
            continue
        if not cells:
            continue
        text = json.dumps({names[place]: cells[place] for place in kept if place < len(cells)}, ensure_ascii=False)
        if reason := _wrong(cells, names, separator, line):
            yield Line(legible(json.dumps(cells, ensure_ascii=False)), line, reason=reason)
        elif not text.isascii() and (place := flaw(text)) is not None:
            yield Line(legible(text), line, reason=f"line {line} holds a byte that is no text, {legible(text[place])}")
        else:
            yield Line(text, line, [names[place] for place in kept])


def _names(reader: Iterator[list[str]]) -> list[str]:
    try:
        names = next((cells for cells in reader if cells), [])
    except csv.Error as error:
        raise DataError(f"line 1 is no CSV: {error}") from None
    named = [name for name in names if not is_index(name)]
    if twice := [name for name in dict.fromkeys(named) if named.count(name) > 1]:
        raise DataError(f"Expected columns of different names but {quoted(twice)} is there more than once")
    return names


def _wrong(cells: list[str], names: list[str], separator: str, line: int) -> str:
    if len(cells) == len(names):
        return ""
    why = f"a cell that holds a {_SEPARATORS[separator]} is written in quotes"
    return f"Expected {len(names)} cells, as many as columns, but got {len(cells)}: {why}"
