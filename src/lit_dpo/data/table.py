"""One split of encoded pairs: an Arrow table with a row for every row of the sources, and the rows that are used."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from numpy.typing import NDArray

from lit_dpo.data.batch import EncodedPair, PairBatch, collate_pairs
from lit_dpo.data.digests import code_digest
from lit_dpo.data.encode import Dropped, PairEncoder
from lit_dpo.data.formats.base import Preference, PreferenceFormat
from lit_dpo.data.sources import PairSource
from lit_dpo.errors import DataError
from lit_dpo.writing import refusals

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


class PairTable(NamedTuple):
    """Encoded pairs, fetched by lists of indices: `table.batch([3, 0])` is a `PairBatch` of two.

    Row numbers (`batch.indices`, the argument of `preference`) count the rows of all files of the split, one after
    another, dropped ones too, from 0. Indices count the used rows.

    Attributes:
        sources: the raw rows.
        format: reads a raw row.
        encoded: token ids and facts, one row per raw row; a dropped row has no ids.
        rows: `(N,)` row numbers of the pairs that are used, ascending.
        columns: names of the numbers that the rows have.
    """

    sources: list[PairSource]
    format: PreferenceFormat
    encoded: Dataset
    rows: NDArray[np.int64]
    columns: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Pairs that are used, `N`."""
        return len(self.rows)

    @property
    def total(self) -> int:
        """Rows of the sources, dropped ones too."""
        return len(self.encoded)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`(N,)` tokens per pair: prompt, chosen, rejected."""
        return self.facts("length")[self.rows]

    @property
    def part_lengths(self) -> NDArray[np.int64]:
        """`(N, 3)` tokens of the prompt, the chosen and the rejected completion."""
        from pyarrow.compute import list_value_length

        parts = [list_value_length(self.encoded.data.column(name)).to_numpy() for name in _IDS]
        return np.stack(parts, axis=1).astype(np.int64)[self.rows]

    @property
    def prompt_keys(self) -> NDArray[np.int64]:
        """`(N,)` equal for equal prompts."""
        return self.facts("prompt_key")[self.rows]

    @property
    def identical(self) -> int:
        """Pairs whose two completions are the same."""
        return int(self.facts("identical")[self.rows].sum())

    @property
    def dropped(self) -> Counter[str]:
        """How many rows were dropped, by reason."""
        return Counter(reason for reason in self.encoded.select_columns("dropped")[:]["dropped"] if reason)

    @property
    def digest(self) -> str:
        """Of what the rows that are used say, in their order: lengths and columns of all, token ids of up to 4096."""
        digest = hashlib.blake2b(self.part_lengths.tobytes(), digest_size=16)
        for name in self.columns:
            digest.update(self.facts(_stored(name))[self.rows].tobytes())
        places = np.unique(np.linspace(0, self.size - 1, min(self.size, 4096)).astype(np.int64))
        columns = self.encoded.select_columns(list(_IDS))[self.rows[places].tolist()]
        for ids in (one for name in _IDS for one in columns[name]):
            digest.update(np.array(ids, np.int32).tobytes())
        return digest.hexdigest()

    def batch(self, indices: Sequence[int]) -> PairBatch:
        """Lay the pairs at these indices out in one row."""
        rows = self.rows[list(indices)].tolist()
        cells = self.encoded[rows]
        pairs = [EncodedPair(*ids) for ids in zip(*(cells[name] for name in _IDS), strict=True)]
        return collate_pairs(pairs, rows, {name: cells[_stored(name)] for name in self.columns})

    def preference(self, row: int) -> Preference:
        """Read the raw preference of a row number."""
        number, inside = self._find(row)
        return self.format.read(self.sources[number].rows[inside])

    def _find(self, row: int) -> tuple[int, int]:
        """Find the number of a row's source, and its own in there."""
        starts = np.cumsum([0, *(len(source.rows) for source in self.sources)]).tolist()
        if not 0 <= row < starts[-1]:
            raise IndexError(f"Expected a row in [0, {starts[-1]}) but got {row}.")
        number = bisect_right(starts, row) - 1
        return number, row - starts[number]

    def first_beyond(self, vocabulary: int, context: int | None) -> str | None:
        """Where the first used pair is that a model with these limits cannot read, and why; None if there is none.

        Args:
            vocabulary: ids from 0 that the model knows.
            context: most tokens of a prompt and one completion. None: no limit.
        """
        from pyarrow.compute import max as largest

        chunks = [chunk for name in _IDS for chunk in self.encoded.data.column(name).chunks]
        highest = max(largest(chunk.flatten()).as_py() or 0 for chunk in chunks)
        lengths = self.side_lengths
        if highest < vocabulary and (context is None or lengths.max(initial=0) <= context):
            return None
        for row, length in zip(self.rows.tolist(), lengths.tolist(), strict=True):
            beyond = max(max(self.encoded[row][name]) for name in _IDS)
            if beyond >= vocabulary:
                return f"{self.place(row)}: token id {beyond}"
            if context is not None and length > context:
                return f"{self.place(row)}: {length} tokens"
        return None

    def place(self, row: int) -> str:
        """Say in which file a row is, and its number there."""
        number, inside = self._find(row)
        return f"{self.sources[number].name}, row {inside} (from 0)"

    @property
    def side_lengths(self) -> NDArray[np.int64]:
        """`(N,)` tokens of the prompt with the longer completion."""
        parts = self.part_lengths
        longest: NDArray[np.int64] = parts[:, 0] + parts[:, 1:].max(axis=1)
        return longest

    def hold_out(self, fraction: float, seed: int) -> tuple[PairTable, PairTable]:
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

    def facts(self, name: str) -> NDArray[np.int64]:
        """`(total,)` one number per row of the sources: `length`, `prompt_key`, `identical`, or a column of numbers."""
        values: NDArray[np.int64] = self.encoded.select_columns(name).with_format("numpy")[:][name]
        return values


