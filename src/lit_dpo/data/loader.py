"""Loaders of pair batches; the training one knows where it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from lit_dpo.data.batch import PairBatch, microbatch_borders
from lit_dpo.data.sampler import PairSampler
from lit_dpo.data.table import PairTable


class PairDataset(Dataset[PairBatch]):
    """A `PairTable` for a `DataLoader` with `batch_size=None`: an index is the list of pairs of one batch."""

    def __init__(self, table: PairTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.size

    def __getitem__(self, indices: Sequence[int]) -> PairBatch:
        return self.table.batch(indices)


class PairLoader(DataLoader[PairBatch]):
    """Training batches, pass after pass, counted as they are handed over.

    A pass that follows one that has begun is the next epoch. The counts are the loader's own, because the trainer's are
    not those of the data: after a stop at `max_steps` Lightning calls the rest of an epoch the next one.

    Attributes:
        epoch: the data's epoch, which decides the order.
        batches: batches of it that were handed over.
    """

    epoch: int = 0
    batches: int = 0
    start: Callable[[], tuple[int, int]] | None = None
    """Where the first pass begins; asked when it does, for Lightning makes loaders before it restores its loops."""
    _begun: bool = False

    def load_position(self, epoch: int, batches: int) -> None:
        """Let the first pass be `epoch` without its first `batches` batches."""
        self.epoch, self.batches, self._begun = epoch, batches, False

    def __iter__(self) -> Iterator[PairBatch]:  # type: ignore[override]
        """Yield the batches of the next pass; nothing happens before the first is asked for."""
        if self.start is not None:
            self.load_position(*self.start())
            self.start = None
        if self._begun:
            self.load_position(self.epoch + 1, 0)
        self._begun = True
        assert isinstance(self.sampler, PairSampler)
        self.sampler.load_position(self.epoch, self.batches)
        for batch in super().__iter__():
            self.batches += 1
            yield batch

    def largest_microbatches(self, microbatch_tokens: float = math.inf) -> tuple[list[NDArray[np.int64]], bool]:
        """Of the sampler's present epoch, the micro-batch with most tokens and the one with most when padded.

        Args:
            microbatch_tokens: most tokens of one, by default a batch is one.

        Returns:
            Both as `(B, 3)` tokens of the prompt, the chosen and the rejected completion of their pairs; and whether
            any batch has several.
        """
        assert isinstance(self.dataset, PairDataset)
        lengths = self.dataset.table.part_lengths
        batches: list[list[int]] = list(self.sampler)
        totals, longest = lengths.sum(1), lengths[:, 0] + lengths[:, 1:].max(1)
        parts = [
            batch[first:last]
            for batch in batches
            for first, last in pairwise(microbatch_borders(totals[batch], microbatch_tokens))
        ]
        flat = max(parts, key=lambda part: totals[part].sum())
        padded = max(parts, key=lambda part: len(part) * longest[part].max())
        return [lengths[flat], lengths[padded]], len(parts) > len(batches)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: that it is there tells Lightning that the loader resumes.

        The position is in the data module's state, because Lightning gives a loader its own back only within an epoch.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: see `state_dict`."""


def loader_options(num_workers: int, pin_memory: bool = False) -> dict[str, Any]:
    """Return what all loaders of pairs have in common.

    Args:
        num_workers: processes that collate ahead.
        pin_memory: lay batches out where a CUDA device can fetch them while the CPU goes on; of no use without one.
    """
    return {
        "batch_size": None,
        # its own, or each new pass would draw from the global state, and a resumed run would draw at other times
        "generator": torch.Generator(),
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": pin_memory,
    }
