"""The batches of one optimizer step: gradients that are means over all pairs of the step, at any moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lit_dpo.logps.records import PairLogps


class MeasuredBatch(NamedTuple):
    """What was measured of a batch, on the device and without gradients: what callbacks look at after it.

    Attributes:
        pairs: log-probs of `B` comparisons.
        losses: `(B,)`, or `(P,)` of a loss over prompts.
        chosen_rewards: `(B,)`.
        rejected_rewards: `(B,)`.
    """

    pairs: PairLogps
    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class Window:
    """The pairs of the optimizer step that is being made.

    Lightning divides the loss of a batch by the number of batches that are accumulated, which is not the number of
    pairs: a short last batch, or ranks with uneven shares, would weigh too much. Here each loss is scaled so that after
    every backward pass a gradient is the mean over the pairs that the step has seen so far, on all ranks. So it is what
    the optimizer uses before any hook, callback or clipping sees it, and no hook has to finish it.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget a step that was begun and not made."""
        self._step = -1
        self._pairs: dict[int, float | Tensor] = {}
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def loss(
        self, total: Tensor, pairs: int, batch_idx: int, trainer: pl.Trainer, parameters: Iterable[Tensor]
    ) -> Tensor:
        """Return what `training_step` returns for a batch.

        Args:
            total: the sum of the batch's losses, with gradients.
            pairs: how many they are; 0 on a rank without a share of the batch.
            batch_idx: of the batch. Some optimizers ask for the same batch several times in a step; it counts once.
            trainer: knows the step, the ranks, and by how much it will divide.
            parameters: all that train. Their gradients of earlier batches of the step are scaled, in place.

        Returns:
            A number that is the mean over the batch's pairs after Lightning's division, and whose gradient is as above.
        """
        if trainer.global_step != self._step:  # it moves with optimizer steps alone
            self.reset()
            self._step = trainer.global_step
        counted: float | Tensor = float(pairs)
        if trainer.world_size > 1:  # DDP takes the mean of gradients over ranks, so that of the counts is what it takes
            counted = trainer.strategy.reduce(torch.tensor(counted, device=total.device), reduce_op="mean")
        before = sum((count for place, count in self._pairs.items() if place != batch_idx), 0.0)
        self._pairs[batch_idx] = counted
        after = before + counted
        if len(self._pairs) > 1:
            # the gradients so far are a mean over `before` pairs; a tensor where ranks were asked: nothing waits for it
            share = before / after
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(share)
        divisor = trainer.accumulate_grad_batches  # undoes Lightning's division, which counts batches
        found: Tensor = _Weighed.apply(total, divisor / max(pairs, 1), divisor / after)  # type: ignore[no-untyped-call]
        return found

    def note(self, batch_idx: int, indices: Tensor, losses: Tensor) -> None:
        """Remember the pairs of a batch and their losses, for `nonfinite`."""
        self._seen[batch_idx] = (indices, losses.detach())

    def indices(self) -> list[int]:
        """Row numbers of the step's pairs on this rank."""
        return [index for indices, _ in self._seen.values() for index in indices.tolist()]

    def nonfinite(self) -> list[int]:
        """Row numbers of those whose loss is not a finite number."""
        # it waits for the device, and is asked for only where a gradient is not finite
        return [i for indices, losses in self._seen.values() for i in indices[~losses.isfinite().cpu()].tolist()]


class _Weighed(torch.autograd.Function):
    """A number times one factor, with its gradient times another."""

    @staticmethod
    def forward(ctx: Any, number: Tensor, factor: float, gradient_factor: float | Tensor) -> Tensor:
        ctx.factor = gradient_factor
        return number * factor  # what is logged and monitored: the mean of this batch, not of the step

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.factor, None, None
