"""Where preferences come from: local files, the Hugging Face hub, or a `datasets.Dataset`."""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeGuard
from uuid import uuid4

from lit_dpo.data.digests import content_digest
from lit_dpo.errors import DataError, first_line
from lit_dpo.hub import ABSENT, GATED, explain, split_revision

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    Rows: TypeAlias = Dataset | IterableDataset | DatasetDict | IterableDatasetDict | Iterable[Mapping[str, Any]]
    Source: TypeAlias = str | list[str] | Rows
else:  # what a command line can say; with `Dataset` here every `--help` would import `datasets`
    Source: TypeAlias = str | list[str]

QUICKSTART = "lit-dpo/quickstart"

_LOADERS = {
    ".jsonl": "json",
    ".json": "json",
    ".jsonl.gz": "json",
    ".json.gz": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


class RowSource(NamedTuple):
    """Rows that came from one place.

    Attributes:
        name: what errors call it: a file's path, a hub id with its split.
        rows: the rows, with the columns that were asked for.
        content: a digest of the bytes that they were read from, where these are on this machine. Else `""`: `rows`
            then knows the commit that it came from, or is in memory.
        numbers: of each row the number of the one that it is from, where one gave several. None: its own.
    """

    name: str
    rows: Dataset
    content: str = ""
    numbers: Sequence[int] | None = None

    def place(self, row: int) -> str:
        """Say in which file a row is, and its number there."""
        return f"{self.name}, row {row if self.numbers is None else self.numbers[row]} (from 0)"

    @property
    def cache(self) -> Path:
        """The folder of all that is made of this content."""
        return _cache(self.content)

    def head(self, count: int) -> list[dict[str, Any]]:
        """Return up to `count` first rows."""
        rows: list[dict[str, Any]] = self.rows.select(range(min(count, len(self.rows)))).to_list()
        return rows


def load_rows(source: Source, columns: Sequence[str] | None, *, stage: str = "train") -> list[RowSource]:
    """Load preference rows, one `RowSource` per file, so that whatever is wrong can be named with file and row.

    Args:
        source: one of
            a `.jsonl`, `.jsonl.gz`, `.json`, `.csv` or `.parquet` file, a pattern (`data/*.jsonl`), or a list of them;
            `organisation/name:split`, a data set of the Hugging Face hub (or a folder that `datasets` can load), in
            full `organisation/name@revision:configuration:split`, where the revision is a branch, tag or commit;
            `lit-dpo/quickstart`, the built-in data;
            a `datasets.Dataset` or `IterableDataset`; a `DatasetDict`, whose split of the stage's name is taken; rows,
            such as a list of dictionaries. What is iterated is read once, to its end, into a file of the cache.
        columns: the columns that are needed; others are left out. None: all that there are.
        stage: `train`, `val`, `test` or `predict`: which part of the built-in data.

    Raises:
        DataError: for a file that does not exist, is empty or cannot be parsed (with the line), a column that is not
            there (with those that are), a configuration or split that has to be chosen or does not exist (with those
            there are), a data set that does not exist or may not be read (with what to do).
    """
    if not isinstance(source, str) and not _are_names(source):
        return [with_columns(_held(source, stage), columns)]
    names = [source] if isinstance(source, str) else source
    if not names or not all(names):
        raise DataError(f"Expected a file, a list of files, a hub id or rows but got {source!r}.")
    found = [item for name in names for item in _load(name, stage)]
    return [with_columns(item, columns) for item in found]


def _load(name: str, stage: str) -> Iterator[RowSource]:
    if name == QUICKSTART:
        from lit_dpo.quickstart import quickstart_directory

        name = str(quickstart_directory() / ("train.jsonl" if stage == "train" else "val.jsonl"))
    path = Path(name).expanduser()
    if _suffix(path) is None and not path.is_file():
        yield _load_named(name)
        return
    for file in _files(path):
        yield _load_file(file)


# --- rows that are there already -------------------------------------------------------------------------------------

# The split of a `DatasetDict` that each stage takes: the first of these that it has.
_SPLITS = {
    "train": ("train",),
    "val": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
    "predict": ("predict", "test", "validation"),
}


def _are_names(source: object) -> TypeGuard[Sequence[str]]:
    return isinstance(source, list | tuple) and all(isinstance(one, str) for one in source)


def _held(source: Any, stage: str) -> RowSource:
    """Take rows from an object that the user holds.

    Raises:
        DataError: for an object that has no rows, a split that has to be chosen, or rows of different kinds.
    """
    from datasets import Dataset, IterableDataset

    name = f"the `{type(source).__name__}` given"
    if isinstance(source, Mapping):
        splits = [split for split in _SPLITS[stage] if split in source]
        if not splits:
            raise DataError(
                f"Expected a split {' or '.join(_SPLITS[stage])} for `{stage}` in {name} but it has "
                f"{', '.join(map(str, source)) or 'none'}: give one of these itself."
            )
        name, source = f"{name}, split {splits[0]}", source[splits[0]]
    if isinstance(source, Dataset):
        return RowSource(name, source)
    if isinstance(source, list | tuple):
        wrong = next((place for place, row in enumerate(source) if not isinstance(row, Mapping)), None)
        if wrong is not None:
            came = type(source[wrong]).__name__
            raise DataError(f"{name}, row {wrong} (from 0): Expected a dictionary but got {came}.")
        rows = list(source)
    elif isinstance(source, IterableDataset) or (isinstance(source, Iterable) and not isinstance(source, Mapping)):
        return RowSource(name, _drained(name, source))
    else:
        raise DataError(f"Expected a file, a list of files, a hub id or rows but got a {type(source).__name__}.")
    try:
        return RowSource(name, Dataset.from_list([dict(row) for row in rows]))
    except Exception as error:  # pyarrow's, of many kinds
        raise DataError(f"{name}: the rows do not make one table: {first_line(error)}") from error


def _drained(name: str, source: Iterable[Mapping[str, Any]]) -> Dataset:
    """Read a stream to its end into a file, as a table with random access: an order needs their number."""
    from datasets import Dataset

    try:
        # a digest of a stream would be that of its code: what is read now is not what was read before
        return Dataset.from_generator(lambda: map(dict, source), fingerprint=f"stream-{uuid4().hex}")
    except Exception as error:  # of the stream, or pyarrow's
        raise DataError(f"{name} cannot be read: {first_line(error)}") from error


# --- local files -----------------------------------------------------------------------------------------------------


def _suffix(path: Path) -> str | None:
    """Find the known suffix that a path ends in, the longest first."""
    name = path.name.lower()
    return next((suffix for suffix in sorted(_LOADERS, key=len, reverse=True) if name.endswith(suffix)), None)


def _files(path: Path) -> list[Path]:
    """List the files that a path or pattern stands for, sorted."""
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
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and _suffix(file))
    close = difflib.get_close_matches(path.name, names, n=5, cutoff=0.4) or names[:5]
    return f" Similar files there: {_quoted(close)}." if close else " That folder has no data files."


