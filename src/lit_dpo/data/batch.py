"""The record that crosses from the data to the model: pairs of token sequences in one row, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
        rows: `(B,)` row numbers in the data set, for reports and for metrics that must not count a pair twice.
    """

    input_ids: Tensor
    position_ids: Tensor
    prompt_lengths: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    rows: Tensor

    @property
    def size(self) -> int:
        """Number of pairs `B`; `len` of a NamedTuple is its number of fields."""
        return self.rows.shape[0]

    def to(self, device: torch.device | str, **_: Any) -> PairBatch:
        """Tokens on `device`; lengths stay on the CPU, where the layout is computed without a device sync.

        Lightning moves a batch by this method.
        """
        return self._replace(
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
        )


def collate_pairs(pairs: Sequence[EncodedPair], rows: Sequence[int] | None = None) -> PairBatch:
    """Lay pairs out in one row.

    Args:
        pairs: the encoded pairs, in order.
        rows: their row numbers; `0 … B-1` if not given.

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
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        prompt_lengths=torch.tensor([len(pair.prompt) for pair in pairs]),
        chosen_lengths=torch.tensor([len(pair.chosen) for pair in pairs]),
        rejected_lengths=torch.tensor([len(pair.rejected) for pair in pairs]),
        rows=torch.tensor(list(rows) if rows is not None else list(range(len(pairs)))),
    )
