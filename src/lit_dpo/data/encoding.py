"""From the rows of files to a table of encoded prompts, once for the same content, and then from the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_dpo.data.comparisons import Compared, Comparing, check_row
from lit_dpo.data.digests import code_digest
from lit_dpo.data.encode import PromptEncoder
from lit_dpo.data.formats.base import Preference, PreferenceFormat, Ranking, Skipped
from lit_dpo.data.grouping import merge_prompts
from lit_dpo.data.sources import RowSource
from lit_dpo.data.storage import features, laid_out, stored
from lit_dpo.data.table import PromptTable
from lit_dpo.data.truncation import Dropped
from lit_dpo.errors import DataError
from lit_dpo.writing import refusals

if TYPE_CHECKING:
    from datasets import Dataset

    from lit_dpo.data.streaming import StreamSource


def encode_table(
    sources: Sequence[RowSource],
    format: PreferenceFormat | Sequence[PreferenceFormat],
    encoder: PromptEncoder,
    comparing: Comparing = Comparing(),  # noqa: B008 - a record
    group_by_prompt: int | None = None,
) -> PromptTable:
    """Read, check and encode every row; what is on disk is encoded once and then memory-mapped.

    Once, that is, for the same content (wherever it lies), format with its code, tokenizer and limits.

    Args:
        sources: of the rows.
        format: reads them, or one for each source.
        encoder: of prompts and completions.
        comparing: which completions are compared.
        group_by_prompt: merge rows of the same prompt into examples of up to so many completions. None: a row is one.

    Raises:
        DataError: for the first row that cannot be used, with its file and number (from 0).
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
    table = PromptTable(sources, formats[0], encoded, np.arange(len(encoded)), columns, formats)
    if group_by_prompt is not None:
        table = merge_prompts(table, encoder, group_by_prompt, keys)
    return table._replace(rows=np.flatnonzero(table.facts("length")))


def _spread(source: RowSource, format: PreferenceFormat) -> RowSource:
    """Return the source with a row for each example, where a row of it may hold several."""
    from datasets import Dataset

    if type(format).examples is PreferenceFormat.examples:
        return source
    rows: list[Mapping[str, Any]] = []
    numbers: list[int] = []
    for number, row in enumerate(source.rows):
        try:
            found = format.examples(row)
        except DataError as error:
            raise DataError(f"{source.place(number)}: {error}") from None
        rows += found
        numbers += [number] * len(found)
    return source._replace(rows=Dataset.from_list([dict(row) for row in rows]), numbers=numbers)


def _column_names(source: RowSource, format: PreferenceFormat, comparing: Comparing) -> tuple[str, ...]:
    """Name the numbers that a source's rows have, by the first one; encoding holds the others to it."""
    for number, row in enumerate(source.rows):
        found = _read(source, number, format, comparing, row)
        if not isinstance(found, Skipped):
            return tuple(comparing.of(found).columns)
    return ()


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _fingerprint(source: RowSource, format: PreferenceFormat, encoder: PromptEncoder, comparing: Comparing) -> str:
    from datasets.fingerprint import generate_fingerprint

    code = code_digest(_encode_rows, type(encoder), own=[type(format)])
    content = source.content or generate_fingerprint(source.rows)
    key = [content, encoder.fingerprint, code, repr(format), *comparing]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _encode_source(
    source: RowSource,
    format: PreferenceFormat,
    encoder: PromptEncoder,
    comparing: Comparing,
    names: tuple[str, ...],
    fingerprint: str,
) -> Dataset:
    with refusals(source.cache):
        return source.rows.map(
            lambda cells, numbers: _encode_rows(source, cells, numbers, format, encoder, comparing, names),
            batched=True,
            with_indices=True,
            remove_columns=source.rows.column_names,
            features=features(names),
            new_fingerprint=fingerprint,
            cache_file_name=str(source.cache / f"{fingerprint}.arrow") if source.content else None,
            desc=f"Encoding {source.name}",
        )


def _encode_rows(
    source: RowSource | StreamSource,
    cells: dict[str, list[Any]],
    numbers: list[int],
    format: PreferenceFormat,
    encoder: PromptEncoder,
    comparing: Comparing,
    columns: tuple[str, ...],
) -> dict[str, list[Any]]:
    by_row = ({column: those[place] for column, those in cells.items()} for place in range(len(numbers)))
    rows = [_read(source, number, format, comparing, row) for number, row in zip(numbers, by_row, strict=True)]
    nothing = Compared((), {column: [] for column in columns})
    compared = [nothing if isinstance(row, Skipped) else comparing.of(row) for row in rows]
    for number, one in zip(numbers, compared, strict=True):
        if {*one.columns} != {*columns}:
            raise DataError(
                f"{source.place(number)}: Expected the columns of numbers of the first row, {_list(columns)}, "
                f"in every row but got {_list(tuple(one.columns))}."
            )
    try:
        used = [_resolved(row, one) for row, one in zip(rows, compared, strict=True) if not isinstance(row, Skipped)]
        encoded = iter(encoder.encode(used))
    except DataError as error:
        raise DataError(f"{source.name}: {error}") from None
    results = [Dropped(row.reason) if isinstance(row, Skipped) else next(encoded) for row in rows]
    for number, result in zip(numbers, results, strict=True):
        if isinstance(result, Dropped) and result.fatal:
            raise DataError(f"{source.place(number)}: {result.reason}.")
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


def _read(
    source: RowSource | StreamSource,
    number: int,
    format: PreferenceFormat,
    comparing: Comparing,
    row: Mapping[str, Any],
) -> Preference | Ranking | Skipped:
    try:
        found = format.read(row)
        if not isinstance(found, Skipped):
            check_row(found, comparing)
    except DataError as error:
        raise DataError(f"{source.place(number)}: {error}") from None
    return found


def _ranked(row: Preference | Ranking | Skipped) -> int:
    """How many completions have scores or ranks; none where the row itself says what is compared."""
    return len(row.completions) if isinstance(row, Ranking) and row.comparisons is None else 0


def _resolved(row: Preference | Ranking, compared: Compared) -> Preference | Ranking:
    """Return the row with its comparisons."""
    if isinstance(row, Preference):
        return row
    return row._replace(scores=None, ranks=None, comparisons=compared.comparisons, columns={})


def _key(row: Preference | Ranking | Skipped) -> int:
    """64 bits of a hash: among ten million prompts two different ones meet with a probability of 3e-6."""
    said: Any = row.reason if isinstance(row, Skipped) else row.prompt
    if not isinstance(row, Skipped) and row.template:
        said = [said, dict(row.template)]
    digest = hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
