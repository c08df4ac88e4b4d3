"""From the rows of files to a table of encoded prompts, once for the same content, and then from the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from lit_dpo.data.comparisons import Compared, Comparing, check_row
from lit_dpo.data.digests import code_digest
from lit_dpo.data.encode import PromptEncoder
from lit_dpo.data.formats.base import Preference, PreferenceFormat, Ranking, Skipped
from lit_dpo.data.formats.turns import read_row
from lit_dpo.data.grouping import merge_prompts
from lit_dpo.data.sameness import repeated_rows
from lit_dpo.data.sources import Rows, RowSource, Unread
from lit_dpo.data.sources.base import OF_A_ROW, Parts, reason_of
from lit_dpo.data.storage import features, laid_out, mapped, stored
from lit_dpo.data.table import PromptTable
from lit_dpo.data.truncation import Dropped
from lit_dpo.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def encode_table(
    sources: Sequence[RowSource],
    format: PreferenceFormat | Sequence[PreferenceFormat],
    encoder: PromptEncoder,
    comparing: Comparing = Comparing(),  # noqa: B008 - a record
    group_by_prompt: int | None = None,
    deduplicate: bool = False,
) -> PromptTable:
    """Read, check and encode every row; what is on disk is encoded once and then memory-mapped.

    Once, that is, for the same content (wherever it lies), format with its code, tokenizer and limits.

    Args:
        sources: of the rows.
        format: reads them, or one for each source.
        encoder: of prompts and completions.
        comparing: which completions are compared.
        group_by_prompt: merge rows of the same prompt into examples of up to so many completions. None: a row is one.
        deduplicate: leave out rows that say what an earlier one says.

    A row that cannot be used is kept as a dropped one that is bad, see `PromptTable.bad`: `bad_rows.py` reports all.

    Raises:
        DataError: for what is wrong with all rows: the files' columns of numbers differ, or there is no chat template.
    """
    from datasets import concatenate_datasets

    formats = [format] * len(sources) if isinstance(format, PreferenceFormat) else list(format)
    sources = [_spread(source, own) for source, own in zip(sources, formats, strict=True)]
    names = [_column_names(source, own, comparing) for source, own in zip(sources, formats, strict=True)]
    for source, there in zip(sources, names, strict=True):
        if there != names[0]:
            raise DataError(
                f"Expected the same columns of numbers in all files but {sources[0].name} has {_list(names[0])} and "
                f"{source.name} {_list(there)}."
            )
    columns = names[0] if names else ()
    whole = encoder
    if group_by_prompt is not None:  # a group is cut once, when it is together
        whole = replace(encoder, max_length=None, max_prompt_length=None, truncation="drop")
    keys = [_fingerprint(source, own, whole, comparing) for source, own in zip(sources, formats, strict=True)]
    parts = [
        _encode_source(source, own, whole, comparing, columns, key)
        for source, own, key in zip(sources, formats, keys, strict=True)
    ]
    encoded = concatenate_datasets(parts).with_format("arrow")
    table = PromptTable(sources, formats, encoded, np.arange(len(encoded)), columns)
    table = table._replace(rows=np.flatnonzero(table.facts("length")))
    repeated = repeated_rows(table) if deduplicate else table.rows[:0]
    if group_by_prompt is None:
        rows = np.setdiff1d(table.rows, repeated) if len(repeated) else table.rows
        return table._replace(rows=rows, repeated=len(repeated))
    table = merge_prompts(table, encoder, group_by_prompt, keys, repeated)
    return table._replace(rows=np.flatnonzero(table.facts("length")), repeated=len(repeated))


def _spread(source: RowSource, format: PreferenceFormat) -> RowSource:
    """Return the source with a row for each example, where a row of it may hold several; a bad one stays one."""
    if type(format).examples is PreferenceFormat.examples:
        return source
    counts = [_count(format, row) for row in source.rows.each()]
    numbers = [number for number, count in enumerate(counts) for _ in range(count)]
    places = [place for count in counts for place in range(count)]
    reader = Parts(source.rows.reader, format, numbers, places)
    return source._replace(rows=Rows(source.rows.table.select(numbers), reader), numbers=numbers)


def _count(format: PreferenceFormat, row: Mapping[str, Any] | Unread) -> int:
    try:
        return 1 if isinstance(row, Unread) else len(format.examples(row))
    except OF_A_ROW:  # encoding says which
        return 1


def _column_names(source: RowSource, format: PreferenceFormat, comparing: Comparing) -> tuple[str, ...]:
    """Name the numbers that a source's rows have, by the first one that is used; encoding holds the others to it."""
    for row in source.rows.each():
        found = read_checked(row, format, comparing)
        if not isinstance(found, Dropped):
            return tuple(comparing.of(found).columns)
    return ()


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _fingerprint(source: RowSource, format: PreferenceFormat, encoder: PromptEncoder, comparing: Comparing) -> str:
    from datasets.fingerprint import generate_fingerprint

    if not source.content and not source.rows.table.cache_files:
        return uuid4().hex  # rows in memory, of which no file is kept that could be asked for
    code = code_digest(encode_rows, type(encoder), type(source.rows.reader), own=[type(format)])
    content = source.content or generate_fingerprint(source.rows.table)
    key = [content, sorted(source.rows.column_names), encoder.fingerprint, code, repr(format), *comparing]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _encode_source(
    source: RowSource,
    format: PreferenceFormat,
    encoder: PromptEncoder,
    comparing: Comparing,
    names: tuple[str, ...],
    fingerprint: str,
) -> Dataset:
    table, reader, name = source.rows.table, source.rows.reader, source.name
    return mapped(
        table,
        lambda cells, numbers: encode_rows(reader(cells, numbers), name, format, encoder, comparing, names),
        source.cache / f"{fingerprint}.arrow" if source.content else None,
        with_indices=True,
        remove_columns=table.column_names,
        features=features(names),
        new_fingerprint=fingerprint,
        desc=f"Encoding {source.name}",
    )


