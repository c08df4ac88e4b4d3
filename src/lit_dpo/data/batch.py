"""The record that crosses from the data to the model: pairs of token sequences in one row, without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KNOWN_COLUMNS = ("weight", "score_margin", "probability")
"""Columns of numbers that have a meaning here: the module reads the first, losses of ours the others."""


class EncodedPair(NamedTuple):
    """One preference pair as token ids; the prompt is stored once.

    Every part holds at least one token: the last prompt token predicts the first token of both completions.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class PairBatch(NamedTuple):
    """A batch of `B` pairs as one row of `T` tokens: `prompt | chosen | rejected` per pair, one pair after another.

    A NamedTuple, because Lightning moves and pins tuples and skips dataclasses.

    Attributes:
        input_ids: `(1, T)` token ids.
        position_ids: `(1, T)`; the rejected completion restarts where the prompt ends, as if the chosen were not there.
        prompt_lengths: `(B,)` tokens, on the CPU in the collate function like all that follows.
        chosen_lengths: `(B,)` tokens.
        rejected_lengths: `(B,)` tokens.
        indices: `(B,)` row numbers in the data set, for reports and for metrics that must not count a pair twice.
        keys: `(B, 16)` bytes, a hash of the pair's token ids: the same pair has the same key in any data set.
        columns: numbers of the data, `(B,)` float32 each, by name; see `PairLogps`.
    """

    input_ids: Tensor
    position_ids: Tensor
    prompt_lengths: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    indices: Tensor
    keys: Tensor
    columns: dict[str, Tensor] = {}  # noqa: RUF012 - never changed in place

    @property
    def size(self) -> int:
        """Number of pairs `B`; `len` of a NamedTuple is its number of fields."""
        return self.indices.shape[0]

    def to(self, device: torch.device | str, **_: Any) -> PairBatch:
        """Tokens on `device`; lengths stay on the CPU, where the layout is computed without a device sync.

        Lightning moves a batch by this method.
        """
        return self._replace(
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            columns={name: column.to(device, non_blocking=True) for name, column in self.columns.items()},
        )

    def select(self, pairs: Sequence[int]) -> PairBatch:
        """Pick some of the pairs, in this order, as a batch of their own.

        Example:
            >>> batch = collate_pairs([EncodedPair([1, 2], [3], [4]), EncodedPair([5], [6], [7, 8])])
            >>> batch.select([1]).input_ids.tolist()
            [[5, 6, 7, 8]]
        """
        lengths = self.prompt_lengths + self.chosen_lengths + self.rejected_lengths
        ends = lengths.cumsum(0).tolist()
        places = torch.cat([torch.arange(ends[pair] - int(lengths[pair]), ends[pair]) for pair in pairs])
        places = places.to(self.input_ids.device, non_blocking=True)
        chosen = torch.tensor(pairs)
        return self._replace(
            input_ids=self.input_ids[:, places],
            position_ids=self.position_ids[:, places],
            **self._of_pairs(lambda field: field[chosen.to(field.device, non_blocking=True)]),
        )

    def cut(self, tokens: float) -> list[PairBatch]:
        """Cut the batch into micro-batches of whole pairs, of at most `tokens` tokens; a longer pair is one alone.

        They are views: nothing is copied, and nothing waits for a device.

        Example:
            >>> batch = collate_pairs([EncodedPair([1, 2], [3], [4]), EncodedPair([5], [6], [7, 8])])
            >>> [part.input_ids.tolist() for part in batch.cut(6)]
            [[[1, 2, 3, 4]], [[5, 6, 7, 8]]]
        """
        lengths = (self.prompt_lengths + self.chosen_lengths + self.rejected_lengths).numpy()
        ends = [0, *lengths.cumsum().tolist()]
        return [
            self._replace(
                input_ids=self.input_ids[:, ends[first] : ends[last]],
                position_ids=self.position_ids[:, ends[first] : ends[last]],
                **self._of_pairs(itemgetter(slice(first, last))),
            )
            for first, last in pairwise(microbatch_borders(lengths, tokens))
        ]

    def _of_pairs(self, pick: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Pick some of the pairs from what there is for each of them, `(B, …)`."""
        fields = {name: pick(getattr(self, name)) for name in _OF_PAIRS}
        return {**fields, "columns": {name: pick(column) for name, column in self.columns.items()}}


_OF_PAIRS = ("prompt_lengths", "chosen_lengths", "rejected_lengths", "indices", "keys")


def microbatch_borders(lengths: NDArray[np.int64], tokens: float) -> list[int]:
    """Where micro-batches of at most `tokens` tokens begin, and where the last one ends.

    Args:
        lengths: `(B,)` tokens of each pair; one that is longer than that is a micro-batch of its own.
        tokens: most tokens of a micro-batch.

    Example:
        >>> microbatch_borders(np.array([30, 40, 120, 50, 50]), 100)
        [0, 2, 3, 5]
    """
    found, filled = [0], 0
    for pair, length in enumerate(lengths.tolist()):
        if filled and filled + length > tokens:
            found.append(pair)
            filled = 0
        filled += length
    return [*found, len(lengths)]


def collate_pairs(
    pairs: Sequence[EncodedPair],
    indices: Sequence[int] | None = None,
    columns: Mapping[str, Sequence[float]] | None = None,
) -> PairBatch:
    """Lay pairs out in one row.

    Args:
        pairs: the encoded pairs, in order.
        indices: their row numbers; `0 … B-1` if not given.
        columns: what the data say besides: a number for each pair, by name.

    Raises:
        ValueError: if a part of a pair is empty.

    Example:
        >>> batch = collate_pairs([EncodedPair([1, 2, 3], [4, 5], [6]), EncodedPair([7, 8], [9], [10, 11])])
        >>> batch.input_ids.tolist()
        [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
        >>> batch.position_ids.tolist()
        [[0, 1, 2, 3, 4, 3, 0, 1, 2, 2, 3]]
    """
    ids: list[int] = []
    positions: list[int] = []
    for number, pair in enumerate(pairs):
        if not (pair.prompt and pair.chosen and pair.rejected):
            raise ValueError(f"Expected at least one token in each part of pair {number} but got {pair}")
        ids += [*pair.prompt, *pair.chosen, *pair.rejected]
        start = len(pair.prompt)
        positions += [*range(start + len(pair.chosen)), *range(start, start + len(pair.rejected))]
    return PairBatch(
        # by way of NumPy, which reads lists five times as fast as torch
        input_ids=torch.from_numpy(np.array([ids], dtype=np.int64)),
        position_ids=torch.from_numpy(np.array([positions], dtype=np.int64)),
        prompt_lengths=torch.tensor([len(pair.prompt) for pair in pairs]),
        chosen_lengths=torch.tensor([len(pair.chosen) for pair in pairs]),
        rejected_lengths=torch.tensor([len(pair.rejected) for pair in pairs]),
        indices=torch.tensor(list(indices) if indices is not None else list(range(len(pairs)))),
        keys=torch.from_numpy(np.stack([_key(pair) for pair in pairs])),
        columns={name: torch.tensor(values, dtype=torch.float32) for name, values in (columns or {}).items()},
    )


def _key(pair: EncodedPair) -> np.ndarray[Any, np.dtype[np.uint8]]:
    content = np.array([*map(len, pair), *pair.prompt, *pair.chosen, *pair.rejected], dtype=np.int32).tobytes()
    return np.frombuffer(bytearray(hashlib.blake2b(content, digest_size=16).digest()), dtype=np.uint8)
