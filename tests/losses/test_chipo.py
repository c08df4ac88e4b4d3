"""χPO (arXiv 2407.13399)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import ChiPOLoss, DPOLoss

# π/π_ref: 2 and 1/2 of the chosen, 1 and 3 of the rejected answers.
PAIRS = tiny.logps([math.log(2), math.log(1 / 2)], [0.0, math.log(3)], [0.0, 0.0], [0.0, 0.0])


def test_value_by_hand():
    """φ: 2 + log 2 − 1, and 1/2 − log 2 − 3 − log 3."""
    z = [0.5 * (1 + math.log(2)), 0.5 * (-2.5 - math.log(6))]
    assert ChiPOLoss(0.5)(PAIRS).tolist() == pytest.approx([math.log1p(math.exp(-one)) for one in z])


def test_slopes_by_hand():
    """−β·(u_w + 1)·σ(−z) and β·(u_l + 1)·σ(−z), as φ′(u)·du/dr = u + 1."""
    pairs = tiny.logps([math.log(2)], [math.log(3)], [0.0], [0.0])
    sides = [pairs.policy_chosen.total.requires_grad_(), pairs.policy_rejected.total.requires_grad_()]
    up, down = torch.autograd.grad(ChiPOLoss(0.5)(pairs).sum(), sides)
    sigma = 1 / (1 + math.exp(0.5 * (-1 + math.log(2 / 3))))
    assert up.item() == pytest.approx(-0.5 * 3 * sigma)
    assert down.item() == pytest.approx(0.5 * 4 * sigma)


def test_far_below_the_reference_it_is_dpo():
    """Where both answers are, u is nothing next to log u."""
    pairs = tiny.logps([-60.0], [-50.0], [0.0], [0.0])
    torch.testing.assert_close(ChiPOLoss(0.1)(pairs), DPOLoss(0.1)(pairs))


def test_it_punishes_a_chosen_answers_rise_far_less_than_a_rejected_ones():
    """At equal log-ratios r a rise of the rejected answer costs e^r + 1 times β/2, not DPO's β/2."""
    pairs = tiny.logps([4.0], [4.0], [0.0], [0.0])
    total = pairs.policy_rejected.total.requires_grad_()
    ChiPOLoss(0.1)(pairs).sum().backward()
    assert total.grad.item() == pytest.approx(0.05 * (math.exp(4) + 1))
