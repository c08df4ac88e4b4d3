"""AOT without pairs (arXiv 2406.05882, section 3)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import AOTUnpairedLoss, CDPOLoss, DPOLoss

# Log-ratios 1, 7, −2 of chosen and 3, −4, 0 of rejected answers; sorted −2, 1, 7 and −4, 0, 3.
PAIRS = tiny.logps([-3.0, -1.0, -9.0], [-4.0, -8.0, -7.0], [-4.0, -8.0, -7.0], [-7.0, -4.0, -7.0])
DELTAS = torch.tensor([1.0 - 0.0, 7.0 - 3.0, -2.0 + 4.0], dtype=torch.float64)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_value_is_cdpo_between_quantiles_at_the_pair_that_holds_the_chosen_one(epsilon):
    right, flipped = torch.log1p(torch.exp(-0.3 * DELTAS)), torch.log1p(torch.exp(0.3 * DELTAS))
    torch.testing.assert_close(AOTUnpairedLoss(0.3, epsilon)(PAIRS), (1 - epsilon) * right + epsilon * flipped)


def test_slopes_reach_the_rejected_answers_whose_quantile_it_is():
    up, down = _slopes(AOTUnpairedLoss(0.3), PAIRS)
    torch.testing.assert_close(up, -0.3 * torch.sigmoid(-0.3 * DELTAS))
    torch.testing.assert_close(down, -up[[1, 2, 0]])  # 3 is met by 7, −4 by −2, 0 by 1


def test_which_rejected_answer_belongs_to_which_pair_does_not_matter():
    order = [2, 0, 1]
    shuffled = PAIRS._replace(
        policy_rejected=PAIRS.policy_rejected._replace(total=PAIRS.policy_rejected.total[order]),
        reference_rejected=PAIRS.reference_rejected._replace(total=PAIRS.reference_rejected.total[order]),
    )
    assert torch.equal(AOTUnpairedLoss(0.3)(shuffled), AOTUnpairedLoss(0.3)(PAIRS))
    assert not torch.allclose(DPOLoss(0.3)(shuffled), DPOLoss(0.3)(PAIRS))


def test_where_both_sides_are_in_the_same_order_it_is_dpo():
    pairs = tiny.logps([-3.0, -1.0, -9.0], [-4.0, -2.0, -8.0], [-4.0] * 3, [-4.0] * 3)
    torch.testing.assert_close(AOTUnpairedLoss(0.3)(pairs), DPOLoss(0.3)(pairs))


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_one_pair_alone_is_cdpo(epsilon):
    pairs = tiny.logps([-3.0], [-5.0], [-4.0], [-4.5])
    torch.testing.assert_close(AOTUnpairedLoss(0.3, epsilon)(pairs), CDPOLoss(0.3, epsilon)(pairs))


def test_it_says_that_it_couples_pairs():
    assert AOTUnpairedLoss.couples_pairs


@pytest.mark.parametrize("epsilon", [-0.1, 0.5, 0.7, math.nan])
def test_a_bad_smoothing_is_refused_by_name(epsilon):
    with pytest.raises(ValueError, match="`label_smoothing`"):
        AOTUnpairedLoss(label_smoothing=epsilon)


def _slopes(loss, pairs):
    sides = [pairs.policy_chosen.total.requires_grad_(), pairs.policy_rejected.total.requires_grad_()]
    return torch.autograd.grad(loss(pairs).sum(), sides)
