"""Cal-DPO (arXiv 2412.14516)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import CalDPOLoss, DPOLoss, SPPOLoss

# Log-ratios 2 and −3, −1 and −5.
PAIRS = tiny.logps([-3.0, -6.0], [-9.0, -7.0], [-5.0, -5.0], [-6.0, -2.0])


def test_value_by_hand():
    """β = 0.25: targets ±2, so 0² + 1² and 3² + 3²."""
    expected = [math.log1p(math.exp(-5)) + 0.5 * 1, math.log1p(math.exp(-4)) + 0.5 * 18]
    assert CalDPOLoss(0.25)(PAIRS).tolist() == pytest.approx(expected)
    doubled = [math.log1p(math.exp(-5)) + 1, math.log1p(math.exp(-4)) + 18]
    assert CalDPOLoss(0.25, calibration_weight=1.0)(PAIRS).tolist() == pytest.approx(doubled)


def test_slopes_by_hand():
    pairs = tiny.logps([-3.0, -6.0], [-9.0, -7.0], [-5.0, -5.0], [-6.0, -2.0])
    sides = [pairs.policy_chosen.total.requires_grad_(), pairs.policy_rejected.total.requires_grad_()]
    up, down = torch.autograd.grad(CalDPOLoss(0.25)(pairs).sum(), sides)
    slopes = [1 / (1 + math.exp(5)), 1 / (1 + math.exp(4))]
    assert up.tolist() == pytest.approx([-slopes[0] + 0, -slopes[1] - 3])
    assert down.tolist() == pytest.approx([slopes[0] - 1, slopes[1] - 3])


def test_it_is_dpo_at_beta_1_and_sppo():
    expected = DPOLoss(1.0)(PAIRS) + 0.3 * SPPOLoss(0.25)(PAIRS)
    torch.testing.assert_close(CalDPOLoss(0.25, 0.3)(PAIRS), expected)


@pytest.mark.parametrize("weight", [0.0, -0.1, math.nan, math.inf])
def test_a_bad_weight_is_refused_by_name(weight):
    with pytest.raises(ValueError, match="`calibration_weight`"):
        CalDPOLoss(calibration_weight=weight)
