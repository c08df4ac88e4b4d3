"""A batch in several rows, whose gradients add up: what a step needs is decided by a row, not by the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_map

from lit_dpo.checkpoint import AdapterModule
from lit_dpo.data.batch import PairBatch
from lit_dpo.errors import TrainingError
from lit_dpo.logps.records import PairLogps
from lit_dpo.losses import PreferenceLoss

ROW_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens of a row by device, so that more would not be faster each: measured on a CPU, a guess on a GPU."""


def why_one_row(loss: PreferenceLoss, strategy: Any, parameters: Iterable[Tensor]) -> str | None:
    """Why a training batch must run in one row, or None.

    Args:
        loss: one that looks at several pairs, or remembers them, needs all before it knows any gradient.
        strategy: the trainer's; the parameters that gradients are asked for must be those that the forward pass reads.
        parameters: hooks on one's gradient would run for every row, and once more for the sum.
    """
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

    if loss.couples_pairs or loss.initial_state() is not None:
        return f"{loss} couples the pairs of a batch"
    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy):  # DeepSpeed's is a subclass
        return f"{type(strategy).__name__} may shard the parameters"
    if any(parameter._backward_hooks for parameter in parameters):
        return "a parameter has a gradient hook"
    return None


def join(records: Sequence[PairLogps]) -> PairLogps:
    """The record of a batch from those of its rows."""
    if len(records) == 1:
        return records[0]
    first, *others = (record._replace(state=None) for record in records)
    joined: PairLogps = tree_map(lambda *parts: None if parts[0] is None else torch.cat(parts), first, *others)
    return joined._replace(state=records[0].state)


def row_by_row(
    rows: Sequence[PairBatch],
    score: Callable[[PairBatch], tuple[Tensor, PairLogps]],
    parameters: Sequence[Tensor],
    scale: float | Tensor = 1.0,
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
        scale: float | Tensor,
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
        sums, ctx.sums = ctx.sums, None
        if sums is None:
            raise RuntimeError("The gradients of a batch in rows are handed over once: its backward ran a second time.")
        weight = weight / ctx.scale
        gradients: list[Tensor | None] = []
        while sums:  # each is freed as its product is made
            one = sums.pop(0)
            gradients.append(None if one is None else one * weight)
        return None, None, None, *gradients


class RowModule(AdapterModule):
    """A module that runs its batches in rows."""

    loss: PreferenceLoss
    row_tokens: int | None

    couples_pairs: bool | None = None
    """Whether an override of `forward`, `pair_logps` or `compute_loss` must see a whole training batch, because it
    mixes pairs, logs, or waits for other ranks. None: yes, if there is one. If False, they are called for each row."""

    _said_one_row = False

    def pair_logps(self, batch: PairBatch) -> PairLogps:
        """The record of a batch, or of a row."""
        raise NotImplementedError

    def compute_loss(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)` of a batch, or of a row."""
        raise NotImplementedError

    def losses_of(self, pairs: PairLogps) -> Tensor:
        """`compute_loss`, which must not be reduced: `(B,)`.

        Raises:
            TrainingError: naming both shapes; a mean would train with a part of the gradient.
        """
        losses = self.compute_loss(pairs)
        expected, found = tuple(pairs.policy_chosen.total.shape), getattr(losses, "shape", None)
        if found is None or tuple(found) != expected:
            what = f"a {type(losses).__name__}" if found is None else f"the shape {tuple(found)}"
            raise TrainingError(
                f"Expected a loss for each pair, of shape {expected}, but {type(self.loss).__name__} and "
                f"{type(self).__name__}.compute_loss gave {what}. Leave out the mean: the module takes it over all "
                "pairs of an optimizer step."
            )
        return losses

    def batch_logps(self, batch: PairBatch) -> PairLogps:
        """`pair_logps` of a batch of any size, without gradients and dropout, one row at a time."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            with torch.no_grad():
                rows = [batch] if self._may_couple_pairs else batch.cut(self.row_limit)
                return join([self.pair_logps(row) for row in rows])
        finally:
            if training:
                self.model.train()

    @property
    def row_limit(self) -> int:
        """Most tokens that run at once, a longer pair excepted: `row_tokens`, or what suits the device."""
        return self.row_tokens or ROW_TOKENS["cuda" if self.device.type == "cuda" else "cpu"]

    @property
    def why_one_row(self) -> str | None:
        """Why a training batch must not be cut, or None."""
        if self._may_couple_pairs:
            return f"{type(self).__name__} may couple pairs (`couples_pairs = False` in its class says it does not)"
        return why_one_row(self.loss, self.trainer.strategy, self.parameters())

    @property
    def _may_couple_pairs(self) -> bool:
        if self.couples_pairs is not None:
            return self.couples_pairs
        methods = (getattr(type(self), name) for name in ("forward", "pair_logps", "compute_loss"))
        return any(not method.__module__.startswith("lit_dpo.") for method in methods)

    def training_rows(self, batch: PairBatch) -> list[PairBatch]:
        """A training batch in rows; whole where it must be, in a line that says so once."""
        rows = batch.cut(self.row_limit)
        if len(rows) == 1 or (reason := self.why_one_row) is None:
            return rows
        if not self._said_one_row:
            rank_zero_info(f"training batches run in one row each, whatever `row_tokens` is: {reason}")
            self._said_one_row = True
        return [batch]

    def row_by_row(self, rows: Sequence[PairBatch]) -> tuple[Tensor, Tensor, PairLogps]:
        """Losses of a batch and their gradients, see the function of this name."""

        def score(row: PairBatch) -> tuple[Tensor, PairLogps]:
            pairs = self.pair_logps(row)
            return self.losses_of(pairs), pairs

        scaler = getattr(self.trainer.precision_plugin, "scaler", None) if self._trainer is not None else None
        trained = [p for p in self.parameters() if p.requires_grad]
        # not `get_scale`, which waits for the device
        scale = scaler.scale(torch.ones((), device=self.device)) if scaler else 1.0
        return row_by_row(rows, score, trained, scale)
