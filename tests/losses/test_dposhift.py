"""DPO-Shift (arXiv 2502.07599)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import DPOLoss, DPOShiftLoss

# r_w is −4 and 2, r_l −20 and 6.
PAIRS = tiny.logps([-5.0, -3.0], [-25.0, -4.0], [-1.0, -5.0], [-5.0, -10.0])


def test_value_by_hand():
    """β·(−4 + 0.75·20) = 1.1 and β·(2 − 0.75·6) = −0.25."""
    losses = DPOShiftLoss(0.1, rejected_weight=0.75)(PAIRS)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-1.1)), math.log1p(math.exp(0.25))])


def test_slopes_by_hand():
    """−β·σ(−z), and the rejected completion's the other way, f times as large."""
    pairs = PAIRS.detach()
    sides = [pairs.policy_chosen.total.requires_grad_(), pairs.policy_rejected.total.requires_grad_()]
    up, down = torch.autograd.grad(DPOShiftLoss(0.1, rejected_weight=0.75)(pairs).sum(), sides)
    slopes = [0.1 / (1 + math.exp(1.1)), 0.1 / (1 + math.exp(-0.25))]
    assert up.tolist() == pytest.approx([-slope for slope in slopes])
    assert down.tolist() == pytest.approx([0.75 * slope for slope in slopes])


def test_near_1_it_is_dpo():
    torch.testing.assert_close(DPOShiftLoss(0.1, rejected_weight=1 - 1e-14)(PAIRS), DPOLoss(0.1)(PAIRS))


@pytest.mark.parametrize("rejected_weight", [-0.1, 0.0, 1.0, math.nan])
def test_a_bad_weight_is_refused_by_name(rejected_weight):
    with pytest.raises(ValueError, match="`rejected_weight`"):
        DPOShiftLoss(rejected_weight=rejected_weight)
