"""R-DPO (arXiv 2403.19159, eq. 9)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import DPOLoss, RDPOLoss

LENGTHS = ([12, 3], [2, 8])


def _pairs():
    """Margins 5 and −4, lengths longer by 10 and −5."""
    return tiny.logps([-3.0, -10.0], [-9.0, -3.0], [-5.0, -8.0], [-6.0, -5.0], lengths=LENGTHS)


def test_value_by_hand():
    expected = [math.log1p(math.exp(-(0.1 * 5 + 0.05 * 10))), math.log1p(math.exp(0.1 * 4 + 0.05 * 5))]
    assert RDPOLoss(0.1, length_cost=0.05)(_pairs()).tolist() == pytest.approx(expected)


def test_slope_by_hand():
    pairs = _pairs()
    total = pairs.policy_chosen.total.requires_grad_()
    RDPOLoss(0.1, 0.05)(pairs).sum().backward()
    assert total.grad.tolist() == pytest.approx([-0.1 / (1 + math.exp(1.0)), -0.1 / (1 + math.exp(-0.65))])


def test_it_is_bradley_terry_on_rewards_that_pay_for_length():
    """The best policy for r − α·n is π ∝ π_ref·exp((r − α·n)/β); put in for π, the loss sees r again."""
    beta, length_cost, rewards = 0.3, 0.1, torch.tensor([[2.0, -1.0], [0.5, 1.0]], dtype=torch.float64)
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)
    logratios = (rewards - length_cost * lengths) / beta
    pairs = tiny.logps(*logratios.tolist(), [0.0, 0.0], [0.0, 0.0], lengths=LENGTHS)
    torch.testing.assert_close(RDPOLoss(beta, length_cost)(pairs), torch.log1p(torch.exp(rewards[1] - rewards[0])))


def test_a_longer_chosen_answer_is_pushed_less_and_answers_of_one_length_as_by_dpo():
    same = tiny.logps([-3.0], [-9.0], [-5.0], [-6.0], lengths=([7], [7]))
    assert torch.equal(RDPOLoss(0.1, 0.5)(same), DPOLoss(0.1)(same))
    with_length, without = RDPOLoss(0.1, 0.05)(_pairs()), DPOLoss(0.1)(_pairs())
    assert with_length[0] < without[0]
    assert with_length[1] > without[1]


@pytest.mark.parametrize("length_cost", [-0.1, math.nan, math.inf])
def test_a_bad_alpha_is_refused_by_name(length_cost):
    with pytest.raises(ValueError, match="`length_cost`"):
        RDPOLoss(length_cost=length_cost)
