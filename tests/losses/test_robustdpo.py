"""Robust DPO (arXiv 2403.00409, section 3.1)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import DPOLoss, RobustDPOLoss

MARGINS = (-40.0, -3.0, 0.0, 3.0, 40.0)
PAIRS, FLIPPED = tiny.at_margin(*MARGINS), tiny.at_margin(*(-margin for margin in MARGINS))


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.45])
def test_its_mean_over_flipped_labels_is_the_dpo_loss_of_the_true_ones(epsilon):
    loss = RobustDPOLoss(0.3, epsilon)
    torch.testing.assert_close((1 - epsilon) * loss(PAIRS) + epsilon * loss(FLIPPED), DPOLoss(0.3)(PAIRS))


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.45])
def test_value_by_hand(epsilon):
    dpo, flipped = DPOLoss(0.3)(PAIRS), DPOLoss(0.3)(FLIPPED)
    expected = ((1 - epsilon) * dpo - epsilon * flipped) / (1 - 2 * epsilon)
    torch.testing.assert_close(RobustDPOLoss(0.3, epsilon)(PAIRS), expected)


def test_without_smoothing_it_is_dpo():
    assert torch.equal(RobustDPOLoss(0.3, 0.0)(PAIRS), DPOLoss(0.3)(PAIRS))


def test_it_is_negative_far_on_the_right_side_and_falls_for_ever():
    """Slope −βε/(1−2ε) = −0.3 · 0.2/0.6 = −0.1."""
    losses = RobustDPOLoss(0.3, 0.2)(tiny.at_margin(1e3, 2e3))
    assert losses.tolist() == pytest.approx([-100.0, -200.0])


@pytest.mark.parametrize("epsilon", [-0.1, 0.5, 0.7, math.nan])
def test_a_bad_smoothing_is_refused_by_name(epsilon):
    with pytest.raises(ValueError, match="`label_smoothing`"):
        RobustDPOLoss(label_smoothing=epsilon)
