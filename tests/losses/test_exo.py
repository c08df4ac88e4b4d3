"""EXO on pairs (arXiv 2402.00856, eq. 16)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import CDPOLoss, EXOLoss

MARGINS = (-30.0, -3.0, 0.0, 3.0, 30.0)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 0.4])
def test_value_is_the_divergence_of_the_smoothed_label_from_the_policys_preference(epsilon):
    p = torch.sigmoid(0.3 * torch.tensor(MARGINS, dtype=torch.float64))
    expected = p * torch.log(p / (1 - epsilon)) + (1 - p) * torch.log((1 - p) / epsilon)
    torch.testing.assert_close(EXOLoss(0.3, epsilon)(tiny.at_margin(*MARGINS)), expected)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 0.4])
def test_the_minimum_is_0_where_that_of_cdpo_is(epsilon):
    best = math.log((1 - epsilon) / epsilon) / 0.3
    pairs = tiny.at_margin(best, best - 1, best + 1)
    total = pairs.policy_chosen.total.requires_grad_()
    losses = EXOLoss(0.3, epsilon)(pairs)
    losses.sum().backward()
    assert losses[0].item() == pytest.approx(0, abs=1e-9)
    assert total.grad[0].item() == pytest.approx(0, abs=1e-9)
    assert (losses[1:] > 1e-6).all()
    assert (CDPOLoss(0.3, epsilon)(pairs)[1:] > CDPOLoss(0.3, epsilon)(pairs)[0]).all()


def test_far_on_either_side_it_is_the_surprise_at_the_label_and_flat():
    pairs = tiny.at_margin(-1e4, 1e4)
    total = pairs.policy_chosen.total.requires_grad_()
    losses = EXOLoss(0.3, 0.1)(pairs)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([-math.log(0.1), -math.log(0.9)])
    assert total.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("epsilon", [-0.1, 0.0, 0.5, 0.7, math.nan])
def test_a_bad_smoothing_is_refused_by_name(epsilon):
    with pytest.raises(ValueError, match="`label_smoothing`"):
        EXOLoss(label_smoothing=epsilon)
