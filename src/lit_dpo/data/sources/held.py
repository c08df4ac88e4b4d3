"""Rows that are there already, in an object that the user holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard
from uuid import uuid4

from lit_dpo.data.sources.base import RowSource, typed
from lit_dpo.errors import DataError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

# The split of a `DatasetDict` that each stage takes: the first of these that it has.
_SPLITS = {
    "train": ("train",),
    "val": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
    "predict": ("predict", "test", "validation"),
}


def are_names(source: object) -> TypeGuard[Sequence[str]]:
    """Whether something is a list of names, and no rows."""
    return isinstance(source, list | tuple) and all(isinstance(one, str) for one in source)


def held(source: Any, stage: str) -> RowSource:
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
        return typed(name, source)
    if isinstance(source, list | tuple):
        wrong = next((place for place, row in enumerate(source) if not isinstance(row, Mapping)), None)
        if wrong is not None:
            came = type(source[wrong]).__name__
            raise DataError(f"{name}, row {wrong} (from 0): Expected a dictionary but got {came}.")
        rows = list(source)
    elif isinstance(source, IterableDataset) or (isinstance(source, Iterable) and not isinstance(source, Mapping)):
        return typed(name, _drained(name, source))
    else:
        raise DataError(f"Expected a file, a list of files, a hub id or rows but got a {type(source).__name__}.")
    try:
        return typed(name, Dataset.from_list([dict(row) for row in rows]))
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
