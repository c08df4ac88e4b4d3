"""A batch in micro-batches, whose gradients add up: what a step needs is decided by one of them, not by the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lit_dpo.data.batch import PairBatch
from lit_dpo.logps.records import PairLogps

MICROBATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens of a micro-batch by device, so that more would not be faster each: measured on a CPU, a guess on a GPU."""


def why_whole(strategy: Any, parameters: Iterable[Tensor]) -> str | None:
    """Why a training batch must stay whole, whatever its loss is, or None.

    Args:
        strategy: the trainer's; the parameters that gradients are asked for must be those that the forward pass reads.
        parameters: hooks on one's gradient would run for every micro-batch, and once more for the sum.
    """
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy):  # DeepSpeed's is a subclass
        return f"{type(strategy).__name__} may shard the parameters"
    if any(parameter._backward_hooks for parameter in parameters):
        return "a parameter has a gradient hook"
    return None


def join(records: Sequence[PairLogps]) -> PairLogps:
    """Join the records of micro-batches to that of their batch."""
    if len(records) == 1:
        return records[0]
    first, *others = (record._replace(state=None) for record in records)
    joined: PairLogps = tree_map(lambda *parts: None if parts[0] is None else torch.cat(parts), first, *others)
    return joined._replace(state=records[0].state)


def in_microbatches(
    microbatches: Sequence[PairBatch],
    score: Callable[[PairBatch], tuple[Tensor, PairLogps]],
    parameters: Sequence[Tensor],
    scale: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor, PairLogps]:
    """Losses of a batch and their gradients, with the graph of one micro-batch at a time.

    A micro-batch's gradients are taken as soon as its losses are known, and its graph is freed; they add up in one copy
    of the parameters, which the backward pass of the sum hands over. The same numbers as `score` of the whole batch, as
    long as no pair's loss depends on another pair.

    Args:
        microbatches: parts of a batch.
        score: a micro-batch to the losses of its pairs, with gradients, and their record.
        parameters: all that the losses have gradients for; they may leave some out.
        scale: of the losses while gradients are taken, so that they do not vanish in float16.

    Returns:
        The sum of all losses, to run backward from; the losses `(B,)` and the record, without gradients.
    """
    losses: list[Tensor] = []
    records: list[PairLogps] = []

    def total(part: PairBatch) -> Tensor:
        found, pairs = score(part)
        losses.append(found.detach())
        records.append(pairs.detach())
        return found.sum()

    summed: Tensor = _Summed.apply(microbatches, total, scale, *parameters)  # type: ignore[no-untyped-call]
    return summed, torch.cat(losses), join(records)


class _Summed(torch.autograd.Function):
    """The sum of `total(part)` over micro-batches."""

    @staticmethod
    def forward(
        ctx: Any,
        microbatches: Sequence[PairBatch],
        total: Callable[[PairBatch], Tensor],
        scale: float | Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        sums: list[Tensor | None] = [None] * len(parameters)
        totals: list[Tensor] = []
        for part in microbatches:
            with torch.enable_grad():
                loss = total(part)
                scaled = loss * scale
            totals.append(loss.detach())
            # as in Lightning's own backward pass, which does not run under autocast
            with torch.autocast(loss.device.type, enabled=False):
                found = torch.autograd.grad(scaled, parameters, allow_unused=True)
            for place, (before, new) in enumerate(zip(sums, found, strict=True)):
                if new is not None:  # not in place: autograd may give one tensor to two parameters
                    sums[place] = new if before is None else before + new
            del found  # or it stays until the next part has its own
        ctx.sums, ctx.scale = sums, scale
        return torch.stack(totals).sum()

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> Any:
        sums, ctx.sums = ctx.sums, None
        if sums is None:
            raise RuntimeError(
                "The gradients of a batch in micro-batches are handed over once: its backward ran a second time."
            )
        weight = weight / ctx.scale
        gradients: list[Tensor | None] = []
        while sums:  # each is freed as its product is made
            one = sums.pop(0)
            gradients.append(None if one is None else one * weight)
        return None, None, None, *gradients
