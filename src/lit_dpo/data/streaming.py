"""Sources whose rows are read as training goes: files, the hub, and whatever can be iterated again."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

from lit_dpo.data.sources import QUICKSTART, _completed, _parse, _refuse_paths
from lit_dpo.errors import DataError, first_line
from lit_dpo.hub import explain

SHUFFLE_BUFFER = 10_000
_AT_ONCE = 256  # rows of a parquet file


def check_streaming(
    streaming: bool, shuffle_buffer: int | None, *, val_split: float, group_by_prompt: int | None
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
    if streaming and group_by_prompt is not None:
        raise ValueError("Expected no `group_by_prompt` with `streaming`: rows of a prompt may be far from each other.")


class StreamSource(NamedTuple):
    """Rows of one place, read anew from the first one each time.

    What is read of a row is raw (a line of a file, for instance) until `parse` makes its cells of it: rows that another
    rank trains on, or that come before the one to go on from, are never parsed.

    Attributes:
        name: what errors call it: a file's path, a hub id with its split.
        raw: begins to read.
        parse: makes a row of what was read.
        columns: what is read of a row; a cell that is not there is None. None: all.
        optional: what is read where a row has it.
    """

    name: str
    raw: Callable[[], Iterable[Any]]
    parse: Callable[[Any], Mapping[str, Any]] = dict
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
        except DataError:
            raise
        except Exception as error:  # of files, decompressors, the network and iterables of users
            raise DataError(f"{self.place(number)} cannot be read: {first_line(error)}") from error

    def cells(self, raw: Any, number: int) -> dict[str, Any]:
        """Make the cells of what was read.

        Args:
            raw: what was read of the row.
            number: of the row, for errors.

        Raises:
            DataError: if it is no row.
        """
        try:
            row = self.parse(raw)
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{self.place(number)} is no object {{…}}: {first_line(error)}") from None
        if self.columns is None:
            return dict(row)
        there = {name: row[name] for name in self.optional if name in row}
        return {name: row.get(name) for name in self.columns} | there

    def head(self, count: int) -> list[dict[str, Any]]:
        """Return up to `count` first rows.

        Raises:
            DataError: if there is none.
        """
        rows = [self.cells(raw, number) for number, raw in enumerate(islice(self.read(), count))]
        if not rows:
            raise DataError(f"{self.name} has no rows.")
        return rows

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

    def row(self, number: int) -> dict[str, Any]:
        """Read up to a row, and return it."""
        for raw in islice(self.read(), number, None):
            return self.cells(raw, number)
        raise IndexError(f"Expected a row of {self.name} but it has none of the number {number}.")


def open_stream(source: Any, stage: str = "train") -> list[StreamSource]:
    """Find what a source stands for, one `StreamSource` for each file; nothing is read yet.

    Args:
        source: a `.jsonl`, `.csv` or `.parquet` file (the first two also with `.gz`), a pattern, a hub data set as in
            `load_rows`, or a list of them; or what can be iterated more than once, such as a
            `datasets.IterableDataset`; or a function that begins an iterator.
        stage: as in `load_rows`.

    Raises:
        DataError: for a file that does not exist or cannot be read row by row, or an iterator, which gives its rows
            once: to go on inside an epoch they are read again.
    """
    names = [source] if isinstance(source, str) else source
    if isinstance(names, list | tuple) and names and all(isinstance(one, str) for one in names):
        return [found for name in names for found in _named(name, stage)]
    name = f"the `{type(source).__name__}` given"
    if isinstance(source, Mapping):
        if stage not in source:
            raise DataError(f"Expected a split {stage} in {name} but it has {', '.join(map(str, source)) or 'none'}.")
        return open_stream(source[stage], stage)
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


def _named(name: str, stage: str) -> Iterator[StreamSource]:
    if name == QUICKSTART:
        from lit_dpo.quickstart import quickstart_directory

        name = str(quickstart_directory() / ("train.jsonl" if stage == "train" else "val.jsonl"))
    pattern = str(Path(name).expanduser())
    files = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    if not files and not pattern.endswith(tuple(_READERS)):
        yield _of_the_hub(name)
    elif not files:
        raise DataError(f"File not found: `{Path(pattern).absolute()}`.")
    for file in files:
        suffix = next((one for one in sorted(_READERS, key=len, reverse=True) if file.lower().endswith(one)), None)
        if suffix is None:
            known = ", ".join(f"`{one}`" for one in _READERS)
            raise DataError(f"Expected a file that ends in one of {known}, to be streamed, but got `{file}`.")
        raw, parse = _READERS[suffix]
        yield StreamSource(file, partial(raw, file), parse)


def _open(file: str, **options: Any) -> Any:
    opener: Any = gzip.open if file.endswith(".gz") else open
    return opener(file, "rt", encoding="utf-8-sig", **options)


def _lines(file: str) -> Iterator[str]:
    with _open(file) as lines:
        yield from (line for line in lines if not line.isspace())


def _document(file: str) -> Iterator[str]:
    """Read a `.json` file with an object a line; a list of all rows would have to be read to its end."""
    for number, line in enumerate(_lines(file)):
        if number == 0 and line.lstrip().startswith("["):
            raise DataError(f"`{file}` is one list, which is read whole: write an object a line to stream it.")
        yield line


def _json(line: str) -> Mapping[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise TypeError(f"got {type(row).__name__}")
    return row


def _table(file: str) -> Iterator[dict[Any, Any]]:
    csv.field_size_limit(sys.maxsize)  # a completion may be longer than 131072 characters
    with _open(file, newline="") as lines:
        yield from csv.DictReader(lines)


def _record(row: dict[Any, Any]) -> Mapping[str, Any]:
    if None in row or None in row.values():
        raise ValueError(f"it has {'more' if None in row else 'fewer'} cells than the header")
    return row


def _parquet(file: str) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as opened:
        for batch in opened.iter_batches(_AT_ONCE):
            yield from batch.to_pylist()


_READERS: dict[str, tuple[Callable[[str], Iterator[Any]], Callable[[Any], Mapping[str, Any]]]] = {
    ".jsonl": (_lines, _json),
    ".jsonl.gz": (_lines, _json),
    ".json": (_document, _json),
    ".json.gz": (_document, _json),
    ".csv": (_table, _record),
    ".csv.gz": (_table, _record),
    ".parquet": (_parquet, dict),
}


def _of_the_hub(name: str) -> StreamSource:
    from datasets import load_dataset

    named = _parse(name)
    _refuse_paths(name, named.path)
    try:
        named = _completed(named)
        found = load_dataset(
            named.path, named.configuration, split=named.split, revision=named.revision, streaming=True
        )
    except DataError:
        raise
    except Exception as error:  # hub, network and builder errors have no common base
        what = explain(error, named.path, named.revision, "dataset") or f"cannot be streamed: {first_line(error)}"
        raise DataError(f"`{name}`: {named.path} {what}") from error
    return StreamSource(str(named), partial(iter, found))
