"""The record that crosses from the data to the model: pairs of token sequences in one row, without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROW_FIELDS = ("weight", "score_margin", "probability")
"""What a row may say beside its three parts; the names are those of `PairLogps`."""


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
        weight: `(B,)` float32, by which the row's loss is multiplied; None where the data do not say.
        score_margin: `(B,)` float32, how much better the chosen completion was scored; or None.
        probability: `(B,)` float32, that the chosen completion is the better one; or None.
    """

    input_ids: Tensor
    position_ids: Tensor
    prompt_lengths: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    indices: Tensor
    keys: Tensor
    weight: Tensor | None = None
    score_margin: Tensor | None = None
    probability: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of pairs `B`; `len` of a NamedTuple is its number of fields."""
        return self.indices.shape[0]

    def to(self, device: torch.device | str, **_: Any) -> PairBatch:
        """Tokens on `device`; lengths stay on the CPU, where the layout is computed without a device sync.

        Lightning moves a batch by this method.
        """
        moved = {name: getattr(self, name) for name in ("input_ids", "position_ids", *ROW_FIELDS)}
        return self._replace(
            **{name: field.to(device, non_blocking=True) for name, field in moved.items() if field is not None}
        )

    def select(self, pairs: Sequence[int]) -> PairBatch:
        """Some of the pairs, in this order, as a batch of their own.

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
        rest = {name: field for name, field in self._asdict().items() if field is not None}
        row = {name: rest.pop(name)[:, places] for name in ("input_ids", "position_ids")}
        return self._replace(
            **row, **{name: field[chosen.to(field.device, non_blocking=True)] for name, field in rest.items()}
        )

    def cut(self, tokens: float) -> list[PairBatch]:
        """The batch in rows of whole pairs, in order, of at most `tokens` tokens; a longer pair is a row of its own.

        Rows are views: nothing is copied, and nothing waits for a device.

        Example:
            >>> batch = collate_pairs([EncodedPair([1, 2], [3], [4]), EncodedPair([5], [6], [7, 8])])
            >>> [row.input_ids.tolist() for row in batch.cut(6)]
            [[[1, 2, 3, 4]], [[5, 6, 7, 8]]]
        """
        lengths = (self.prompt_lengths + self.chosen_lengths + self.rejected_lengths).numpy()
        ends = [0, *lengths.cumsum().tolist()]
        rest = {name: field for name, field in self._asdict().items() if field is not None}
        row = {name: rest.pop(name) for name in ("input_ids", "position_ids")}
        return [
            self._replace(
                **{name: field[:, ends[first] : ends[last]] for name, field in row.items()},
                **{name: field[first:last] for name, field in rest.items()},
            )
            for first, last in pairwise(microbatch_borders(lengths, tokens))
        ]


def microbatch_borders(lengths: NDArray[np.int64], tokens: float) -> list[int]:
    """Where rows of at most `tokens` tokens begin, and where the last one ends.

    Args:
        lengths: `(B,)` tokens of each pair; one that is longer than a row is a row of its own.
        tokens: most tokens of a row.

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
    fields: Mapping[str, Sequence[float]] | None = None,
) -> PairBatch:
    """Lay pairs out in one row.

    Args:
        pairs: the encoded pairs, in order.
        indices: their row numbers; `0 … B-1` if not given.
        fields: what the rows say beside: a number per pair for each of some `ROW_FIELDS`.

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
        **{name: torch.tensor(values, dtype=torch.float32) for name, values in (fields or {}).items()},
    )


def _key(pair: EncodedPair) -> np.ndarray[Any, np.dtype[np.uint8]]:
    content = np.array([*map(len, pair), *pair.prompt, *pair.chosen, *pair.rejected], dtype=np.int32).tobytes()
    return np.frombuffer(bytearray(hashlib.blake2b(content, digest_size=16).digest()), dtype=np.uint8)
