"""From what names a source to its rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lit_dpo.data.sources.base import RowSource, say
from lit_dpo.data.sources.columns import with_columns
from lit_dpo.data.sources.files import files_of, load_file, suffix_of
from lit_dpo.data.sources.held import are_names, held
from lit_dpo.data.sources.named import load_named
from lit_dpo.errors import DataError, sentence

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    Rows: TypeAlias = Dataset | IterableDataset | DatasetDict | IterableDatasetDict | Iterable[Mapping[str, Any]]
    Source: TypeAlias = str | list[str] | Rows
else:  # what a command line can say; with `Dataset` here every `--help` would import `datasets`
    Source: TypeAlias = str | list[str]

QUICKSTART = "lit-dpo/quickstart"
_QUOTED = 3


def load_rows(
    source: Source,
    columns: Sequence[str] | None,
    *,
    stage: str = "train",
    encoding: str | None = None,
    keep_bad: bool = False,
) -> list[RowSource]:
    """Load preference rows, one `RowSource` per file, so that whatever is wrong can be named with file and row.

    Args:
        source: one of
            a file, a pattern (`data/*.jsonl`), or a list of them: `.jsonl`, `.json` (a list of objects, or
            `{"data": […]}`), `.csv`, `.tsv`, each also with `.gz`, `.zst`, `.bz2` or `.xz` after it; `.parquet`,
            `.arrow`;
            `organisation/name:split`, a data set of the Hugging Face hub (or a folder that `datasets` has saved, or can
            load), in full `organisation/name@revision:configuration:split`, where the revision is a branch, tag or
            commit;
            `lit-dpo/quickstart`, the built-in data;
            a `datasets.Dataset` or `IterableDataset`; a `DatasetDict`, whose split of the stage's name is taken; rows,
            such as a list of dictionaries. What is iterated is read once, to its end, into a file of the cache.
        columns: the columns that are needed; others are left out. None: all that there are, but the numbers of rows
            that pandas adds.
        stage: `train`, `val`, `test` or `predict`: which part of the built-in data.
        encoding: of text files that are neither UTF-8, nor UTF-16 or UTF-32 whose first bytes say so.
        keep_bad: leave rows that cannot be read at their places, for `encode_table`, which finds further ones.

    Raises:
        DataError: for a file that does not exist, is empty or cannot be read; for rows that cannot be parsed (with the
            line), if they are not kept or there are no others; a column that is not there (with those that are), a
            configuration or split that has to be chosen or does not exist (with those there are), a data set that does
            not exist or may not be read (with what to do).
    """
    if not isinstance(source, str) and not are_names(source):
        return [with_columns(held(source, stage), columns)]
    names = [source] if isinstance(source, str) else source
    if not names or not all(names):
        raise DataError(f"Expected a file, a list of files, a hub id or rows but got {source!r}.")
    found = [item for name in names for item in _load(name, stage, encoding)]
    for item in found:
        _check_readable(item, keep_bad)
    if encoding and not any(item.rows.reader.has_lines for item in found):
        say(f"{stage}: `encoding={encoding}` changes nothing, for there are no text files")
    return [with_columns(item, columns) for item in found]


def _load(name: str, stage: str, encoding: str | None) -> Iterator[RowSource]:
    if name == QUICKSTART:
        from lit_dpo.quickstart import quickstart_directory

        name = str(quickstart_directory() / ("train.jsonl" if stage == "train" else "val.jsonl"))
    path = Path(name).expanduser()
    if suffix_of(path) is None and not path.is_file():
        yield from load_named(name, encoding)
        return
    for file in files_of(path):
        yield load_file(file, encoding)


def _check_readable(source: RowSource, keep_bad: bool) -> None:
    bad = source.rows.unread
    if not bad or (keep_bad and len(bad) < len(source.rows)):
        return
    quoted = [f"{source.place(number)}: {sentence(reason)}" for number, reason in bad[:_QUOTED]]
    if len(bad) == 1:
        raise DataError(quoted[0])
    raise DataError("\n  ".join([f"{len(bad)} of {len(source.rows)} rows of {source.name} cannot be read:", *quoted]))
