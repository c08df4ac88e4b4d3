"""A training batch in two passes over its micro-batches: all log-probs, then gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_dpo.checkpoint import random_state, restore_random_state
from lit_dpo.logps.microbatch import GradientSum, cut_off, differentiable, shares

if TYPE_CHECKING:
    from lit_dpo.data.batch import CompletionBatch
    from lit_dpo.logps.records import PairLogps, SequenceLogps


class Passes(NamedTuple):
    """What `in_two_passes` asks of a module.

    Attributes:
        score: the first pass over the micro-batches, without gradients: the record of their batch, and the random state
            in which each micro-batch's policy was run.
        losses: of a record with gradients, those whose sum is differentiated, and those that are this rank's.
        again: the second pass over a micro-batch, with gradients.
    """

    score: Callable[[], tuple[PairLogps, list[dict[str, Any]]]]
    losses: Callable[[PairLogps], tuple[Tensor, Tensor]]
    again: Callable[[CompletionBatch], SequenceLogps]


def in_two_passes(
    parts: Sequence[CompletionBatch], passes: Passes, sums: GradientSum, others: Sequence[CompletionBatch] = ()
) -> tuple[Tensor, Tensor, PairLogps]:
    """Know all log-probs before any gradient: for losses that look at several prompts, or at one that is in parts.

    First all log-probs without a graph, then the losses and their gradients with respect to these, and then each
    micro-batch again, under the dropout masks that it had.

    Args:
        parts: micro-batches.
        passes: how they are run.
        sums: where gradients add up.
        others: micro-batches whose second pass is made for nothing, as their first is by `score`.

    Returns:
        The sum of this rank's losses, to run backward from, these losses, and the record.
    """
    with torch.no_grad():
        record, draws = passes.score()
    assert record.completions is not None
    leaves = cut_off(record.completions)
    losses, own = passes.losses(leaves.record.pairs(record.columns, record.state))
    sums.add(losses, leaves.tensors, own)
    after = random_state()
    for part, draw, gradients in zip(parts, draws, shares(sums.of_leaves, parts), strict=True):
        restore_random_state([draw], 0)
        logps = passes.again(part)
        sums.follow(differentiable(logps), gradients)
        del logps  # or they stay until the next ones are there
    for part in others:
        sums.leave(differentiable(passes.again(part)))
    restore_random_state([after], 0)
    return sums.total(), sums.losses, record
