"""A batch in micro-batches, whose gradients add up: what a step needs is decided by one of them, not by the batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_dpo.compat import has_gradient_hook
from lit_dpo.data.batch import PairBatch
from lit_dpo.logps.records import PairLogps, SequenceLogps

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


MICROBATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens of a micro-batch by device, so that more would not be faster each: measured on a CPU, a guess on a GPU."""


def why_whole(strategy: Strategy, parameters: Iterable[Tensor]) -> str | None:
    """Why a training batch must stay whole, whatever its loss is, or None.

    Args:
        strategy: the trainer's; the parameters that gradients are asked for must be those that the forward pass reads.
        parameters: hooks on one's gradient would run for every micro-batch, and once more for the sum.
    """
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy):  # DeepSpeed's is a subclass
        return f"{type(strategy).__name__} may shard the parameters"
    if any(has_gradient_hook(parameter) for parameter in parameters):
        return "a parameter has a gradient hook"
    return None


def join(records: Sequence[PairLogps]) -> PairLogps:
    """Join the records of micro-batches to that of their batch."""
    if len(records) == 1:
        return records[0]
    # the state is the loss's, not the pairs': it is the same in all, and not put together
    joined: PairLogps = _joined([record._replace(state=None) for record in records])
    return joined._replace(state=records[0].state)


def _joined(parts: Sequence[Any]) -> Any:
    """Put tensors one after another, in records and dictionaries; a field that the first does not have is in none."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    if isinstance(parts[0], dict):
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: _joined([part[name] for part in parts]) for name in names}
    return type(parts[0])(*(_joined(fields) for fields in zip(*parts, strict=True)))


class GradientSum:
    """Gradients of the losses of micro-batches, which add up in one copy of the parameters.

    Those of a micro-batch are taken as soon as its losses are known, and its graph is freed; the backward pass of
    `total` hands the sum over. The same numbers as from the whole batch, as long as no pair's loss depends on another
    pair.

    Args:
        parameters: all that the losses have gradients for; they may leave some out.
        scale: of the losses while gradients are taken, so that they do not vanish in float16.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> sums = GradientSum([weight])
        >>> for part in ([1.0, 2.0], [3.0]):
        ...     sums.add(weight * torch.tensor(part))
        >>> sums.total().backward()
        >>> sums.losses.tolist(), weight.grad
        ([2.0, 4.0, 6.0], tensor(6.))
    """

    def __init__(self, parameters: Sequence[Tensor], scale: float | Tensor = 1.0) -> None:
        self._parameters, self._scale = parameters, scale
        self._sums: list[Tensor | None] = [None] * len(parameters)
        self._losses: list[Tensor] = []
        self.of_leaves: list[Tensor] = []

    def add(self, losses: Tensor, leaves: Sequence[Tensor] = ()) -> None:
        """Take the gradients of losses `(B,)`, and free their graph.

        Args:
            losses: of a micro-batch, or of a batch whose log-probs are `leaves`.
            leaves: tensors whose gradients are wanted too; `of_leaves` has them then.
        """
        self._losses.append(losses.detach())
        scaled = losses.sum() * self._scale
        # as in Lightning's own backward pass, which does not run under autocast
        with torch.autocast(losses.device.type, enabled=False):
            # not `backward`, with which DDP's hooks would exchange gradients for each micro-batch
            wanted = [*leaves, *self._parameters]
            found = torch.autograd.grad(scaled, wanted, allow_unused=True)
        self._add(found[len(leaves) :])
        self.of_leaves = [
            torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found, strict=False)
        ]

    def follow(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Carry gradients of what a micro-batch computes on to the parameters, and free its graph.

        Args:
            outputs: with a graph.
            gradients: of the losses with respect to them, at the scale of this sum.
        """
        with torch.autocast(outputs[0].device.type, enabled=False):
            self._add(torch.autograd.grad(outputs, self._parameters, gradients, allow_unused=True))

    def _add(self, found: Sequence[Tensor | None]) -> None:
        for place, (before, new) in enumerate(zip(self._sums, found, strict=True)):
            if new is not None:  # not in place: autograd may give one tensor to two parameters
                self._sums[place] = new if before is None else before + new

    @property
    def losses(self) -> Tensor:
        """`(B,)` of all micro-batches, without gradients."""
        return torch.cat(self._losses)

    def total(self) -> Tensor:
        """Return the sum of all losses, to run backward from, once."""
        value = torch.stack([losses.sum() for losses in self._losses]).sum()
        # no second reference: the backward pass frees one after another
        sums, self._sums = self._sums, []
        found: Tensor = _Summed.apply(value, sums, self._scale, *self._parameters)  # type: ignore[no-untyped-call]
        return found


class Leaves(NamedTuple):
    """What of a batch's record has gradients, cut off from the models: a loss of it knows no model.

    Attributes:
        record: of the batch, whose policy sides are leaves.
        tensors: the leaves, those of the chosen side first.
    """

    record: PairLogps
    tensors: list[Tensor]


def cut_off(record: PairLogps) -> Leaves:
    """Cut a batch's record off from the graph it may have, and let it ask for gradients.

    `total` and `per_token` are leaves of their own, as a loss may read either; what both lead to adds up later.
    """
    sides = [_asking(side) for side in record[:2]]
    return Leaves(
        record._replace(policy_chosen=sides[0], policy_rejected=sides[1]),
        [values for side in sides for values in differentiable(side)],
    )


def differentiable(side: SequenceLogps) -> list[Tensor]:
    """List what of a policy's side has gradients, in one order: `total`, `per_token`, `kl`, if they are there."""
    return [values for values in (side.total, side.per_token, side.kl) if values is not None]


def _asking(side: SequenceLogps) -> SequenceLogps:
    leaves = {
        name: values.detach().requires_grad_()
        for name in ("total", "per_token", "kl")
        if (values := getattr(side, name)) is not None
    }
    return side._replace(**leaves)


def shares(gradients: Sequence[Tensor], parts: Sequence[PairBatch]) -> Iterator[list[Tensor]]:
    """Hand each micro-batch its part of the gradients of a batch's leaves.

    Args:
        gradients: of the leaves, `(B,)` or `(N,)`, those of the chosen side first.
        parts: the micro-batches.
    """
    half = len(gradients) // 2
    begun = [0] * len(gradients)
    for part in parts:
        found = []
        for place, gradient in enumerate(gradients):
            lengths = part.chosen_lengths if place < half else part.rejected_lengths
            # of the three of a side the first is a number per pair, the others one per token
            count = part.size if place % half == 0 else int(lengths.sum())
            found.append(gradient[begun[place] : begun[place] + count])
            begun[place] += count
        yield found


class _Summed(torch.autograd.Function):
    """A number whose gradients are known already."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, sums: list[Tensor | None], scale: float | Tensor, *parameters: Tensor
    ) -> Tensor:
        # on `ctx`, because saved tensors cannot be freed one by one. Parameters are inputs, so that gradients go
        # their ordinary way, on which DDP's hooks and those of Lightning wait
        ctx.sums, ctx.scale = sums, scale
        return value.clone()

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> Any:
        sums, ctx.sums = ctx.sums, None
        if sums is None:
            raise RuntimeError(
                "The gradients of a batch in micro-batches are handed over once: its backward ran a second time."
            )
        # the sums are scaled already, and a scaler has scaled the total: it must count once
        weight = weight / ctx.scale
        gradients: list[Tensor | None] = []
        while sums:  # each is freed as its product is made
            one = sums.pop(0)
            gradients.append(None if one is None else one * weight)
        return None, None, None, *gradients
