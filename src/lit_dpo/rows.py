"""A batch in several rows, whose gradients add up: what a step needs is decided by a row, not by the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_dpo.data.batch import PairBatch
from lit_dpo.logps.records import PairLogps
from lit_dpo.losses import PreferenceLoss

ROW_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens of a row by device: so many that more of them would not be faster each. Measured on a CPU."""


def why_one_row(loss: PreferenceLoss, strategy: Any, parameters: Iterable[Tensor] = ()) -> str | None:
    """Why a training batch must run in one row, or None.

    Args:
        loss: one that looks at several pairs, or remembers them, needs all before it knows any gradient.
        strategy: the trainer's; the parameters that gradients are asked for must be those that the forward pass reads.
        parameters: hooks on one's gradient would run for every row, and once more for the sum.
    """
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

    if loss.couples_pairs or loss.initial_state() is not None:
        return f"{loss} couples the pairs of a batch"
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        return f"{type(strategy).__name__} may shard the parameters"
    if any(parameter._backward_hooks for parameter in parameters):
        return "a parameter has a gradient hook"
    return None


def join(records: Sequence[PairLogps]) -> PairLogps:
    """The record of a batch from those of its rows."""
    if len(records) == 1:
        return records[0]
    joined: PairLogps = _join([record._replace(state=None) for record in records])
    return joined._replace(state=records[0].state)


def _join(fields: Sequence[Any]) -> Any:
    if fields[0] is None or isinstance(fields[0], Tensor):
        return None if fields[0] is None else torch.cat(list(fields))
    return type(fields[0])(*(_join(field) for field in zip(*fields, strict=True)))


def row_by_row(
    rows: Sequence[PairBatch],
    score: Callable[[PairBatch], tuple[Tensor, PairLogps]],
    parameters: Sequence[Tensor],
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, PairLogps]:
    """Losses of a batch and their gradients, with the graph of one row at a time.

    A row's gradients are taken as soon as its losses are known, and its graph is freed; they add up in one copy of the
    parameters, which the backward pass of the sum hands over. The same numbers as `score` of the whole batch, as long
    as no pair's loss depends on another pair.

    Args:
        rows: parts of a batch.
        score: a row to the losses of its pairs, with gradients, and their record.
        parameters: all that the losses have gradients for; they may leave some out.
        scale: of the losses while gradients are taken, so that they do not vanish in float16.

    Returns:
        The sum of all losses, to run backward from; the losses `(B,)` and the record, without gradients.
    """
    losses: list[Tensor] = []
    records: list[PairLogps] = []

    def total(row: PairBatch) -> Tensor:
        found, pairs = score(row)
        losses.append(found.detach())
        records.append(pairs.detach())
        return found.sum()

    summed: Tensor = _Summed.apply(rows, total, scale, *parameters)  # type: ignore[no-untyped-call]
    return summed, torch.cat(losses), join(records)


class _Summed(torch.autograd.Function):
    """The sum of `total(row)` over rows."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Sequence[PairBatch],
        total: Callable[[PairBatch], Tensor],
        scale: float,
        *parameters: Tensor,
    ) -> Tensor:
        sums: list[Tensor | None] = [None] * len(parameters)
        totals: list[Tensor] = []
        for row in rows:
            with torch.enable_grad():
                loss = total(row)
                scaled = loss * scale
            totals.append(loss.detach())
            # as in Lightning's own backward pass, which does not run under autocast
            with torch.autocast(loss.device.type, enabled=False):
                found = torch.autograd.grad(scaled, parameters, allow_unused=True)
            for place, (before, new) in enumerate(zip(sums, found, strict=True)):
                if new is not None:  # not in place: autograd may give one tensor to two parameters
                    sums[place] = new if before is None else before + new
            del found  # or it stays until the next row has its own
        ctx.sums, ctx.scale = sums, scale
        return torch.stack(totals).sum()

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> Any:
        weight = weight / ctx.scale
        gradients: list[Tensor | None] = []
        while ctx.sums:  # each is freed as its product is made
            one = ctx.sums.pop(0)
            gradients.append(None if one is None else one * weight)
        return None, None, None, *gradients
