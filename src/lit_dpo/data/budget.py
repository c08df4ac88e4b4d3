"""Batches by a budget of tokens: as many prompts as fit, and the same number of batches in every epoch."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_dpo.data.sampler import PromptSampler, Uncounted

_DRAWS = 8


class BudgetSampler(PromptSampler):
    """A `PromptSampler` whose batches hold as many prompts as fit `max_tokens` tokens.

    An order of the rows is cut from its beginning: a batch ends where the next one would not fit. Nothing is sorted,
    because rows without padding cost the same whatever their neighbours are.

    Training: a new permutation per epoch. Permutations need more or fewer batches, but a trainer counts them once, for
    the end of an accumulation window and the course of the learning rate. So every epoch has the number that the worst
    of the first 8 permutations needs, rounded up to a multiple of the ranks: where there are fewer, the batches with
    the most prompts are halved; a permutation that needs more is drawn again. Of a mixture halves stay where they were,
    so that its proportions hold.

    Evaluation: file order.

    Every row is once in an epoch, over all ranks. Where there are no more batches for all ranks, some get an
    `Uncounted` one.

    Args:
        lengths: tokens per prompt with its completions.
        max_tokens: most tokens per rank and batch. Expected at least the longest of these.
        batch_size: most prompts per rank and batch. None: as many as fit.
        options: `seed`, `shuffle`, `rank`, `num_replicas` and `mixture` as in `PromptSampler`.

    Raises:
        ValueError: for a prompt that does not fit, or as `PromptSampler`.

    Example:
        >>> from lit_dpo.data.budget import BudgetSampler
        >>> list(BudgetSampler([10, 40, 20, 30, 50], max_tokens=60, shuffle=False))
        [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self, lengths: Sequence[int] | NDArray[Any], max_tokens: int, batch_size: int | None = None, **options: Any
    ) -> None:
        super().__init__(lengths, max(1, len(lengths)) if batch_size is None else batch_size, bucket=0, **options)
        if len(lengths) and self.lengths.max() > max_tokens:
            raise ValueError(f"Expected prompts of up to `max_tokens`={max_tokens} but one has {self.lengths.max()}.")
        self.max_tokens = max_tokens
        # of all ranks: no more than rows, of which each batch has one at least
        self._epoch_batches = self._count_batches() if self.shuffle else len(self._batches())

    def __len__(self) -> int:
        """Batches of a whole epoch, as many on every rank and in every epoch."""
        return -(-self._epoch_batches // self.num_replicas)

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        """Yield the batches of this epoch, from the loaded position on."""
        batches = self._batches()
        for place in range(self.start_batch * self.num_replicas, len(batches), self.num_replicas):
            own = place + self.rank
            yield batches[own].tolist() if own < len(batches) else Uncounted(batches[place][:1].tolist())

    def _count_batches(self) -> int:
        most = max(len(self._cut(next(self._permutations(epoch)))) for epoch in range(_DRAWS))
        return min(-(-most // self.num_replicas) * self.num_replicas, self.epoch_rows)

    def _batches(self) -> list[NDArray[np.int64]]:
        """Those of all ranks in the present epoch."""
        if not self.shuffle:
            return self._cut(np.arange(len(self.lengths)))
        drawn = map(self._cut, self._permutations(self.epoch))
        batches = next(batches for batches in drawn if len(batches) <= self._epoch_batches)
        return _halve_largest(batches, self._epoch_batches - len(batches), in_place=self.mixture is not None)

    def _permutations(self, epoch: int) -> Iterator[NDArray[np.int64]]:
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        while True:
            yield self._permutation(random)

    def _cut(self, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        ends = self.lengths[order].cumsum().tolist()
        batches, start, before = [], 0, 0
        while start < len(ends):
            end = min(bisect_right(ends, before + self.max_tokens, lo=start), start + self.batch_size)
            batches.append(order[start:end])
            start, before = end, ends[end - 1]
        return batches


def _halve_largest(batches: list[NDArray[np.int64]], times: int, *, in_place: bool = False) -> list[NDArray[np.int64]]:
    """So many batches more: the second halves of those that had the most prompts, at the end or where they were."""
    heap = [(-len(rows), place) for place, rows in enumerate(batches)]
    starts = [0, *accumulate(map(len, batches))][:-1]
    heapq.heapify(heap)
    for _ in range(times):
        _, place = heapq.heappop(heap)
        rows = batches[place]
        batches[place] = rows[: len(rows) // 2]
        batches.append(rows[len(rows) // 2 :])
        starts.append(starts[place] + len(rows) // 2)
        for half in (place, len(batches) - 1):
            heapq.heappush(heap, (-len(batches[half]), half))
    if in_place:
        return [rows for _, rows in sorted(zip(starts, batches, strict=True), key=itemgetter(0))]
    return batches
