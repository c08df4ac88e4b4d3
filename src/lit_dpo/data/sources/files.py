"""Local files: which they are, and what reads each kind."""

from __future__ import annotations

import difflib
import glob
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lit_dpo.data.digests import code_digest, content_digest
from lit_dpo.data.sources.base import Parsed, Rows, RowSource, cache_of, say, typed
from lit_dpo.data.sources.columns import quoted
from lit_dpo.data.sources.csv_rows import csv_rows, tsv_rows
from lit_dpo.data.sources.json_rows import json_document, json_lines
from lit_dpo.data.sources.store import Line, Stored, is_stored, store, stored
from lit_dpo.data.sources.text import COMPRESSIONS, lines_of
from lit_dpo.errors import DataError, first_line


class _Kind(NamedTuple):
    """A kind of text file.

    Attributes:
        read: its rows, of its lines; and what has to be said of the reading.
        newline: what ends its lines, as of `open`.
    """

    read: Callable[[Iterable[str], list[str]], Iterator[Line]]
    newline: str


TEXT = {
    ".jsonl": _Kind(json_lines, "\n"),
    ".ndjson": _Kind(json_lines, "\n"),
    ".json": _Kind(json_document, "\n"),
    ".csv": _Kind(csv_rows, ""),
    ".tsv": _Kind(tsv_rows, ""),
}
_TABLES = (".parquet", ".arrow")


def suffix_of(path: Path) -> str | None:
    """Find the known suffix that a path ends in, without that of a compression; None if there is none."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        if name.endswith(compression):
            found = Path(name.removesuffix(compression)).suffix
            return found if found in TEXT else None
    return next((suffix for suffix in (*TEXT, *_TABLES) if name.endswith(suffix)), None)


def files_of(path: Path) -> list[Path]:
    """List the files that a path or pattern stands for, sorted.

    Raises:
        DataError: if there is none, with those of similar names.
    """
    if path.is_file():
        return [path]
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if matches:
        return matches
    raise DataError(f"File not found: `{path.absolute()}`.{_similar(path.absolute())}")


def _similar(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" There is no folder `{folder}` either."
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and suffix_of(file))
    close = difflib.get_close_matches(path.name, names, n=5, cutoff=0.4) or names[:5]
    return f" Similar files there: {quoted(close)}." if close else " That folder has no data files."


def load_file(path: Path, encoding: str | None) -> RowSource:
    """Read a file, once for the same content; rows that cannot be read keep their places.

    Raises:
        DataError: for a file of an unknown kind, an empty or damaged one, one of which no row can be read.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise DataError(
            f"Expected a file that ends in one of {quoted([*TEXT, *_TABLES])}, or of the first {len(TEXT)} with "
            f"{quoted(COMPRESSIONS)} after it, but got `{path}`."
        )
    if path.stat().st_size == 0:
        raise DataError(f"`{path}` is empty.")
    content = content_digest([path])
    source = _text(path, suffix, content, encoding) if suffix in TEXT else _table(path, suffix, content)
    if len(source.rows) == 0:
        raise DataError(f"`{path}` has no rows.")
    return source


def _text(path: Path, suffix: str, content: str, encoding: str | None) -> RowSource:
    kind = TEXT[suffix]
    code = code_digest(kind.read, lines_of, store)
    content = hashlib.sha256(f"{content} {suffix} {path.suffix.lower()} {encoding} {code}".encode()).hexdigest()
    folder = cache_of(content)
    if not is_stored(folder):
        notes: list[str] = []
        try:
            store(folder, kind.read(lines_of(path, encoding, kind.newline), notes), notes)
        except DataError as error:
            if str(path) in str(error):
                raise
            raise DataError(f"`{path}` cannot be read: {str(error).rstrip('.')}.") from None
    found: Stored = stored(folder)
    for note in found.notes:
        say(f"{path}: {note}")
    return RowSource(str(path), Rows(found.table, Parsed(found.names)), content)


def _table(path: Path, suffix: str, content: str) -> RowSource:
    from datasets import Dataset

    try:
        if suffix == ".parquet":  # not `load_dataset`, which tells the hub of every local file
            rows = Dataset.from_parquet(glob.escape(str(path)), cache_dir=str(cache_of(content)))
        else:
            rows = _arrow(path)
    except Exception as error:  # `datasets` wraps whatever its readers raise, and leaks StopIteration for empty files
        cause = "it has no rows" if "corresponds to no data" in str(error) else _said(error.__cause__ or error)
        raise DataError(f"`{path}` cannot be read: {cause}") from error
    return typed(str(path), rows, content)


def _arrow(path: Path) -> Any:
    """Open an Arrow file: a stream, as `datasets` writes it, or one with a footer, as others do."""
    import pyarrow as pa
    from datasets import Dataset

    with path.open("rb") as file:
        is_stream = file.read(6) != b"ARROW1"
    return Dataset.from_file(str(path)) if is_stream else Dataset(pa.ipc.open_file(pa.memory_map(str(path))).read_all())


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}".rstrip(": ") if isinstance(error, Exception) else ""
