"""SPPO, hard labels (arXiv 2405.00675, eq. 4.7)."""

from __future__ import annotations

import torch

import tiny
from lit_dpo.losses import IPOLoss, SPPOLoss


def _at(chosen, rejected):
    """Pairs with these log-ratios."""
    return tiny.logps(chosen, rejected, [0.0] * len(chosen), [0.0] * len(chosen))


def test_value_by_hand():
    """Targets ±5: (2 − 5)² + (−3 + 5)² and (5 − 5)² + (−5 + 5)²."""
    torch.testing.assert_close(SPPOLoss(0.1)(_at([2.0, 5.0], [-3.0, -5.0])), torch.tensor([13.0, 0.0]).double())


def test_each_log_ratio_has_its_own_target():
    pairs = _at([4.0, 5.0, 6.0], [-6.0, -5.0, -4.0])
    sides = [pairs.policy_chosen.total.requires_grad_(), pairs.policy_rejected.total.requires_grad_()]
    up, down = torch.autograd.grad(SPPOLoss(0.1)(pairs).sum(), sides)
    torch.testing.assert_close(up, torch.tensor([-2.0, 0.0, 2.0]).double())
    torch.testing.assert_close(down, torch.tensor([-2.0, 0.0, 2.0]).double())


def test_it_is_half_ipos_square_of_the_margin_plus_that_of_the_sum():
    """a² + b² = ((a − b)² + (a + b)²)/2, with IPO's target half as far at twice β."""
    chosen, rejected = torch.tensor([2.0, -7.0]).double(), torch.tensor([-3.0, 1.0]).double()
    pairs = _at(chosen.tolist(), rejected.tolist())
    expected = (IPOLoss(0.05, "sum")(pairs) + (chosen + rejected) ** 2) / 2
    torch.testing.assert_close(SPPOLoss(0.1)(pairs), expected)
