"""Sources whose rows are read as training goes: files, the hub, and whatever can be iterated again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

from lit_dpo.data.sources import Unread
from lit_dpo.data.sources.base import Row
from lit_dpo.data.sources.columns import quoted
from lit_dpo.data.sources.csv_rows import csv_rows, tsv_rows
from lit_dpo.data.sources.files import files_of, suffix_of
from lit_dpo.data.sources.json_rows import checked
from lit_dpo.data.sources.loading import QUICKSTART
from lit_dpo.data.sources.named import stream_named
from lit_dpo.data.sources.store import Line
from lit_dpo.data.sources.text import lines_of
from lit_dpo.errors import DataError, first_line

SHUFFLE_BUFFER = 10_000
_AT_ONCE = 256  # rows of a parquet file


def check_streaming(
    streaming: bool, shuffle_buffer: int | None, *, val_split: float, group_by_prompt: int | None, deduplicate: bool
) -> None:
    """See that the options of a stream go together, and with those that need a table.

    Raises:
        ValueError: for one that would have no effect, or cannot be.
    """
    if shuffle_buffer is not None and shuffle_buffer < 1:
        raise ValueError(f"Expected `shuffle_buffer` >= 1 but got {shuffle_buffer}.")
    if not streaming and shuffle_buffer is not None:
        raise ValueError("`shuffle_buffer` has no effect without `streaming`: all rows are shuffled.")
    if streaming and val_split:
        raise ValueError("Expected no `val_split` with `streaming`, for no prompt is known beforehand: set `val`.")
    if streaming and deduplicate:
        raise ValueError("Expected no `deduplicate` with `streaming`: rows that were read before are not kept.")
    if streaming and group_by_prompt is not None:
        raise ValueError("Expected no `group_by_prompt` with `streaming`: rows of a prompt may be far from each other.")


class StreamSource(NamedTuple):
    """Rows of one place, read anew from the first one each time.

    What is read of a row is raw (a line of a file, for instance) until `parse` makes its cells of it: rows that another
    rank trains on, or that come before the one to go on from, are never parsed.

    Attributes:
        name: what errors call it: a file's path, a hub id with its split.
        raw: begins to read.
        parse: makes a row of what was read, or says why it cannot.
        columns: what is read of a row; a cell that is not there is None. None: all.
        optional: what is read where a row has it.
    """

    name: str
    raw: Callable[[], Iterable[Any]]
    parse: Callable[[Any], Mapping[str, Any] | Unread] = dict
    columns: tuple[str, ...] | None = None
    optional: tuple[str, ...] = ()

    def place(self, row: int) -> str:
        """Say in which file a row is, and its number there."""
        return f"{self.name}, row {row} (from 0)"

    def read(self) -> Iterator[Any]:
        """Yield the raw rows.

        Raises:
            DataError: for a file that cannot be read, with the row that would have been next.
        """
        number = 0
        try:
            for one in self.raw():
                yield one
                number += 1
        except DataError as error:
            raise DataError(f"{self.place(number)} cannot be read: {error}") from error
        except Exception as error:  # of files, decompressors, the network and iterables of users
            raise DataError(f"{self.place(number)} cannot be read: {first_line(error)}") from error

    def cells(self, raw: Any) -> Row | Unread:
        """Make the cells of what was read of a row."""
        try:
            row = self.parse(raw)
        except (ValueError, TypeError, RecursionError) as error:
            return Unread(f"it is no object {{…}}: {first_line(error)}")
        if isinstance(row, Unread) or self.columns is None:
            return row if isinstance(row, Unread) else dict(row)
        there = {name: row[name] for name in self.optional if name in row}
        return {name: row.get(name) for name in self.columns} | there

    def head(self, count: int) -> list[Row]:
        """Return up to `count` first rows, of which those that cannot be read are left out.

        Raises:
            DataError: if there is no row, or none of them can be read.
        """
        rows = [self.cells(raw) for raw in islice(self.read(), count)]
        if not rows:
            raise DataError(f"{self.name} has no rows.")
        found = [row for row in rows if not isinstance(row, Unread)]
        if not found:
            reasons = [row.reason for row in rows if isinstance(row, Unread)]
            raise DataError(f"{self.place(0)}: {reasons[0]}; and none of the first {len(rows)} rows can be read.")
        return found

    def with_columns(self, columns: Sequence[str], optional: Sequence[str], head: Sequence[Mapping[str, Any]]) -> Self:
        """Return the source with the columns that a format reads.

        Args:
            columns: that have to be there, in some of the first rows.
            optional: that may be there.
            head: the first rows.

        Raises:
            DataError: for a column that is not there, with those there are.
        """
        there = dict.fromkeys(name for row in head for name in row)
        if missing := [name for name in columns if name not in there]:
            known = ", ".join(f"`{name}`" for name in there)
            raise DataError(
                f"{self.name}: expected the column{'s' * (len(missing) > 1)} "
                f"{', '.join(f'`{name}`' for name in missing)} but its first rows have {known}. Name the columns with "
                "the format's options, such as `--data.format.prompt`."
            )
        return self._replace(columns=tuple(columns), optional=tuple(optional))

    def row(self, number: int) -> Row | Unread:
        """Read up to a row, and return it."""
        for raw in islice(self.read(), number, None):
            return self.cells(raw)
        raise IndexError(f"Expected a row of {self.name} but it has none of the number {number}.")


def open_stream(source: Any, stage: str = "train", encoding: str | None = None) -> list[StreamSource]:
    """Find what a source stands for, one `StreamSource` for each file; nothing is read yet.

    Args:
        source: a `.jsonl`, `.csv`, `.tsv` (also compressed) or `.parquet` file, a pattern, a hub data set as in
            `load_rows`, or a list of them; or what can be iterated more than once, such as a
            `datasets.IterableDataset`; or a function that begins an iterator.
        stage: as in `load_rows`.
        encoding: likewise.

    Raises:
        DataError: for a file that does not exist or cannot be read row by row, or an iterator, which gives its rows
            once: to go on inside an epoch they are read again.
    """
    names = [source] if isinstance(source, str) else source
    if isinstance(names, list | tuple) and names and all(isinstance(one, str) for one in names):
        return [found for name in names for found in _named(name, stage, encoding)]
    name = f"the `{type(source).__name__}` given"
    if isinstance(source, Mapping):
        if stage not in source:
            raise DataError(f"Expected a split {stage} in {name} but it has {', '.join(map(str, source)) or 'none'}.")
        return open_stream(source[stage], stage, encoding)
    if callable(source) and not isinstance(source, Iterable):
        return [StreamSource(f"what `{getattr(source, '__name__', type(source).__name__)}` makes", source)]
    if isinstance(source, Iterator):
        raise DataError(
            f"Expected rows that can be read again, to go on inside an epoch and for the next one, but {name} gives "
            "them once. Give the function that makes it, or a `datasets.IterableDataset`."
        )
    if not isinstance(source, Iterable):
        raise DataError(f"Expected a file, a list of files, a hub id or rows but got a {type(source).__name__}.")
    return [StreamSource(name, partial(iter, source))]


def _named(name: str, stage: str, encoding: str | None) -> Iterator[StreamSource]:
    if name == QUICKSTART:
        from lit_dpo.quickstart import quickstart_directory

        name = str(quickstart_directory() / ("train.jsonl" if stage == "train" else "val.jsonl"))
    path = Path(name).expanduser()
    if suffix_of(path) is None and not path.is_file():
        yield StreamSource(*stream_named(name))
        return
    for file in files_of(path):
        suffix = suffix_of(file)
        if suffix not in _READERS:
            raise DataError(
                f"Expected a file that ends in one of {quoted([*_READERS])}, to be streamed, but got `{file}`."
            )
        raw, parse = _READERS[suffix]
        yield StreamSource(str(file), partial(raw, file, encoding), parse)


def _lines(file: Path, encoding: str | None) -> Iterator[tuple[int, str]]:
    """Read objects, one a line; a list of all rows would have to be read to its end."""
    filled = ((number, line.strip()) for number, line in enumerate(lines_of(file, encoding, "\n"), 1) if line.strip())
    for place, (number, line) in enumerate(filled):
        if place == 0 and line.startswith("["):
            raise DataError(f"`{file}` is one list, which is read whole: write an object a line to stream it.")
        yield number, line


def _object(numbered: tuple[int, str]) -> Mapping[str, Any] | Unread:
    number, text = numbered
    return _cells(checked(text, number))


def _cells(line: Line) -> Mapping[str, Any] | Unread:
    found: Mapping[str, Any] = {} if line.reason else json.loads(line.text)
    return Unread(line.reason) if line.reason else found


def _table(file: Path, encoding: str | None) -> Iterator[Line]:
    rows = tsv_rows if suffix_of(file) == ".tsv" else csv_rows
    return rows(lines_of(file, encoding, ""), [])


def _parquet(file: Path, encoding: str | None) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as opened:
        for batch in opened.iter_batches(_AT_ONCE):
            yield from batch.to_pylist()


_READERS: dict[str, tuple[Callable[[Path, str | None], Iterator[Any]], Callable[[Any], Mapping[str, Any] | Unread]]] = {
    ".jsonl": (_lines, _object),
    ".ndjson": (_lines, _object),
    ".json": (_lines, _object),
    ".csv": (_table, _cells),
    ".tsv": (_table, _cells),
    ".parquet": (_parquet, dict),
}