def _load_file(path: Path) -> RowSource:
    from datasets import Dataset

    suffix = _suffix(path)
    if suffix is None:
        known = ", ".join(f"`{suffix}`" for suffix in _LOADERS)
        raise DataError(f"Expected a file that ends in one of {known} but got `{path}`.")
    if path.stat().st_size == 0:
        raise DataError(f"`{path}` is empty.")
    content = content_digest([path])
    options = _csv_options(path) if suffix == ".csv" else {}
    try:
        # not `load_dataset`, which tells the hub of every local file
        read = {"json": Dataset.from_json, "csv": Dataset.from_csv, "parquet": Dataset.from_parquet}[_LOADERS[suffix]]
        rows = read(glob.escape(str(path)), cache_dir=str(_cache(content)), **options)
    except Exception as error:  # `datasets` wraps whatever its readers raise, and leaks StopIteration for empty files
        raise DataError(f"`{path}` cannot be read: {_diagnosis(path, suffix, error)}") from error
    if len(rows) == 0:
        raise DataError(f"`{path}` has no rows.")
    return RowSource(str(path), rows, content)


def _cache(content: str) -> Path:
    """Where `datasets` keeps what it makes of this content: it knows files by path and time of change."""
    from datasets import config

    key = hashlib.sha256(f"{content} {version('datasets')}".encode()).hexdigest()
    return Path(config.HF_DATASETS_CACHE) / "lit_dpo" / key[:32]


def _csv_options(path: Path) -> dict[str, Any]:
    """Every cell is text: a completion may be `None`, `NA` or `42`, which pandas would turn into other things."""
    from datasets import Features, Value

    with path.open(newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file), [])
    return {"keep_default_na": False, "features": Features({name: Value("string") for name in header})}


def _diagnosis(path: Path, suffix: str, error: Exception) -> str:
    """Say what is wrong, with the line where it can be found."""
    if _LOADERS[suffix] == "json":
        found = _bad_json_document(path) if suffix.startswith(".json") and "l" not in suffix else _bad_json_line(path)
        if found:
            return found
    elif "corresponds to no data" in str(error):
        return "it has no rows"
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}".rstrip(": ")


def _bad_json_line(path: Path) -> str | None:
    """Find the first line that is no JSON object; None if all are."""
    empty = True
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            empty = False
            try:
                value = json.loads(line)
            except ValueError as error:
                return f"line {number} is no JSON: {error}"
            if not isinstance(value, dict):
                return f"line {number}: expected an object {{…}} but got {type(value).__name__}"
    return "it has no rows" if empty else None


