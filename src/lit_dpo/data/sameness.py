"""Which examples of a table say the same, by their token ids: bytes are compared, whichever the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_dpo.data.storage import counts_of, inner_of, ragged, stored, values_of
from lit_dpo.data.table import PromptTable


def same_examples(table: PromptTable) -> NDArray[np.int64]:
    """`(N,)` for each used example the place of the first that says the same.

    That is: the same prompt, completions, comparisons, and numbers of these, such as `weight`.
    """
    first: dict[Any, int] = {}
    return np.fromiter((first.setdefault(one, place) for place, one in enumerate(_sayings(table))), np.int64)


def repeated_rows(table: PromptTable) -> NDArray[np.int64]:
    """Rows of `table.encoded` that are used and say what an earlier one says."""
    same = same_examples(table)
    found: NDArray[np.int64] = table.rows[same != np.arange(table.size)]
    return found


def _sayings(table: PromptTable) -> Iterator[tuple[Any, ...]]:
    """Return something that is equal for examples that say the same; hashes of 64 bits, three or more."""
    prompts, completions = prompt_ids(table).hashes(), completion_ids(table).hashes()
    columns = (table.encoded.data.column(stored(name)) for name in table.columns)
    numbers = [ragged(values_of(column), counts_of(column), table.rows) for column in columns]
    compared = numbers if table.holds_pairs else [table.comparisons, *numbers]
    last, end = 0, 0
    counts = zip(table.completions_per_prompt.tolist(), table.comparisons_per_prompt.tolist(), strict=True)
    for prompt, (count, comparisons) in zip(prompts, counts, strict=True):
        said = (values[end : end + comparisons].tobytes() for values in compared)
        yield prompt, *completions[last : last + count], *said
        last, end = last + count, end + comparisons


class Ids(NamedTuple):
    """Token ids of many texts: those of text `n` are `values[starts[n] : ends[n]]`."""

    values: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def of(self, n: int) -> NDArray[np.int32]:
        """Return those of one text."""
        return self.values[self.starts[n] : self.ends[n]]

    def hashes(self) -> list[int]:
        """Return a hash of each text, equal for equal ones within this process."""
        ends = zip(self.starts.tolist(), self.ends.tolist(), strict=True)
        return [hash(self.values[start:end].tobytes()) for start, end in ends]


def prompt_ids(table: PromptTable) -> Ids:
    """Return the token ids of the prompts that are used."""
    return _ids([chunk for chunk in table.encoded.data.column("prompt_ids").chunks if len(chunk)], table.rows)


def completion_ids(table: PromptTable) -> Ids:
    """Return the token ids of the completions that are used, prompt after prompt."""
    chunks = [chunk for chunk in table.encoded.data.column("completion_ids").chunks if len(chunk)]
    counts = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks])
    used = np.zeros(len(counts), np.bool_)
    used[table.rows] = True
    return _ids([inner_of(chunk) for chunk in chunks], np.flatnonzero(np.repeat(used, counts)))


def _ids(chunks: Sequence[Any], rows: NDArray[np.int64]) -> Ids:
    values = [inner_of(chunk).to_numpy() for chunk in chunks]
    counts = [np.diff(chunk.offsets.to_numpy()) for chunk in chunks]
    lengths = np.concatenate([np.zeros(0, np.int64), *counts]).astype(np.int64)
    stops = lengths.cumsum()
    joined = values[0] if len(values) == 1 else np.concatenate([np.zeros(0, np.int32), *values])
    return Ids(joined, (stops - lengths)[rows], stops[rows])


def sides(table: PromptTable) -> NDArray[np.int64]:
    """`(2, B)` places of the chosen and the rejected completions among all that are used."""
    starts = table.completions_per_prompt.cumsum() - table.completions_per_prompt
    places: NDArray[np.int64] = table.comparisons + starts.repeat(table.comparisons_per_prompt)[:, None]
    return places.T
