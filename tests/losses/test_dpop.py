"""DPO-Positive (arXiv 2402.13228, eq. 3)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import DPOLoss, DPOPLoss


def test_value_by_hand():
    """r_w = 2, r_l = −3: no penalty. r_w = −1, r_l = −5: 4 − 10·1."""
    pairs = tiny.logps([-3.0, -6.0], [-9.0, -7.0], [-5.0, -5.0], [-6.0, -2.0])
    expected = [math.log1p(math.exp(-0.1 * 5)), math.log1p(math.exp(0.1 * 6))]
    assert DPOPLoss(0.1, penalty_weight=10.0)(pairs).tolist() == pytest.approx(expected)


def test_slopes_by_hand():
    """−β·σ(−z) above the reference, (1 + λ) times as steep below; in the rejected log-prob β·σ(−z) at both."""
    pairs = tiny.logps([-3.0, -6.0], [-9.0, -7.0], [-5.0, -5.0], [-6.0, -2.0])
    sides = [pairs.policy_chosen.total.requires_grad_(), pairs.policy_rejected.total.requires_grad_()]
    up, down = torch.autograd.grad(DPOPLoss(0.1, 10.0)(pairs).sum(), sides)
    slopes = [0.1 / (1 + math.exp(0.5)), 0.1 / (1 + math.exp(-0.6))]
    assert up.tolist() == pytest.approx([-slopes[0], -11 * slopes[1]])
    assert down.tolist() == pytest.approx(slopes)


def test_without_penalty_it_is_dpo():
    pairs = tiny.at_margin(-30.0, 0.0, 4.0)
    assert torch.equal(DPOPLoss(0.2, 0.0)(pairs), DPOLoss(0.2)(pairs))


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_bad_weight_is_refused_by_name(weight):
    with pytest.raises(ValueError, match="`penalty_weight`"):
        DPOPLoss(penalty_weight=weight)