def encode_table(sources: Sequence[PairSource], format: PreferenceFormat, encoder: PairEncoder) -> PairTable:
    """Read, check and encode every row; what is on disk is encoded once and then memory-mapped.

    Once, that is, for the same content (wherever it lies), format with its code, tokenizer and limits.

    Raises:
        DataError: for the first row that cannot be used, with its file and number (from 0).
    """
    from datasets import concatenate_datasets

    names = [_column_names(source, format) for source in sources]
    for source, there in zip(sources, names, strict=True):
        if there != names[0]:
            raise DataError(
                f"Expected the same columns of numbers in all files but {sources[0].name} has {_list(names[0])} and "
                f"{source.name} {_list(there)}."
            )
    columns = names[0] if names else ()
    encoded = concatenate_datasets([_encode_source(source, format, encoder, columns) for source in sources])
    table = PairTable(list(sources), format, encoded, np.arange(len(encoded)), columns)
    return table._replace(rows=np.flatnonzero(table.facts("length")))


def _column_names(source: PairSource, format: PreferenceFormat) -> tuple[str, ...]:
    """Name the numbers that a source's rows have, by its first one; encoding holds the others to it."""
    cells = {name: [cell] for name, cell in source.rows[0].items()}
    return tuple(_read(source.name, 0, format, cells, 0).columns)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _stored(name: str) -> str:
    """Say what a column of numbers is called among the encoded facts."""
    return f"column {name}"


def _encode_source(
    source: PairSource, format: PreferenceFormat, encoder: PairEncoder, names: tuple[str, ...]
) -> Dataset:
    from datasets import Features, List, Value
    from datasets.fingerprint import generate_fingerprint

    ids = List(Value("int32"))
    facts = {"length": Value("int32"), "prompt_key": Value("int64"), "identical": Value("bool")}
    facts |= dict.fromkeys(map(_stored, names), Value("float64"))
    code = code_digest(_encode_rows, type(encoder), own=[type(format)])
    key = [source.content or generate_fingerprint(source.rows), encoder.fingerprint, code, repr(format)]
    fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    with refusals(source.cache):
        return source.rows.map(
            lambda cells, numbers: _encode_rows(source.name, cells, numbers, format, encoder, names),
            batched=True,
            with_indices=True,
            remove_columns=source.rows.column_names,
            features=Features({**dict.fromkeys(_IDS, ids), **facts, "dropped": Value("string")}),
            new_fingerprint=fingerprint,
            cache_file_name=str(source.cache / f"{fingerprint}.arrow") if source.content else None,
            desc=f"Encoding {source.name}",
        )


