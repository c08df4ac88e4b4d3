"""DiscoPOP (arXiv 2406.08414, eq. 5)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import DiscoPOPLoss, DPOLoss

MARGINS = (-8.0, -1.0, 0.0, 1.0, 8.0)


@pytest.mark.parametrize("tau", [0.05, 0.5, 1.0])
def test_value_by_hand(tau):
    z = 0.3 * torch.tensor(MARGINS, dtype=torch.float64)
    gate = torch.sigmoid(z / tau)
    expected = (1 - gate) * torch.log1p(torch.exp(-z)) + gate * torch.exp(-z)
    torch.testing.assert_close(DiscoPOPLoss(0.3, tau)(tiny.at_margin(*MARGINS)), expected)


def test_far_on_the_wrong_side_it_is_dpo_and_on_the_right_one_exponential():
    wrong, right = tiny.at_margin(-1e4, -100.0), tiny.at_margin(20.0, 100.0)
    torch.testing.assert_close(DiscoPOPLoss(0.1)(wrong), DPOLoss(0.1)(wrong))
    torch.testing.assert_close(DiscoPOPLoss(0.1)(right), torch.exp(-0.1 * right.margin))


def test_it_has_a_dip_before_margin_0():
    """Not convex: lower at z = −τ·4 than at 0."""
    losses = DiscoPOPLoss(0.1)(tiny.at_margin(-10.0, -2.0, 0.0))
    assert losses[1] < losses[0]
    assert losses[1] < losses[2]


@pytest.mark.parametrize("tau", [0.0, -0.1, 1.5, math.nan, math.inf])
def test_a_bad_tau_is_refused_by_name(tau):
    with pytest.raises(ValueError, match="`tau`"):
        DiscoPOPLoss(tau=tau)
