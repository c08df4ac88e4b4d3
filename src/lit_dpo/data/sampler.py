"""The order of prompts: a function of seed and epoch, cut into batches, shared by ranks, resumable at any batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler, SequentialSampler

from lit_dpo.data.mixture import Mixture


class Uncounted(list[int]):
    """Rows that a rank runs and does not count: its part of a batch that has fewer rows than there are ranks.

    All ranks then make the same passes and the same steps, and what they wait for each other in happens on all of them.
    """


class PromptSampler(DistributedSampler[Any], SequentialSampler):
    """Yields the indices of one batch of this rank at a time: use it as `sampler` with `batch_size=None`.

    What has an index here, a row, is a prompt with its completions: a pair, where there are two.

    Training (`shuffle=True`): a new permutation per epoch. It is cut into runs of `bucket` global batches that are
    sorted by length, so that batches, and the ranks' shares of one batch, hold prompts of similar length; then the
    batches are shuffled. Of a mixture each source is sorted for itself, and each batch has its part of each source.

    Evaluation (`shuffle=False`): file order.

    Every row is once in an epoch, over all ranks, and what a batch of all ranks holds does not depend on their number,
    if `batch_size` times ranks is the same. A shorter last batch is shared as evenly as possible. If it has fewer rows
    than there are ranks, the others get an `Uncounted` one, because every rank must make the same number of steps.

    It is a `DistributedSampler`, and for `overfit_batches` a `SequentialSampler`, so that Lightning puts none of its
    own in its place, and calls `set_epoch`.

    Args:
        lengths: tokens per prompt with its completions; only their order matters.
        batch_size: prompts per rank and batch.
        seed: the order is a function of this and the epoch; nothing else draws from it.
        shuffle: training order (True) or evaluation order.
        rank: which share to yield.
        num_replicas: number of ranks.
        bucket: global batches per sorted run; 0 does not sort.
        mixture: the rows' sources and their proportions, for training. None: each row comes once in an epoch.

    Raises:
        ValueError: for a batch size below 1.

    Example:
        >>> from lit_dpo.data.sampler import PromptSampler
        >>> list(PromptSampler([10, 40, 20, 30, 50], batch_size=2, shuffle=False))
        [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[Any],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        num_replicas: int = 1,
        bucket: int = 50,
        mixture: Mixture | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"Expected `batch_size` >= 1 but got {batch_size}.")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        super().__init__(self.lengths, num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.bucket = bucket
        self.mixture = mixture
        self.start_batch = 0

    @property
    def epoch_rows(self) -> int:
        """Prompts of an epoch, repeated ones too."""
        return len(self.lengths) if self.mixture is None else self.mixture.size

    @property
    def global_batch_size(self) -> int:
        """Prompts per batch over all ranks."""
        return self.batch_size * self.num_replicas

    def __len__(self) -> int:
        """Batches of a whole epoch, as many on every rank, wherever the next pass starts."""
        return -(-self.epoch_rows // self.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        """Yield the batches of this epoch, from the loaded position on."""
        order = self._order()
        for batch in range(self.start_batch, len(self)):
            rows = order[batch * self.global_batch_size : (batch + 1) * self.global_batch_size]
            yield self._share(rows)

    def _share(self, rows: NDArray[np.int64]) -> list[int]:
        """Take this rank's rows of a batch of all ranks."""
        own: list[int] = rows[self.rank :: self.num_replicas].tolist()
        return own or Uncounted([int(rows[self.lengths[rows].argmin()])])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; another one than the present starts at its first batch."""
        if epoch != self.epoch:
            self.load_position(epoch, 0)

    def load_position(self, epoch: int, batches: int) -> None:
        """Continue in `epoch` after `batches` batches of this rank."""
        self.epoch, self.start_batch = epoch, batches

    def _order(self) -> NDArray[np.int64]:
        """All rows in the order of the present epoch, the same on every rank."""
        rows = self.epoch_rows
        if not self.shuffle:
            return np.arange(rows)
        random = np.random.Generator(np.random.PCG64([self.seed, self.epoch]))
        permutation = self._permutation(random)
        # The shorter last batch stays out of the sorting: it would always hold the longest prompts.
        full = rows // self.global_batch_size * self.global_batch_size
        if self.mixture is not None:  # batches stay where they are, because of which shares hold
            if self.bucket:
                sizes = (self.global_batch_size, self.bucket)
                permutation[:full] = self.mixture.sorted(permutation[:full], self.lengths, *sizes, random)
            return permutation
        batches = self._sort_runs(permutation[:full]).reshape(-1, self.global_batch_size)
        return np.concatenate([batches[random.permutation(len(batches))].ravel(), permutation[full:]])

    def _permutation(self, random: np.random.Generator) -> NDArray[np.int64]:
        return random.permutation(len(self.lengths)) if self.mixture is None else self.mixture.permutation(random)

    def _sort_runs(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        if not self.bucket:
            return rows
        runs = np.arange(len(rows)) // (self.bucket * self.global_batch_size)
        # One key instead of `lexsort` over two: 3 seconds instead of 7 for ten million rows.
        return rows[np.argsort(runs * (int(self.lengths.max()) + 1) + self.lengths[rows], kind="stable")]
