"""NCA on pairs (arXiv 2402.05369, section 4.1)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import DPOLoss, NCALoss


def _at(chosen, rejected):
    """Pairs with these log-ratios."""
    return tiny.logps(chosen, rejected, [0.0] * len(chosen), [0.0] * len(chosen))


def test_value_by_hand():
    softplus = [math.log1p(math.exp(-0.2)), math.log1p(math.exp(0.2)), math.log1p(math.exp(-0.3))]
    expected = softplus[0] + softplus[1] / 2 + softplus[2] / 2
    assert NCALoss(0.1)(_at([2.0], [-3.0])).item() == pytest.approx(expected)


def test_the_chosen_log_ratio_has_a_target_of_log_2_over_beta():
    pairs = _at([math.log(2) / 0.1], [0.0])
    total = pairs.policy_chosen.total.requires_grad_()
    NCALoss(0.1)(pairs).backward()
    assert total.grad.item() == pytest.approx(0, abs=1e-12)


def test_unlike_dpo_it_prefers_a_likely_chosen_answer_at_the_same_margin():
    low, high = _at([-10.0], [-20.0]), _at([5.0], [-5.0])
    assert torch.equal(DPOLoss(0.1)(low), DPOLoss(0.1)(high))
    assert NCALoss(0.1)(low) > NCALoss(0.1)(high) + 0.1


def test_a_rejected_answer_alone_only_falls():
    losses = NCALoss(0.1)(_at([0.0] * 4, [-1e4, -10.0, 0.0, 10.0]))
    assert (losses.diff() > 0).all()
    assert losses[0].item() == pytest.approx(1.5 * math.log(2))