def encode_rows(
    given: Sequence[Mapping[str, Any] | Unread],
    name: str,
    format: PreferenceFormat,
    encoder: PromptEncoder,
    comparing: Comparing,
    columns: tuple[str, ...],
) -> dict[str, list[Any]]:
    """Return the columns of `storage.features` for some rows.

    Args:
        given: the rows.
        name: of the file that they are from.
        format: reads them.
        encoder: of prompts and completions.
        comparing: which completions are compared.
        columns: names of the numbers that comparisons have.

    Raises:
        DataError: for what is wrong with all rows; a bad one is dropped.
    """
    rows = [read_checked(row, format, comparing) for row in given]
    nothing = Compared((), {column: [] for column in columns})
    compared = [nothing if isinstance(row, Dropped) else comparing.of(row) for row in rows]
    rows = [
        row if {*one.columns} == {*columns} else _other(columns, one) for row, one in zip(rows, compared, strict=True)
    ]
    try:
        used = [_resolved(row, one) for row, one in zip(rows, compared, strict=True) if not isinstance(row, Dropped)]
        encoded = iter(encoder.encode(used))
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    results = [row if isinstance(row, Dropped) else next(encoded) for row in rows]
    identical = [row.chosen == row.rejected if isinstance(row, Preference) else None for row in rows]
    return {
        **laid_out(results, identical),
        "prompt_key": [_key(row) for row in rows],
        "ranked": [_ranked(row) for row in rows],
        **{
            stored(name): [
                [] if isinstance(result, Dropped) else [one.columns[name][number] for number in result.kept]
                for one, result in zip(compared, results, strict=True)
            ]
            for name in columns
        },
    }


def read_checked(
    row: Mapping[str, Any] | Unread, format: PreferenceFormat, comparing: Comparing
) -> Preference | Ranking | Dropped:
    """Read and check a row; one that cannot be used is dropped, and bad."""
    if isinstance(row, Unread):
        return Dropped(row.reason, fatal=True)
    try:
        found = read_row(format, row)
        if isinstance(found, Skipped):
            return Dropped(found.reason)
        check_row(found, comparing)
    except OF_A_ROW as error:
        return Dropped(reason_of(error, format), fatal=True)
    return found


def _other(columns: Sequence[str], one: Compared) -> Dropped:
    wanted, came = _list(columns), _list(tuple(one.columns))
    reason = f"Expected the columns of numbers of the first row, {wanted}, in every row but got {came}"
    return Dropped(reason, fatal=True)


def _ranked(row: Preference | Ranking | Dropped) -> int:
    """How many completions have scores or ranks; none where the row itself says what is compared."""
    return len(row.completions) if isinstance(row, Ranking) and row.comparisons is None else 0


def _resolved(row: Preference | Ranking, compared: Compared) -> Preference | Ranking:
    """Return the row with its comparisons."""
    if isinstance(row, Preference):
        return row
    return row._replace(scores=None, ranks=None, comparisons=compared.comparisons, columns={})


def _key(row: Preference | Ranking | Dropped) -> int:
    """64 bits of a hash: among ten million prompts two different ones meet with a probability of 3e-6."""
    said: Any = row.reason if isinstance(row, Dropped) else row.prompt
    if not isinstance(row, Dropped) and row.template:
        said = [said, dict(row.template)]
    digest = hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
