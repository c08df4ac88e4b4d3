"""Rows as dictionaries, whatever holds them, and the place that each came from."""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from lit_dpo.data.digests import version
from lit_dpo.data.formats.base import PreferenceFormat
from lit_dpo.data.formats.turns import TEMPLATE
from lit_dpo.errors import DataError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

Row: TypeAlias = dict[str, Any]

# What code raises that meets a row of another shape; other errors (of a disk, of the network) are not the row's.
OF_A_ROW = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)

_AT_ONCE = 1000


class Unread(NamedTuple):
    """A row that cannot be read.

    Attributes:
        reason: why, in words, without the file and the row.
    """

    reason: str


def reason_of(error: Exception, format: PreferenceFormat) -> str:
    """Say why a format cannot read a row; an error that it did not expect with its place in the code."""
    if isinstance(error, DataError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    at = f"{Path(last.filename).name}, line {last.lineno}"
    return f"`{type(format).__name__}` cannot read it: {type(error).__name__}: {first_line(error)} ({at})"


class Reader(Protocol):
    """Makes rows of the cells of a table. It holds no file, so that another process can have it."""

    def __call__(self, cells: Mapping[str, Sequence[Any]], numbers: Sequence[int]) -> list[Row | Unread]:
        """Return rows in order, given cells by column, and which rows of the table they are of."""

    @property
    def has_lines(self) -> bool:
        """Whether the table says on which line of a file each row begins."""

    def columns(self, table: Dataset) -> list[str]:
        """Name the columns of the rows."""


@dataclass(frozen=True)
class Typed:
    """Rows of a table with a column of one type for each of theirs: Parquet, Arrow, what is held."""

    has_lines = False

    def __call__(self, cells: Mapping[str, Sequence[Any]], numbers: Sequence[int]) -> list[Row | Unread]:
        """Take them as they are."""
        return [{name: those[place] for name, those in cells.items()} for place in range(len(numbers))]

    def columns(self, table: Dataset) -> list[str]:
        """Name the table's."""
        names: list[str] = table.column_names
        return names


@dataclass(frozen=True)
class Parsed:
    """Rows that are kept as JSON, as the file has them, and parsed when they are read; see `store.py`.

    A column that a row lacks is null there.
    """

    names: tuple[str, ...]
    has_lines = True

    def __call__(self, cells: Mapping[str, Sequence[Any]], numbers: Sequence[int]) -> list[Row | Unread]:
        """Parse them."""
        texts = zip(cells["text"], cells["reason"], strict=True)
        return [Unread(reason) if reason else self._row(json.loads(text)) for text, reason in texts]

    def _row(self, found: Row) -> Row:
        return {name: found.get(name) for name in self.names}

    def columns(self, table: Dataset) -> list[str]:
        """Name those of all rows, or what was selected of them."""
        return list(self.names)


@dataclass(frozen=True)
class Parts:
    """The examples of rows that hold several.

    Attributes:
        rows: reads the rows.
        format: finds their examples.
        numbers: of each example the number of its row.
        places: of each example its place among those of its row.
    """

    rows: Reader
    format: PreferenceFormat
    numbers: Sequence[int]
    places: Sequence[int]

    @property
    def has_lines(self) -> bool:
        """As the rows."""
        return self.rows.has_lines

    def __call__(self, cells: Mapping[str, Sequence[Any]], numbers: Sequence[int]) -> list[Row | Unread]:
        """Read the rows, and pick of each the example that is meant."""
        found: list[Row | Unread] = []
        last, examples = -1, list[Row]()
        for row, number in zip(self.rows(cells, numbers), numbers, strict=True):
            if isinstance(row, Unread):
                found.append(row)
                continue
            try:
                if self.numbers[number] != last:
                    last, examples = -1, _examples(row, self.format)
                    last = self.numbers[number]
                found.append(examples[self.places[number]])
            except OF_A_ROW as error:
                found.append(Unread(reason_of(error, self.format)))
        return found

    def columns(self, table: Dataset) -> list[str]:
        """Name those of the rows that they are from."""
        return self.rows.columns(table)


def _examples(row: Row, format: PreferenceFormat) -> list[Row]:
    own = {TEMPLATE: row[TEMPLATE]} if TEMPLATE in row else {}
    return [{**own, **one} for one in format.examples(row)]


def examples_in(row: Row | Unread, format: PreferenceFormat) -> list[Row | Unread]:
    """Return the examples of a row that may hold several; of a bad one, why it is."""
    try:
        return [row] if isinstance(row, Unread) else [*_examples(row, format)]
    except OF_A_ROW as error:
        return [Unread(reason_of(error, format))]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows with random access, each a dictionary: `rows[3]`, `len(rows)`, `for row in rows`.

    Attributes:
        table: what is mapped over.
        reader: makes rows of its cells.
    """

    table: Dataset
    reader: Reader

    def __len__(self) -> int:
        """Count them, those that cannot be read too."""
        return len(self.table)

    def __getitem__(self, number: int) -> Row:
        """Read one.

        Raises:
            DataError: if it cannot be read, without its place.
        """
        (row,) = self.reader(self.table[[number]], [number])
        return _readable(row)

    def __iter__(self) -> Iterator[Row]:
        """Read all.

        Raises:
            DataError: for one that cannot be read, without its place.
        """
        return map(_readable, self.each())

    def each(self) -> Iterator[Row | Unread]:
        """Read all, those that cannot be read as what is wrong with them."""
        for start, cells in enumerate(self.table.iter(_AT_ONCE)):
            first = start * _AT_ONCE
            yield from self.reader(cells, range(first, min(first + _AT_ONCE, len(self))))

    def to_list(self) -> list[Row]:
        """Read all into memory."""
        return list(self)

    @property
    def column_names(self) -> list[str]:
        """Names of all columns, in the order in which they are met."""
        return self.reader.columns(self.table)

    def select_columns(self, names: Sequence[str]) -> Rows:
        """Return the rows with these columns alone."""
        if isinstance(self.reader, Parsed):
            return replace(self, reader=Parsed(tuple(names)))
        return replace(self, table=self.table.select_columns(list(names)))

    def cells(self, name: str) -> Iterator[Any]:
        """Read a column of the rows that can be read."""
        return (row.get(name) for row in self.select_columns([name]).each() if not isinstance(row, Unread))

    @property
    def unread(self) -> list[tuple[int, str]]:
        """Numbers of the rows whose text cannot be read, and why not."""
        if not self.reader.has_lines:
            return []
        from pyarrow.compute import indices_nonzero, not_equal

        reasons = self.table.data.column("reason")
        numbers = indices_nonzero(not_equal(reasons, "")).to_pylist()
        return [(number, reasons[number].as_py()) for number in numbers]

    def found(self, numbers: Sequence[int]) -> Iterator[tuple[int | None, Any]]:
        """Return of each row its line and what was found there: its text if it cannot be read."""
        for start in range(0, len(numbers), _AT_ONCE):
            cells = self.table[list(numbers[start : start + _AT_ONCE])]
            if self.reader.has_lines:
                parts = zip(cells["line"], cells["text"], cells["reason"], strict=True)
                yield from ((line or None, text if reason else json.loads(text)) for line, text, reason in parts)
            else:
                yield from ((None, dict(zip(cells, row, strict=True))) for row in zip(*cells.values(), strict=True))

    def line(self, number: int) -> int | None:
        """Say on which line of the file a row begins, from 1; None where there are no lines."""
        return self.table[number]["line"] or None if self.reader.has_lines else None


def _readable(row: Row | Unread) -> Row:
    if isinstance(row, Unread):
        raise DataError(row.reason)
    return row


class RowSource(NamedTuple):
    """Rows that came from one place.

    Attributes:
        name: what errors call it: a file's path, a hub id with its split.
        rows: the rows, with the columns that were asked for.
        content: a digest of the bytes that they were read from and of how, where these are on this machine. Else `""`:
            `rows` then knows the commit that it came from, or is in memory.
        numbers: of each row the number of the one that it is from, where one gave several. None: its own.
    """

    name: str
    rows: Rows
    content: str = ""
    numbers: Sequence[int] | None = None

    def number(self, row: int) -> int:
        """Return the number that a row has in the file, from 0."""
        return row if self.numbers is None else int(self.numbers[row])

    def place(self, row: int) -> str:
        """Say in which file a row is, its number there, and its line where this is another number."""
        number, line = self.number(row), self.rows.line(row)
        said = "" if line is None or line == number + 1 else f", line {line}"
        return f"{self.name}{said}, row {number} (from 0)"

    @property
    def cache(self) -> Path:
        """The folder of all that is made of this content."""
        return cache_of(self.content)

    def head(self, count: int) -> list[Row]:
        """Return up to `count` first rows that can be read."""
        found: list[Row] = []
        for row in self.rows.each():
            if not isinstance(row, Unread):
                found.append(row)
            if len(found) == count:
                break
        return found


def cache_of(content: str) -> Path:
    """Where is kept what is made of this content: `datasets` knows files by path and time of change."""
    key = hashlib.sha256(f"{content} {version('datasets')}".encode()).hexdigest()
    return cache_root() / key[:32]


def cache_root() -> Path:
    """Where is kept what is made of data."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "lit_dpo"


def say(line: str) -> None:
    """Say something of the reading, on one process."""
    from lightning.pytorch.utilities import rank_zero_info  # a second, which reading alone does not need

    rank_zero_info(line)


def typed(name: str, table: Any, content: str = "") -> RowSource:
    """Return the source of a table that has types.

    Raises:
        DataError: if it is no table, but several.
    """
    if not isinstance(getattr(table, "column_names", None), list):
        raise DataError(f"Expected rows but {name} is a {type(table).__name__}; choose one of its splits.")
    return RowSource(name, Rows(table, Typed()), content)
