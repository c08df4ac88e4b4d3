"""Conservative DPO (ericmitchell.ai/cdpo.pdf, eq. 3)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import CDPOLoss, DPOLoss

PAIRS = tiny.at_margin(-40.0, -3.0, 0.0, 3.0, 40.0)


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.49])
def test_value_is_the_mixture_of_both_labels_dpo(epsilon):
    flipped = tiny.at_margin(40.0, 3.0, 0.0, -3.0, -40.0)
    expected = (1 - epsilon) * DPOLoss(0.3)(PAIRS) + epsilon * DPOLoss(0.3)(flipped)
    torch.testing.assert_close(CDPOLoss(0.3, epsilon)(PAIRS), expected)


def test_without_smoothing_it_is_dpo():
    assert torch.equal(CDPOLoss(0.3, label_smoothing=0.0)(PAIRS), DPOLoss(0.3)(PAIRS))


def test_with_less_and_less_smoothing_it_becomes_dpo():
    gaps = [float((CDPOLoss(0.3, e)(PAIRS) - DPOLoss(0.3)(PAIRS)).abs().max()) for e in (1e-2, 1e-4, 1e-6)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-4


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_minimum_is_at_the_log_odds_of_a_right_label(epsilon, beta):
    """β·Δ* = log((1−ε)/ε), and the minimum is the entropy of the label."""
    best = math.log((1 - epsilon) / epsilon) / beta
    loss = CDPOLoss(beta, epsilon)
    pairs = tiny.at_margin(best)
    total = pairs.policy_chosen.total.requires_grad_()
    value = loss(pairs)
    value.backward()
    assert total.grad.item() == pytest.approx(0, abs=1e-9)
    assert value.item() == pytest.approx(-epsilon * math.log(epsilon) - (1 - epsilon) * math.log(1 - epsilon))
    around = loss(tiny.at_margin(best - 1, best + 1))
    assert (around > value).all()


@pytest.mark.parametrize("epsilon", [-0.1, 0.5, 0.7, math.nan])
def test_a_bad_smoothing_is_refused_by_name(epsilon):
    with pytest.raises(ValueError, match="`label_smoothing`"):
        CDPOLoss(label_smoothing=epsilon)


def test_a_bad_beta_is_refused_beside_a_good_smoothing():
    with pytest.raises(ValueError, match="`beta`"):
        CDPOLoss(beta=-1, label_smoothing=0.2)
