"""Rows of the same prompt as one example: its tokens are computed once, however many rows they are in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice, pairwise, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_dpo.data.batch import EncodedPrompt
from lit_dpo.data.digests import code_digest
from lit_dpo.data.encode import PromptEncoder
from lit_dpo.data.storage import ROW_NUMBERS, examples_of, features, laid_out, lists, mapped, stored
from lit_dpo.data.table import PromptTable
from lit_dpo.data.truncation import Dropped, Fitted, merged

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, Table

_AT_ONCE = 1000


class _Row(NamedTuple):
    """A row as it was encoded, whole."""

    number: int
    example: EncodedPrompt
    columns: list[list[float]]
    prompt_key: int
    ranked: int
    dropped: str
    bad: int
    remarks: list[str]


def merge_prompts(
    table: PromptTable, encoder: PromptEncoder, most: int, keys: Sequence[str], without: NDArray[np.int64]
) -> PromptTable:
    """Merge rows whose prompts have the same token ids; what comes from files is merged once.

    Equal completions become one; every comparison stays, with its row's number and its columns.

    Args:
        table: of rows that were encoded without limits.
        encoder: fits the merged ones to its limits.
        most: completions of an example. Where there are more, the rows go on in a further example with the same prompt;
            a row that has more by itself is an example of its own.
        keys: fingerprints of the table's parts.
        without: rows that are left out, each for an earlier one.
    """
    from datasets import Dataset, Value
    from datasets import List as ListOf

    source = table.sources[0]
    on_disk = all(one.content or one.rows.table.cache_files for one in table.sources)
    key = [*keys, encoder.fingerprint, most, code_digest(_merge), len(without)] if on_disk else keys
    fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    groups = cache(lambda: _groups(table, without))  # not made if the result is in the cache
    # a row of this for every so many groups, of which there are fewer than rows
    parts = Dataset.from_dict({"part": range(-(-table.total // _AT_ONCE))})
    encoded = mapped(
        parts,
        lambda cells: _merge(table, groups().part(cells["part"][0]), encoder, most),
        source.cache / f"{fingerprint}.arrow" if on_disk else None,
        batch_size=1,
        remove_columns=["part"],
        features=features(table.columns, **{ROW_NUMBERS: ListOf(Value("int64"))}),
        new_fingerprint=fingerprint,
        desc="Merging rows by prompt",
    )
    return table._replace(encoded=encoded.with_format("arrow"))


class _Groups(NamedTuple):
    """The rows of each prompt: `order[starts[n] : starts[n + 1]]`, in the order of the first ones."""

    order: NDArray[np.int64]
    starts: list[int]

    def part(self, number: int) -> list[list[int]]:
        """Return a part of the groups, of up to `_AT_ONCE`."""
        starts = self.starts[number * _AT_ONCE :][: _AT_ONCE + 1]
        return [self.order[start:end].tolist() for start, end in pairwise(starts)]


def _groups(table: PromptTable, without: NDArray[np.int64]) -> _Groups:
    """Find the rows whose prompts have equal ids; a dropped row, which has none, is a group of its own."""
    ids = _Ids(table.encoded.data.column("prompt_ids"))
    hashes = np.fromiter((hash(one) for one in ids), np.int64, table.total)
    order = hashes.argsort(kind="stable")
    first = np.arange(table.total)
    alike = np.flatnonzero(np.diff(hashes[order]) == 0)
    borders = np.flatnonzero(np.diff(alike) != 1) + 1
    for run in np.split(alike, borders) if len(alike) else []:
        found: dict[bytes, int] = {}
        for row in order[run[0] : run[-1] + 2].tolist():
            if content := ids[row]:
                first[row] = found.setdefault(content, row)
    order = first.argsort(kind="stable")
    order = order[~np.isin(order, without)]
    starts = np.flatnonzero(np.diff(first[order], prepend=-1))
    return _Groups(order, [*starts.tolist(), len(order)])


class _Ids:
    """The bytes of each list of numbers in an Arrow column, which stays where it is mapped."""

    def __init__(self, column: ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self.starts = np.cumsum([0, *map(len, chunks)])
        self.chunks = [(chunk.offsets.to_numpy().tolist(), chunk.values.to_numpy()) for chunk in chunks]

    def __iter__(self) -> Iterator[bytes]:
        for offsets, values in self.chunks:
            for start, end in pairwise(offsets):
                yield values[start:end].tobytes()

    def __getitem__(self, row: int) -> bytes:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        offsets, values = self.chunks[number]
        inside = row - int(self.starts[number])
        found: bytes = values[offsets[inside] : offsets[inside + 1]].tobytes()
        return found


def _merge(table: PromptTable, groups: list[list[int]], encoder: PromptEncoder, most: int) -> dict[str, list[Any]]:
    """Columns of the examples that some groups make."""
    rows = _rows(table, [number for group in groups for number in group])
    examples, keys = [], []
    for group in groups:
        parts = list(_parts(list(islice(rows, len(group))), most, encoder))
        examples += parts
        keys += [parts[0][0].prompt_key] * len(parts)
    results = [_fitted(example, encoder) for example in examples]
    kept = [() if isinstance(result, Dropped) else result.kept for result in results]
    numbers: list[list[Any]] = [
        [row.number for row in example for _ in row.example.comparisons] for example in examples
    ]
    by_name = {ROW_NUMBERS: numbers} | {
        stored(name): [[one for row in example for one in row.columns[place]] for example in examples]
        for place, name in enumerate(table.columns)
    }
    by_name = {name: _picked(values, kept) for name, values in by_name.items()}
    for place, result in enumerate(results):
        if isinstance(result, Dropped) and result.fatal:  # one row, which is reported
            by_name[ROW_NUMBERS][place] = [examples[place][0].number]
    return {
        **laid_out(results, [None] * len(examples)),
        "prompt_key": keys,
        "ranked": [max(row.ranked for row in example) for example in examples],
        **by_name,
    }


def _rows(table: PromptTable, numbers: list[int]) -> Iterator[_Row]:
    cells: Table = table.encoded[numbers].combine_chunks()
    columns = [lists(cells.column(stored(name))) for name in table.columns]
    facts = [cells.column(name).to_pylist() for name in ("prompt_key", "ranked", "dropped", "bad", "remarks")]
    examples = examples_of(cells)
    values = zip(*columns, strict=True) if columns else repeat([])
    for number, example, numbers_of, *rest in zip(numbers, examples, values, *facts, strict=False):
        yield _Row(number, example, list(numbers_of), *rest)


def _parts(rows: list[_Row], most: int, encoder: PromptEncoder) -> Iterator[list[_Row]]:
    """Cut the rows of a prompt where there would be more than `most` different completions; a bad one is alone."""
    part: list[_Row] = []
    seen: set[tuple[int, ...]] = set()
    for row in rows:
        if encoder.truncation == "error" and not row.dropped and isinstance(encoder.fit(row.example), Dropped):
            yield [row]
            continue
        own = set(map(tuple, row.example.completions))
        if part and len(seen | own) > most:
            yield part
            part, seen = [], set()
        part.append(row)
        seen |= own
    if part:
        yield part


def _fitted(rows: list[_Row], encoder: PromptEncoder) -> Fitted | Dropped:
    if rows[0].dropped:
        return Dropped(rows[0].dropped, fatal=bool(rows[0].bad))
    result = encoder.fit_apart(_together([row.example for row in rows]))
    if isinstance(result, Dropped):
        return result
    return result.remarked(*(remark for row in rows for remark in row.remarks))


def _together(examples: list[EncodedPrompt]) -> EncodedPrompt:
    if len(examples) == 1:
        return examples[0]
    completions: list[list[int]] = []
    comparisons: list[tuple[int, int]] = []
    for one in examples:
        start = len(completions)
        completions += one.completions
        comparisons += [(start + chosen, start + rejected) for chosen, rejected in one.comparisons]
    return merged(EncodedPrompt(examples[0].prompt, completions, comparisons))


def _picked(values: list[list[Any]], kept: Sequence[Sequence[int]]) -> list[list[Any]]:
    return [[those[place] for place in places] for those, places in zip(values, kept, strict=True)]