def _bad_json_document(path: Path) -> str | None:
    """Find the first error of a `.json` file: one list of objects, or one object per line."""
    with _open(path) as file:
        text = file.read()
    if text.lstrip()[:1] != "[":
        return _bad_json_line(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        return f"line {error.lineno} is no JSON: {error.msg}"
    wrong = next((number for number, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        return f"row {wrong}: expected an object {{…}} but got {type(rows[wrong]).__name__}"
    return None if rows else "it has no rows"


def _open(path: Path) -> Any:
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8", errors="replace")


# --- hub and folders -------------------------------------------------------------------------------------------------


class _Named(NamedTuple):
    """A hub data set or a folder: `path@revision:configuration:split`, of which only the path has to be there."""

    path: str
    revision: str | None
    configuration: str | None
    split: str | None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return ":".join([self.path + at, *filter(None, (self.configuration, self.split))])


def _parse(name: str) -> _Named:
    """Split a name at its colon; a part of a split, `train[:100]`, has one of its own."""
    place, _, rest = name.partition(":")
    path, revision = split_revision(place)
    parts = re.fullmatch(r"(?:([^:\[\]]+):)?(.*)", rest)
    configuration, split = parts.groups() if parts else (None, rest)
    return _Named(path, revision, configuration, split or None)


def _load_named(name: str) -> RowSource:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    named = _parse(name)
    _refuse_paths(name, named.path)
    folder, content, options = Path(named.path), "", {}
    if folder.is_dir():
        files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
        content = content_digest(files)
        options = {"cache_dir": str(_cache(content))}
    try:
        named = _completed(named)
        rows = load_dataset(named.path, named.configuration, split=named.split, revision=named.revision, **options)
    except DataError:
        raise
    except Exception as error:  # hub, network and builder errors have no common base
        what = explain(error, named.path, named.revision, "dataset")
        if what is None and isinstance(error, DatasetNotFoundError):  # raised without its cause
            what = GATED if "gated" in str(error) else ABSENT
        raise DataError(
            f"`{name}`: {named.path} {what}"
            if what
            else f"`{name}` cannot be loaded: no local file with a known suffix, and `datasets` says: {error}"
        ) from error
    return RowSource(str(named), rows, content and f"{content} {named.configuration} {named.split}")


def _completed(named: _Named) -> _Named:
    """With the configuration and the split, if there is only one; from the cache where the hub may not be asked.

    Raises:
        DataError: for one that has to be chosen, or does not exist, with those there are.
    """
    from datasets import config, get_dataset_config_names, get_dataset_split_names

    if config.HF_HUB_OFFLINE and named.split and not Path(named.path).is_dir():
        return named  # `datasets` finds what it has loaded before, and lists nothing
    configurations = get_dataset_config_names(named.path, revision=named.revision)
    if named.configuration is None and "default" not in configurations and len(configurations) > 1:
        # the one name that was given may be the configuration
        given = (named.split, "train") if named.split in configurations else (configurations[0], named.split or "train")
        example = named._replace(configuration=given[0], split=given[1])
        raise DataError(
            f"Expected a configuration, such as `{example}`; `{named.path}` has {', '.join(configurations)}."
        )
    if named.configuration not in (None, *configurations):
        raise DataError(
            f"`{named.path}` has no configuration `{named.configuration}`; it has {', '.join(configurations)}."
        )
    if named.split is not None and not re.fullmatch(r"\w+", named.split):
        return named  # an expression
    splits = get_dataset_split_names(named.path, named.configuration, revision=named.revision)
    if named.split is None and len(splits) > 1:
        raise DataError(
            f"Expected a split, such as `{named._replace(split=splits[0])}`; `{named.path}` has {', '.join(splits)}."
        )
    if named.split not in (None, *splits):
        raise DataError(f"`{named.path}` has no split `{named.split}`; it has {', '.join(splits)}.")
    return named._replace(split=named.split or splits[0])


def _refuse_paths(name: str, path: str) -> None:
    """Refuse a path that does not exist: it is never looked up on the hub."""
    looks_like_path = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_like_path and not Path(path).expanduser().is_dir():
        raise DataError(f"File not found: `{Path(name).expanduser().absolute()}`.")


# --- columns ---------------------------------------------------------------------------------------------------------


def with_columns(source: RowSource, columns: Sequence[str] | None, optional: Sequence[str] = ()) -> RowSource:
    """Return the source with the needed columns alone, and those of the optional ones that it has.

    Raises:
        DataError: if one is missing, with those there are, or if there is no row.
    """
    there = getattr(source.rows, "column_names", None)
    if not isinstance(there, list):
        raise DataError(f"Expected rows but {source.name} is a {type(source.rows).__name__}; choose one of its splits.")
    missing = [name for name in columns or () if name not in there]
    if missing:
        other = next((name for name in there if name not in (columns or ())), None)
        advice = (
            f"Name the columns with the format's options, such as `--data.format.prompt {other}`."
            if other
            else "Rows of another layout need another `--data.format`."
        )
        raise DataError(
            f"{source.name}: expected the columns {_quoted(columns or ())} but {_quoted(missing)} is missing; it has "
            f"{_quoted(there)}. {advice}"
        )
    if len(source.rows) == 0:
        raise DataError(f"{source.name} has no rows.")
    if columns is None:
        return source
    kept = dict.fromkeys([*columns, *(name for name in optional if name in there)])
    return source._replace(rows=source.rows.select_columns(list(kept)))


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
