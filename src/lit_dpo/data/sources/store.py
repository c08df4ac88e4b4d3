"""Rows of text files in the cache: each as JSON, as the file has it, in an Arrow file that is mapped into memory.

Arrow's own reader of JSON makes times of texts that look like one, takes the quotes off texts in a column of several
types, fills objects with the keys that those of other rows have, and dies of deep nesting. Here a row is parsed when it
is read. One that cannot be parsed keeps its place, with what is wrong with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lit_dpo.errors import DataError
from lit_dpo.seals import is_sealed, seal
from lit_dpo.writing import written_whole

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS, _CHARACTERS = 1000, 1 << 23  # of a batch: Arrow's offsets of text have 32 bits

_MOST_COLUMNS = 1000


class Line(NamedTuple):
    """A row of a text file.

    Attributes:
        text: JSON of one object; of a row that cannot be read, what there is of it.
        line: where it begins, from 1; 0 where that is not known.
        names: of its columns.
        reason: why it cannot be read; empty if it can.
    """

    text: str
    line: int
    names: Iterable[str] = ()
    reason: str = ""


class Stored(NamedTuple):
    """Rows in the cache.

    Attributes:
        table: with the columns `text`, `line` and `reason`; see `Line`.
        names: of the columns of all rows, in the order in which they are met.
        notes: what has to be said of the reading.
    """

    table: Dataset
    names: tuple[str, ...]
    notes: tuple[str, ...]


def is_stored(folder: Path) -> bool:
    """Whether the rows of a file are there, as they were written."""
    return is_sealed(_files(folder), folder.name)


def store(folder: Path, lines: Iterable[Line], notes: list[str]) -> None:
    """Write rows as they come, in constant memory; they are there when all are.

    Args:
        folder: of the cache.
        lines: the rows.
        notes: what has to be said of the reading, complete when that is.
    """
    with written_whole(folder / "rows.arrow") as rows:
        names = _written(rows, lines)
        with written_whole(folder / "rows.json") as facts:  # in place before the rows are, which say that both are
            facts.write_text(json.dumps({"names": names, "notes": notes}), encoding="utf-8")
    seal(_files(folder), folder.name)


def stored(folder: Path) -> Stored:
    """Open the rows of a file."""
    from datasets import Dataset

    facts = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    table = Dataset.from_file(str(folder / "rows.arrow"))
    return Stored(table, tuple(facts["names"]), tuple(facts["notes"]))


def _files(folder: Path) -> list[Path]:
    return [folder / "rows.arrow", folder / "rows.json"]


def _written(path: Path, lines: Iterable[Line]) -> list[str]:
    import pyarrow as pa

    names: dict[str, None] = {}
    schema = pa.schema({"text": pa.string(), "line": pa.int64(), "reason": pa.string()})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in _batches(lines):
            for one in batch:
                names.update(dict.fromkeys(one.names))
                if len(names) > _MOST_COLUMNS:  # each row has a cell of each
                    raise DataError(f"Expected at most {_MOST_COLUMNS} columns but its rows have more different keys.")
            cells = [[one.text for one in batch], [one.line for one in batch], [one.reason for one in batch]]
            arrays = [pa.array(column, field.type) for column, field in zip(cells, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return list(names)


def _batches(lines: Iterable[Line]) -> Iterator[list[Line]]:
    batch: list[Line] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line.text)
        if len(batch) == _ROWS or size > _CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