def _encode_rows(
    name: str,
    cells: dict[str, list[Any]],
    numbers: list[int],
    format: PreferenceFormat,
    encoder: PairEncoder,
    columns: tuple[str, ...],
) -> dict[str, list[Any]]:
    preferences = [_read(name, number, format, cells, place) for place, number in enumerate(numbers)]
    for number, preference in zip(numbers, preferences, strict=True):
        if {*preference.columns} != {*columns}:
            raise DataError(
                f"{name}, row {number} (from 0): Expected the columns of numbers of the first row, {_list(columns)}, "
                f"in every row but got {_list(tuple(preference.columns))}."
            )
    try:
        results = encoder(preferences)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    for number, result in zip(numbers, results, strict=True):
        if isinstance(result, Dropped) and result.fatal:
            raise DataError(f"{name}, row {number} (from 0): {result.reason}.")
    pairs = [EncodedPair([], [], []) if isinstance(result, Dropped) else result for result in results]
    return {
        "prompt_ids": [pair.prompt for pair in pairs],
        "chosen_ids": [pair.chosen for pair in pairs],
        "rejected_ids": [pair.rejected for pair in pairs],
        "length": [sum(map(len, pair)) for pair in pairs],
        "prompt_key": [_key(preference.prompt) for preference in preferences],
        "identical": [preference.chosen == preference.rejected for preference in preferences],
        "dropped": [result.reason if isinstance(result, Dropped) else "" for result in results],
        **{_stored(name): [float(preference.columns[name]) for preference in preferences] for name in columns},
    }


def _read(name: str, number: int, format: PreferenceFormat, cells: dict[str, list[Any]], place: int) -> Preference:
    try:
        found = format.read({column: those[place] for column, those in cells.items()})
        for column, value in found.columns.items():
            _check_number(column, value)
    except DataError as error:
        raise DataError(f"{name}, row {number} (from 0): {error}") from None
    return found


def _check_number(column: str, value: object) -> None:
    """See that what a format says of a pair is a number that its readers can use."""
    low, high = {"weight": (0, math.inf), "probability": (0, 1)}.get(column, (-math.inf, math.inf))
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (math.isfinite(value) and low <= value <= high)
    ):
        raise DataError(f"Expected a finite number in [{low:g}, {high:g}] for the column `{column}` but got {value!r}.")


def _key(prompt: object) -> int:
    """64 bits of a hash: among ten million prompts two different ones meet with a probability of 3e-6."""
    digest = hashlib.blake2b(json.dumps(prompt, sort_keys=True, default=str).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def report(split: str, table: PairTable, truncation: str) -> None:
    """One line for dropped pairs, one for pairs that cannot teach anything."""
    if table.dropped:
        reasons = "; ".join(
            f"{count} {reason}" if len(table.dropped) > 1 else reason for reason, count in table.dropped.most_common()
        )
        line = f"{table.total - table.size} of {table.total} pairs dropped: {reasons} (truncation={truncation})"
        if table.size == 0:
            raise DataError(f"{split}: no pairs are left, {line}. Raise `max_length` or set another `truncation`.")
        rank_zero_info(f"{split}: {line}")
    if table.identical:
        warn(
            f"{split}: {table.identical} of {table.size} pairs have two equal completions; kept, but they teach nothing"
        )


def check_tokens(
    split: str, table: PairTable, vocabulary: int, context: int | None, made_for: int | None, model: str
) -> None:
    """See that a model can read every pair; one line for pairs that are longer than what it was made for.

    Raises:
        DataError: for the first pair that it cannot read.
    """
    if found := table.first_beyond(vocabulary, context):
        reach = "any length" if context is None else f"up to {context} tokens"
        remedy = "" if context is None else f", and `--data.max_length {context}` at most"
        raise DataError(
            f"{found}, but {model} has {vocabulary} token ids and reads {reach}. Use its own tokenizer{remedy}."
        )
    longer = int((table.side_lengths > made_for).sum()) if made_for and context is None else 0
    if longer:
        warn(
            f"{split}: {longer} of {table.size} pairs are longer than the {made_for} tokens that {model} was made for "
            "(`max_position_embeddings`); kept, but it may not read them well"
        )


@rank_zero_only
def warn(message: str) -> None:
    """Say it once, not once per process."""
    log.warning(message)
