"""APO-down (arXiv 2408.06266, eq. 8)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import APODownLoss, APOZeroLoss


def _at(chosen, rejected):
    """Pairs with these log-ratios."""
    return tiny.logps(chosen, rejected, [0.0] * len(chosen), [0.0] * len(chosen))


def test_value_by_hand():
    expected = 1 / (1 + math.exp(-0.2)) + 1 - 1 / (1 + math.exp(-0.5))
    assert APODownLoss(0.1)(_at([2.0], [-3.0])).item() == pytest.approx(expected)


def test_it_is_bounded_by_0_and_2():
    """Least where both likelihoods are down and the rejected one further."""
    assert APODownLoss(0.1)(_at([-1e4, 1e4], [-2e4, 2e4])).tolist() == [0.0, 2.0]


def test_at_a_large_margin_it_pushes_the_chosen_answer_down():
    pairs = _at([0.0], [-100.0])
    total = pairs.policy_chosen.total.requires_grad_()
    APODownLoss(0.1)(pairs).backward()
    assert total.grad.item() == pytest.approx(0.1 / 4, rel=1e-3)


def test_with_a_chosen_log_ratio_of_0_it_is_apo_zero():
    pairs = _at([0.0, 0.0], [-3.0, 4.0])
    torch.testing.assert_close(APODownLoss(0.1)(pairs), APOZeroLoss(0.1)(pairs))


def test_moving_both_sides_matters_where_dpo_does_not_see_it():
    pairs = _at([0.0, 5.0], [-3.0, 2.0])
    assert APODownLoss(0.1)(pairs).diff().item() == pytest.approx(torch.tensor(0.5).sigmoid().item() - 0.5)
