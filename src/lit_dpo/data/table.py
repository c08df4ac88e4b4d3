"""One split of encoded prompts: an Arrow table with a row for every example, and the rows that are used."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_dpo.data.bad_rows import form
from lit_dpo.data.batch import CompletionBatch, collate
from lit_dpo.data.formats.base import Preference, PreferenceFormat, Ranking, Skipped
from lit_dpo.data.formats.turns import read_row
from lit_dpo.data.sources import RowSource
from lit_dpo.data.storage import EXAMPLE, ROW_NUMBERS, counts_of, examples_of, inner_of, ragged, stored, values_of
from lit_dpo.errors import DataError, sentence

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import ChunkedArray, Table


class PromptTable(NamedTuple):
    """Encoded prompts with their completions, fetched by lists of indices: `table.batch([3, 0])` holds two.

    Row numbers (`batch.indices`, the argument of `preference`) count the rows of all files of the split, one after
    another, dropped ones too, from 0. Indices count the used examples: a row is one, or several that were merged.

    Attributes:
        sources: the raw rows.
        format: reads a raw row of the first source.
        encoded: token ids and facts, in Arrow's format, one row per example; a dropped one has no ids. Where rows were
            merged, the numbers of those that the comparisons are from.
        rows: `(N,)` rows of `encoded` that are used, ascending.
        columns: names of the numbers that the comparisons have.
        repeated: rows that were left out because an earlier one says the same.
    """

    sources: list[RowSource]
    formats: Sequence[PreferenceFormat]
    encoded: Dataset
    rows: NDArray[np.int64]
    columns: tuple[str, ...] = ()
    repeated: int = 0

    # --- counts ----------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Prompts that are used, `N`."""
        return len(self.rows)

    @property
    def total(self) -> int:
        """Examples, dropped ones too."""
        return len(self.encoded)

    @property
    def is_merged(self) -> bool:
        """Whether an example may be of several rows."""
        return ROW_NUMBERS in self.encoded.column_names

    @property
    def has_merged(self) -> bool:
        """Whether any example is of several rows."""
        return self.total < sum(len(source.rows) for source in self.sources)

    @property
    def holds_pairs(self) -> bool:
        """Whether each prompt has two completions and one comparison; of no prompts, whether none had a ranking."""
        if not self.size:
            return not self.facts("ranked").any()
        return bool((self.completions_per_prompt == 2).all() and (self.comparisons_per_prompt == 1).all())

    @property
    def holds_conversations(self) -> bool:
        """Whether the first example is messages rather than text."""
        return bool(self.size) and self.preference(self.first_row(0)).is_conversation

    @property
    def unit(self) -> str:
        """What reports call the examples."""
        return "pairs" if self.holds_pairs else "prompts"

    @property
    def summary(self) -> str:
        """How many there are, in words."""
        if self.holds_pairs:
            return f"{self.size} pairs"
        completions, comparisons = len(self.completion_lengths), self.comparisons_count
        return f"{self.size} prompts with {completions} completions and {comparisons} comparisons"

    @property
    def comparisons_count(self) -> int:
        """Comparisons, `B`."""
        return int(self.comparisons_per_prompt.sum())

    @property
    def identical(self) -> int:
        """Comparisons whose two completions are the same."""
        return int(self.facts("identical")[self.rows].sum())

    @property
    def lost(self) -> int:
        """Completions that are missing because they are too long, of prompts that are used."""
        return int(self.facts("lost")[self.rows].sum())

    @property
    def dropped(self) -> Counter[str]:
        """How many examples were dropped, by reason; of bad ones without what is the row's own."""
        import pyarrow as pa

        good = pa.array(self.facts("bad") == 0)
        counts = self._column("dropped").filter(good).value_counts().to_pylist()
        found = Counter({one["values"]: one["counts"] for one in counts if one["values"]})
        return found + Counter(form(reason) for _, reason in self.bad)

    @property
    def bad(self) -> list[tuple[int, str]]:
        """Row numbers of the rows that cannot be used, and why not, in order."""
        places = np.flatnonzero(self.facts("bad"))
        if not len(places):
            return []
        reasons = self._column("dropped").take(places).to_pylist()
        rows = values_of(self._column(ROW_NUMBERS).take(places)) if self.is_merged else places
        return sorted(zip(rows.tolist(), reasons, strict=True))

    @property
    def remarks(self) -> Counter[str]:
        """How many of the examples that are used have each remark."""
        from pyarrow.compute import list_flatten

        flat = list_flatten(self._column("remarks").take(self.rows))
        return Counter({one["values"]: one["counts"] for one in flat.value_counts().to_pylist()})

    # --- lengths ---------------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`(N,)` tokens per prompt with all its completions."""
        return self.facts("length")[self.rows]

    @property
    def prompt_lengths(self) -> NDArray[np.int64]:
        """`(N,)` tokens per prompt."""
        return counts_of(self._column("prompt_ids"))[self.rows]

    @property
    def completions_per_prompt(self) -> NDArray[np.int64]:
        """`(N,)`."""
        return counts_of(self._column("completion_ids"))[self.rows]

    @property
    def completion_lengths(self) -> NDArray[np.int64]:
        """`(C,)` tokens per completion, prompt after prompt."""
        column = self._column("completion_ids")
        inner = [counts_of(inner_of(chunk)) for chunk in column.chunks]
        return ragged(np.concatenate(inner), counts_of(column), self.rows)

    @property
    def comparisons_per_prompt(self) -> NDArray[np.int64]:
        """`(N,)`."""
        return counts_of(self._column("comparisons"))[self.rows] // 2

    @property
    def comparisons(self) -> NDArray[np.int64]:
        """`(B, 2)` places of the chosen and the rejected completion among their prompt's own, prompt after prompt."""
        return self._of_comparisons("comparisons").astype(np.int64).reshape(-1, 2)

    @property
    def side_lengths(self) -> NDArray[np.int64]:
        """`(N,)` tokens of the prompt with its longest completion."""
        counts = self.completions_per_prompt
        starts = counts.cumsum() - counts
        longest = np.maximum.reduceat(self.completion_lengths, starts) if self.size else starts
        return self.prompt_lengths + longest

    def part_lengths(self, indices: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
        """Tokens of the prompt, and of each completion, of the examples at these indices."""
        examples = examples_of(self._cells(indices))
        return [(len(one.prompt), tuple(map(len, one.completions))) for one in examples]

    # --- contents --------------------------------------------------------------------------------------------------

    def batch(self, indices: Sequence[int]) -> CompletionBatch:
        """Lay the examples at these indices out in one row."""
        cells = self._cells(indices)
        columns = {name: values_of(cells.column(stored(name))).tolist() for name in self.columns}
        return collate(examples_of(cells), self._row_numbers(indices, cells).tolist(), columns)

    def preference(self, row: int) -> Preference | Ranking:
        """Read the raw preference or ranking of a row number."""
        number, inside = self.find(row)
        found = read_row(self.formats[number], self.sources[number].rows[inside])
        if isinstance(found, Skipped):
            raise LookupError(f"Expected a row that is used but {self.place(row)} is not: {sentence(found.reason)}")
        return found

    def prompts(self, limit: int) -> list[tuple[int, list[int], Preference | Ranking]]:
        """Return the first `limit` different prompts: row number, token ids as trained on, what the row says."""
        first = np.sort(np.unique(self.prompt_keys, return_index=True)[1])[:limit].tolist()
        cells = self._cells(first)
        starts = np.cumsum([0, *counts_of(cells.column("comparisons"))[:-1] // 2])
        rows = self._row_numbers(first, cells)[starts].tolist()
        return [(row, one.prompt, self.preference(row)) for row, one in zip(rows, examples_of(cells), strict=True)]

    def first_row(self, index: int) -> int:
        """Return the row number of an example's first comparison."""
        return int(self._row_numbers([index], self._cells([index]))[0])

    def place(self, row: int) -> str:
        """Say in which file a row is, and its number there."""
        number, inside = self.find(row)
        return self.sources[number].place(inside)

    @property
    def prompt_keys(self) -> NDArray[np.int64]:
        """`(N,)` equal for equal prompts."""
        return self.facts("prompt_key")[self.rows]

    @property
    def digest(self) -> str:
        """Of what the used examples say, in their order: lengths and columns of all, token ids of up to 4096."""
        parts = self.completions_per_prompt
        starts = parts.cumsum() - parts
        said = [np.insert(self.completion_lengths, starts, self.prompt_lengths)]
        if not self.holds_pairs:
            said += [parts, self.comparisons_per_prompt, self.comparisons]
        said += [self._of_comparisons(stored(name)).astype(np.float32) for name in self.columns]
        places = np.unique(np.linspace(0, self.size - 1, min(self.size, 4096)).astype(np.int64))
        examples = examples_of(self._cells(places))
        by_place = zip_longest(*(one.completions for one in examples), fillvalue=[])
        ids = [[one.prompt for one in examples], *by_place]
        said += [np.array(one, np.int32) for those in ids for one in those]
        digest = hashlib.blake2b(digest_size=16)
        for one in said:
            digest.update(one.tobytes())
        return digest.hexdigest()

    def first_beyond(self, vocabulary: int, context: int | None) -> str | None:
        """Where the first comparison is that a model with these limits cannot read, and why; None if there is none.

        Args:
            vocabulary: ids from 0 that the model knows.
            context: most tokens of a prompt and one completion. None: no limit.
        """
        from pyarrow.compute import max as largest

        chunks = [inner_of(chunk) for chunk in self._column("prompt_ids").chunks]
        chunks += [inner_of(inner_of(chunk)) for chunk in self._column("completion_ids").chunks]
        highest = max(largest(chunk).as_py() or 0 for chunk in chunks)
        if highest < vocabulary and (context is None or self.side_lengths.max(initial=0) <= context):
            return None
        for index in range(self.size):
            cells = self._cells([index])
            (one,) = examples_of(cells)
            for row, pair in zip(self._row_numbers([index], cells).tolist(), one.comparisons, strict=True):
                highest = max(max(one.prompt), *(max(one.completions[place]) for place in pair))
                length = len(one.prompt) + max(len(one.completions[place]) for place in pair)
                if highest >= vocabulary:
                    return f"{self.place(row)}: token id {highest}"
                if context is not None and length > context:
                    return f"{self.place(row)}: {length} tokens"
        return None

    def hold_out(self, fraction: float, seed: int) -> tuple[PromptTable, PromptTable]:
        """Two tables with no prompt in common; the second has a fraction of the prompts, at least one.

        Raises:
            DataError: if there are fewer than two prompts.
        """
        keys = self.prompt_keys
        prompts = np.unique(keys)
        if len(prompts) < 2:
            raise DataError(
                f"Expected at least two different prompts for `val_split={fraction}` but got {len(prompts)}."
            )
        count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
        held = np.isin(keys, np.random.Generator(np.random.PCG64(seed)).permutation(prompts)[:count])
        return self._replace(rows=self.rows[~held]), self._replace(rows=self.rows[held])

    # --- cells -----------------------------------------------------------------------------------------------------

    def facts(self, name: str) -> NDArray[Any]:
        """`(total,)` one number per example: `length`, `prompt_key`, `identical`, `lost` or `ranked`."""
        values: NDArray[Any] = self._column(name).to_numpy()
        return values

    def _column(self, name: str) -> ChunkedArray:
        return self.encoded.data.column(name)

    def _cells(self, indices: Sequence[int] | NDArray[np.int64]) -> Table:
        """Fetch what is read of some examples, each column as one array."""
        found: Table = self.encoded[self.rows[list(indices)].tolist()]
        wanted = {*EXAMPLE, ROW_NUMBERS, *map(stored, self.columns)}
        return found.select([name for name in found.column_names if name in wanted]).combine_chunks()

    def _of_comparisons(self, name: str) -> NDArray[Any]:
        """Return what a column of lists holds for the used examples, one after another."""
        column = self._column(name)
        return ragged(values_of(column), counts_of(column), self.rows)

    def _row_numbers(self, indices: Sequence[int] | NDArray[np.int64], cells: Table) -> NDArray[np.int64]:
        """Say of which row each comparison of some examples is."""
        if ROW_NUMBERS in cells.column_names:
            return values_of(cells.column(ROW_NUMBERS))
        return self.rows[list(indices)].repeat(counts_of(cells.column("comparisons")) // 2)

    def find(self, row: int) -> tuple[int, int]:
        """Find the number of a row's source, and its own in there."""
        starts = np.cumsum([0, *(len(source.rows) for source in self.sources)]).tolist()
        if not 0 <= row < starts[-1]:
            raise IndexError(f"Expected a row in [0, {starts[-1]}) but got {row}.")
        number = bisect_right(starts, row) - 1
        return number, row - starts[number]
