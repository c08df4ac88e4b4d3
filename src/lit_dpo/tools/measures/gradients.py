"""What a loss makes of comparisons: its value, and how hard it pulls at the chosen completions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_dpo.data.batch import places
from lit_dpo.logps.microbatch import cut_off
from lit_dpo.logps.records import PairLogps, SequenceLogps
from lit_dpo.losses import PreferenceLoss
from lit_dpo.losses.composed import within


class Measured(NamedTuple):
    """A loss on comparisons.

    Attributes:
        values: `(B,)` losses; of one over lists, on each comparison that of its prompt.
        weights: `(B,)` mean over the chosen completion's tokens of |∂ΣL/∂ log π(token)|.
    """

    values: Tensor
    weights: Tensor


def measured(loss: PreferenceLoss, pairs: PairLogps) -> Measured:
    """Evaluate a loss, and its gradient with respect to the chosen completions' log-probs.

    The weight of a comparison is the mean over the tokens of its chosen completion of |∂L/∂ log π(token)|, what an
    optimizer would see there: for DPO β·σ(−βΔ), for a loss of log-probs per token, such as SimPO, the same divided by
    the length. L is the comparison's own loss; of a loss over lists that of its prompt; of a loss that couples pairs
    the sum over all of them. What a loss reads of whole distributions (TDPO's divergence) is no part of it.

    Args:
        loss: with all that it requires in the record.
        pairs: without gradients, on the CPU.

    Raises:
        ValueError: if the loss refuses these pairs.

    Example:
        >>> from lit_dpo.losses import DPOLoss
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), torch.tensor([2.0]))
        >>> pairs = PairLogps(side(-1.0), side(-21.0), side(-11.0), side(-31.0))
        >>> measured(DPOLoss(beta=0.1), pairs).weights
        tensor([0.0500])
    """
    with torch.enable_grad():
        lists = pairs.lists
        leaves = cut_off(lists)
        seen = leaves.record.pairs(pairs.columns, pairs.state)
        losses = loss(seen)
        shared = bool((lists.comparisons_per_prompt > 1).any())
        if shared and not any(one.per_prompt for one in within(loss)):
            weights = _of_sides(loss, pairs)
        else:
            weights = _pull(losses, leaves.record.policy)[torch.from_numpy(places(lists)[:, 0])]
        values = lists.per_comparison(losses.detach()) if loss.per_prompt else losses.detach()
    return Measured(values, weights)


def _of_sides(loss: PreferenceLoss, pairs: PairLogps) -> Tensor:
    """Weights where a completion is in several comparisons: each comparison has copies of its own."""
    chosen = pairs.policy_chosen._replace(
        total=pairs.policy_chosen.total.detach().requires_grad_(),
        per_token=None if pairs.policy_chosen.per_token is None else pairs.policy_chosen.per_token.requires_grad_(),
    )
    return _pull(loss(pairs._replace(policy_chosen=chosen, completions=None)), chosen)


def _pull(losses: Tensor, leaves: SequenceLogps) -> Tensor:
    """`(C,)` means over each completion's tokens of the absolute gradient."""
    asked = [values for values in (leaves.total, leaves.per_token) if values is not None]
    if not losses.requires_grad:
        return torch.zeros_like(leaves.total)
    found = torch.autograd.grad(losses.sum(), asked, allow_unused=True)
    of_total = torch.zeros_like(leaves.total) if found[0] is None else found[0]
    if len(found) == 1 or found[1] is None:
        return of_total.abs()
    each = found[1] + torch.repeat_interleave(of_total, leaves.length.long())
    return leaves.sums(each.abs()) / leaves.length
