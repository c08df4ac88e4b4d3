"""TDPO (arXiv 2404.11999)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import DPOLoss, TDPOLoss


def _pairs():
    """Margin 5; divergences 1 + 2 on the chosen and 4 + 6 on the rejected answer."""
    pairs = tiny.logps([-3.0], [-9.0], [-5.0], [-6.0], lengths=([2], [2]))
    return pairs._replace(
        policy_chosen=pairs.policy_chosen._replace(kl=torch.tensor([1.0, 2.0], dtype=torch.float64)),
        policy_rejected=pairs.policy_rejected._replace(kl=torch.tensor([4.0, 6.0], dtype=torch.float64)),
    )


@pytest.mark.parametrize(
    ("loss", "z"),
    [
        (TDPOLoss(0.1, "tdpo1"), 0.1 * (5 - 7)),
        (TDPOLoss(0.1), 0.1 * (5 - 0.5 * 7)),
        (TDPOLoss(0.1, kl_weight=0.3), 0.1 * (5 - 0.3 * 7)),
    ],
)
def test_value_and_slopes_by_hand(loss, z):
    """−β·σ(−z) in the chosen log-prob; in each of its divergences the same for TDPO1 and none for TDPO2; in the
    rejected ones α times it, the other way round."""
    pairs = _pairs()
    leaves = [
        pairs.policy_chosen.total.requires_grad_(),
        pairs.policy_chosen.kl.requires_grad_(),
        pairs.policy_rejected.kl.requires_grad_(),
    ]
    losses = loss(pairs)
    total, chosen, rejected = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
    slope, kl_weight = -0.1 / (1 + math.exp(z)), 1 if loss.version == "tdpo1" else loss.kl_weight or 0.5
    assert losses.item() == pytest.approx(math.log1p(math.exp(-z)))
    assert total.item() == pytest.approx(slope)
    assert chosen.tolist() == pytest.approx([slope, slope] if loss.version == "tdpo1" else [0, 0])
    assert rejected.tolist() == pytest.approx([-kl_weight * slope] * 2)


def test_equal_divergences_leave_dpo():
    pairs = _pairs()
    pairs = pairs._replace(policy_rejected=pairs.policy_rejected._replace(kl=pairs.policy_chosen.kl))
    for loss in (TDPOLoss(0.2, "tdpo1"), TDPOLoss(0.2)):
        assert torch.equal(loss(pairs), DPOLoss(0.2)(pairs))


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="`version`"):
        TDPOLoss(version="tdpo3")
    with pytest.raises(ValueError, match="`kl_weight` only with"):
        TDPOLoss(version="tdpo1", kl_weight=0.5)
    for kl_weight in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="`kl_weight`"):
            TDPOLoss(kl_weight=kl_weight)
