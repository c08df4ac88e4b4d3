"""Which examples of a table say the same, by their token ids: bytes are compared, whichever the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_dpo.data.storage import counts_of, inner_of, ragged, stored, values_of
from lit_dpo.data.table import PromptTable


def same_examples(table: PromptTable) -> NDArray[np.int64]:
    """`(N,)` for each used example the place of the first that says the same.

    That is: the same prompt, completions, comparisons, and numbers of these, such as `weight`. By a hash of 64 bits:
    among a million examples two different ones meet with a probability of 3e-8.
    """
    said = np.fromiter(map(hash, _sayings(table)), np.int64, table.size)
    _, first, codes = np.unique(said, return_index=True, return_inverse=True)
    found: NDArray[np.int64] = first[codes]
    return found


def repeated_rows(table: PromptTable) -> NDArray[np.int64]:
    """Rows of `table.encoded` that are used and say what an earlier one says."""
    same = same_examples(table)
    found: NDArray[np.int64] = table.rows[same != np.arange(table.size)]
    return found


def _sayings(table: PromptTable) -> Iterator[tuple[Any, ...]]:
    """Return something that is equal for examples that say the same."""
    prompts, completions = prompt_ids(table).hashes(), completion_ids(table).hashes()
    columns = (table.encoded.data.column(stored(name)) for name in table.columns)
    numbers = [ragged(values_of(column), counts_of(column), table.rows) for column in columns]
    compared = numbers if table.holds_pairs else [table.comparisons, *numbers]
    end = 0
    counts = zip(table.completions_per_prompt, table.comparisons_per_prompt, strict=True)
    for prompt, (count, comparisons) in zip(prompts, counts, strict=True):
        said = (values[end : end + comparisons].tobytes() for values in compared)
        yield prompt, *islice(completions, count), *said
        end += comparisons


class Ids(NamedTuple):
    """Token ids of `T` texts, which stay where they are mapped.

    Attributes:
        chunks: ids of many texts each, one after another.
        chunk_of: `(T,)` the chunk of each text, ascending.
        starts: `(T,)` where a text begins in its chunk.
        ends: `(T,)` where it ends.
    """

    chunks: Sequence[NDArray[np.int32]]
    chunk_of: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def of(self, n: int) -> NDArray[np.int32]:
        """Return those of one text."""
        found: NDArray[np.int32] = self.chunks[self.chunk_of[n]][self.starts[n] : self.ends[n]]
        return found

    def hashes(self) -> Iterator[int]:
        """Give a hash of each text, equal for equal ones within this process."""
        for values, part in self._parts():
            for start, end in zip(self.starts[part].tolist(), self.ends[part].tolist(), strict=True):
                yield hash(values[start:end].tobytes())

    def last(self, count: int) -> NDArray[np.int64]:
        """`(T, count)` the last ids of each text; -1 before its first one."""
        found = np.full((len(self.ends), count), -1, np.int64)
        for values, part in self._parts():
            for place in range(count):
                at = self.ends[part] - count + place
                inside = at >= self.starts[part]
                found[part, place][inside] = values[at[inside]]
        return found

    def _parts(self) -> Iterator[tuple[NDArray[np.int32], slice]]:
        """Go through the chunks, each with the texts that are in it."""
        bounds = np.searchsorted(self.chunk_of, np.arange(len(self.chunks) + 1)).tolist()
        yield from zip(self.chunks, map(slice, bounds[:-1], bounds[1:]), strict=True)


def prompt_ids(table: PromptTable) -> Ids:
    """Return the token ids of the prompts that are used."""
    return _ids([chunk for chunk in table.encoded.data.column("prompt_ids").chunks if len(chunk)], table.rows)


def completion_ids(table: PromptTable) -> Ids:
    """Return the token ids of the completions that are used, prompt after prompt."""
    column = table.encoded.data.column("completion_ids")
    used = np.zeros(table.total, np.bool_)
    used[table.rows] = True
    texts = np.flatnonzero(np.repeat(used, counts_of(column)))
    return _ids([inner_of(chunk) for chunk in column.chunks if len(chunk)], texts)


def _ids(chunks: Sequence[Any], texts: NDArray[np.int64]) -> Ids:
    offsets = [chunk.offsets.to_numpy().astype(np.int64) - chunk.offsets[0].as_py() for chunk in chunks]
    chunk_of = np.repeat(np.arange(len(chunks)), [len(one) - 1 for one in offsets])
    starts, ends = (np.concatenate([one[which] for one in offsets]) for which in (slice(-1), slice(1, None)))
    return Ids([inner_of(chunk).to_numpy() for chunk in chunks], chunk_of[texts], starts[texts], ends[texts])


def sides(table: PromptTable) -> NDArray[np.int64]:
    """`(2, B)` places of the chosen and the rejected completions among all that are used."""
    starts = table.completions_per_prompt.cumsum() - table.completions_per_prompt
    places: NDArray[np.int64] = table.comparisons + starts.repeat(table.comparisons_per_prompt)[:, None]
    return places.T
