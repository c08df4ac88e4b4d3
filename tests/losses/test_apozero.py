"""APO-zero (arXiv 2408.06266, eq. 7)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import APOZeroLoss


def _at(chosen, rejected):
    """Pairs with these log-ratios."""
    return tiny.logps(chosen, rejected, [0.0] * len(chosen), [0.0] * len(chosen))


def test_value_by_hand():
    expected = 1 - 1 / (1 + math.exp(-0.2)) + 1 / (1 + math.exp(0.3))
    assert APOZeroLoss(0.1)(_at([2.0], [-3.0])).item() == pytest.approx(expected)


def test_it_is_bounded_by_0_and_2():
    assert APOZeroLoss(0.1)(_at([1e4, -1e4], [-1e4, 1e4])).tolist() == [0.0, 2.0]


def test_each_side_is_pulled_by_its_own_log_ratio_alone():
    pairs = _at([2.0, 2.0, 5.0], [-3.0, 1.0, 1.0])
    sides = [pairs.policy_chosen.total.requires_grad_(), pairs.policy_rejected.total.requires_grad_()]
    up, down = torch.autograd.grad(APOZeroLoss(0.1)(pairs).sum(), sides)
    assert (up < 0).all()
    assert (down > 0).all()
    assert up[0] == up[1] != up[2]
    assert down[0] != down[1] == down[2]
