"""Loaders of batches; the training one knows where it is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lit_dpo.data.batch import CompletionBatch, completion_borders, microbatch_borders
from lit_dpo.data.sampler import PromptSampler, Uncounted
from lit_dpo.data.table import PromptTable
from lit_dpo.data.workers import stopped_by_the_run_alone


class PromptDataset(Dataset[CompletionBatch]):
    """A `PromptTable` for a `DataLoader` with `batch_size=None`: an index is the list of prompts of one batch.

    Args:
        table: of the prompts.
        counts_all: lay `Uncounted` rows out like others, for a step that does not know of them: they are then seen
            twice, as torch's `DistributedSampler` does it.
    """

    def __init__(self, table: PromptTable, *, counts_all: bool = False) -> None:
        self.table, self.counts_all = table, counts_all

    def __len__(self) -> int:
        return self.table.size

    def __getitem__(self, indices: Sequence[int]) -> CompletionBatch:
        batch = self.table.batch(indices)
        return batch.uncounted() if isinstance(indices, Uncounted) and not self.counts_all else batch


class TrainLoader(DataLoader[Any], ABC):
    """Training batches, pass after pass, counted as they are handed over.

    A pass that follows one that has begun is the next epoch. The counts are the loader's own, because the trainer's are
    not those of the data: after a stop at `max_steps` Lightning calls the rest of an epoch the next one.

    Attributes:
        epoch: the data's epoch, which decides the order.
        batches: batches of it that were handed over.
        begun: whether the epoch has begun.
        ended: whether these batches were all.
    """

    epoch: int = 0
    batches: int = 0
    begun: bool = False
    ended: bool = False
    start: Callable[[], tuple[int, int]] | None = None
    """Where the first pass begins; asked when it does, for Lightning makes loaders before it restores its loops."""
    fetches_ahead: Callable[[], bool] = staticmethod(lambda: False)
    """Whether a batch is asked for before the one before it is used: Lightning does, where no length tells the last."""
    _first: int = 0  # batch of the pass

    def load_position(self, epoch: int, batches: int) -> None:
        """Let the first pass be `epoch` without its first `batches` batches."""
        self.epoch, self.batches, self._first = epoch, batches, batches
        self.begun = self.ended = False

    @property
    def used(self) -> int:
        """Batches of the epoch that were handed over, without one that was only fetched ahead."""
        return self.batches - (self.begun and not self.ended and self.fetches_ahead())

    def __iter__(self) -> Iterator[CompletionBatch]:  # type: ignore[override]
        """Yield the batches of the next pass; nothing happens before the first is asked for."""
        if self.start is not None:
            self.load_position(*self.start())
            self.start = None
        if self.begun:
            # nothing was used of a pass that Lightning began while it still had an epoch to end
            following = self.ended or self.used > self._first
            self.load_position(*((self.epoch + 1, 0) if following else (self.epoch, self._first)))
        self.begun = True
        for batch in self._pass():
            self.batches += 1
            yield batch
        self.ended = True

    @abstractmethod
    def _pass(self) -> Iterator[CompletionBatch]:
        """Yield what is left of the epoch after its first `batches` batches."""

    def notes(self, accumulate: int) -> dict[str, Any]:
        """Return what a checkpoint has to say besides; a run may go on up to so many batches before it."""
        return {}

    def batches_of(self, state: Mapping[str, Any]) -> int:
        """Return the batches of the epoch in which a checkpoint stands."""
        return len(self)

    def _fetched(self) -> Iterator[Any]:
        """Yield what the dataset gives for what the sampler says."""
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: that it is there tells Lightning that the loader resumes.

        The position is in the data module's state, because Lightning gives a loader its own back only within an epoch.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: see `state_dict`."""


class PromptLoader(TrainLoader):
    """Training batches of a table, in the order of a `PromptSampler`."""

    def _pass(self) -> Iterator[CompletionBatch]:
        assert isinstance(self.sampler, PromptSampler)
        self.sampler.load_position(self.epoch, self.batches)
        return self._fetched()

    def largest_microbatches(
        self, microbatch_tokens: float = math.inf, of_one_prompt: float = math.inf
    ) -> tuple[list[list[tuple[int, tuple[int, ...]]]], bool]:
        """Of the sampler's present epoch, the micro-batches with most tokens and those with most when padded.

        Args:
            microbatch_tokens: most tokens of one, by default a batch is one.
            of_one_prompt: most tokens of a prompt with more than two completions, of which a longer one runs in parts.

        Returns:
            Of each, for each prompt its tokens, and those of each of its completions; and whether any batch has several
            micro-batches.
        """
        assert isinstance(self.dataset, PromptDataset)
        table = self.dataset.table
        batches: list[list[int]] = list(self.sampler)
        totals, longest, completions = table.lengths, table.side_lengths, table.completions_per_prompt
        parts = [
            batch[first:last]
            for batch in batches
            for first, last in pairwise(microbatch_borders(totals[batch], microbatch_tokens))
        ]
        in_parts = (completions > 2) & (totals > of_one_prompt)
        several = len(parts) > len(batches) or bool(in_parts.any())
        whole = [part for part in parts if not in_parts[part].any()]
        found = [
            [(prompt, lengths[first:last])]
            for prompt, lengths in table.part_lengths(np.flatnonzero(in_parts).tolist() if in_parts.any() else [])
            for first, last in pairwise(completion_borders(prompt, lengths, of_one_prompt))
        ]
        if whole:
            found.append(table.part_lengths(max(whole, key=lambda part: totals[part].sum())))
            found.append(table.part_lengths(max(whole, key=lambda part: completions[part].sum() * longest[part].max())))
        flat = max(found, key=lambda part: sum(prompt + sum(lengths) for prompt, lengths in part))
        padded = max(found, key=_padded_tokens)
        return [flat, padded], several


def _padded_tokens(part: list[tuple[int, tuple[int, ...]]]) -> int:
    return sum(len(lengths) for _, lengths in part) * max(prompt + max(lengths) for prompt, lengths in part)


def loader_options(num_workers: int, pin_memory: bool = False) -> dict[str, Any]:
    """Return what all loaders have in common.

    Args:
        num_workers: processes that collate ahead.
        pin_memory: lay batches out where a CUDA device can fetch them while the CPU goes on; of no use without one.
    """
    return {
        "batch_size": None,
        # its own, or each new pass would draw from the global state, and a resumed run would draw at other times
        "generator": torch.Generator(),
        "num_workers": num_workers,
        "worker_init_fn": stopped_by_the_run_alone,
        "persistent_workers": num_workers > 0,
        "pin_memory": pin_memory,
    }
