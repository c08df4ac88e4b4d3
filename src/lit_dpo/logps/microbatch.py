"""A batch in micro-batches, whose gradients add up: what a step needs is decided by one of them, not by the batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_dpo.compat import has_gradient_hook
from lit_dpo.data.batch import CompletionBatch
from lit_dpo.logps.records import CompletionLogps, PairLogps, SequenceLogps

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
    joined: PairLogps = concatenate([record._replace(state=None) for record in records])
    return joined._replace(state=records[0].state)


def concatenate(parts: Sequence[Any]) -> Any:
    """Put tensors one after another, in records and dictionaries; a field that the first does not have is in none."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    if isinstance(parts[0], dict):
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: concatenate([part[name] for part in parts]) for name in names}
    return type(parts[0])(*(concatenate(fields) for fields in zip(*parts, strict=True)))


def microbatches(batch: CompletionBatch, tokens: float, of_one_prompt: float) -> list[CompletionBatch]:
    """Cut a batch into micro-batches of whole prompts, and a prompt that is too long between its completions.

    Args:
        batch: to be cut.
        tokens: most tokens of a micro-batch.
        of_one_prompt: most tokens of one prompt with more than two completions; those of a longer one run in parts,
            which compare nothing: log-probs of all its completions must be put together before they can be compared.
    """
    found: list[CompletionBatch] = []
    for part in batch.cut(tokens):
        too_long = part.input_ids.shape[1] > of_one_prompt and len(part.prompt_lengths) == 1
        pieces = part.split(of_one_prompt) if too_long else [part]
        found += pieces if len(pieces) > 1 else [part]  # a pair stays whole
    return found


class GradientSum:
    """Gradients of the losses of micro-batches, which add up in one copy of the parameters.

    Those of a micro-batch are taken as soon as its losses are known, and its graph is freed; the backward pass of
    `total` hands the sum over. The same numbers as from the whole batch, as long as no prompt's losses depend on
    another prompt.

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

    def add(self, losses: Tensor, leaves: Sequence[Tensor] = (), own: Tensor | None = None) -> None:
        """Take the gradients of losses, `(B,)` or `(P,)`, and free their graph.

        Args:
            losses: of a micro-batch, or of a batch whose log-probs are `leaves`.
            leaves: tensors whose gradients are wanted too; `of_leaves` has them then.
            own: those of the losses that count on this rank. None: all of them.
        """
        self._losses.append((losses if own is None else own).detach())
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

    def leave(self, outputs: Sequence[Tensor]) -> None:
        """Run backward through what a micro-batch computes, for gradients of 0: as other ranks do, with theirs."""
        nothing = [torch.zeros_like(one) for one in outputs]
        with torch.autocast(outputs[0].device.type, enabled=False):
            self._add(torch.autograd.grad(outputs, self._parameters, nothing, allow_unused=True))

    def _add(self, found: Sequence[Tensor | None]) -> None:
        for place, (before, new) in enumerate(zip(self._sums, found, strict=True)):
            if new is not None:  # not in place: autograd may give one tensor to two parameters
                self._sums[place] = new if before is None else before + new

    @property
    def losses(self) -> Tensor:
        """Those of all micro-batches, without gradients."""
        return torch.cat(self._losses)

    def total(self) -> Tensor:
        """Return the sum of all losses, to run backward from, once."""
        sums = [losses.sum() for losses in self._losses]
        value = torch.stack(sums).sum() if sums else self._parameters[0].new_zeros(())
        # no second reference: the backward pass frees one after another
        gradients, self._sums = self._sums, []
        found: Tensor = _Summed.apply(value, gradients, self._scale, *self._parameters)  # type: ignore[no-untyped-call]
        return found


class Leaves(NamedTuple):
    """What of a batch's record has gradients, cut off from the models: a loss of it knows no model.

    Attributes:
        record: of the batch, whose log-probs under the policy are leaves.
        tensors: the leaves.
    """

    record: CompletionLogps
    tensors: list[Tensor]


def cut_off(record: CompletionLogps) -> Leaves:
    """Cut a batch's record off from the graph it may have, and let it ask for gradients.

    `total` and `per_token` are leaves of their own, as a loss may read either; what both lead to adds up later.
    """
    asking = {
        name: values.detach().requires_grad_()
        for name in ("total", "per_token", "kl")
        if (values := getattr(record.policy, name)) is not None
    }
    policy = record.policy._replace(**asking)
    return Leaves(record._replace(policy=policy), differentiable(policy))


def differentiable(logps: SequenceLogps) -> list[Tensor]:
    """List what of the policy's log-probs has gradients: `total`, `per_token`, `kl`, if they are there."""
    return [values for values in (logps.total, logps.per_token, logps.kl) if values is not None]


def shares(gradients: Sequence[Tensor], parts: Sequence[CompletionBatch]) -> Iterator[list[Tensor]]:
    """Hand each micro-batch its part of the gradients of a batch's leaves.

    Args:
        gradients: of the leaves: `(C,)`, a number per completion, then `(N,)`, one per token.
        parts: the micro-batches.
    """
    begun = [0, 0]
    for part in parts:
        counts = [len(part.completion_lengths), int(part.completion_lengths.sum())]
        ends = [start + count for start, count in zip(begun, counts, strict=True)]
        total, *others = gradients
        yield [total[begun[0] : ends[0]], *(one[begun[1] : ends[1]] for one in others)]
        begun = ends


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
