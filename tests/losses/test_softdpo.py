"""DPO with soft labels."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import CDPOLoss, DPOLoss, SoftDPOLoss


def _pairs(*probabilities: float, margin: float = 5.0):
    return tiny.at_margin(*[margin] * len(probabilities))._replace(columns={"probability": torch.tensor(probabilities)})


def test_value_and_slope_by_hand():
    """z = 0.5: p·log(1 + e^{−z}) + (1 − p)·log(1 + e^z), slope −β·(p − σ(z)); p = 0.75 and 0.25."""
    pairs = _pairs(0.75, 0.25)
    total = pairs.policy_chosen.total.requires_grad_()
    losses = SoftDPOLoss(0.1)(pairs)
    losses.sum().backward()
    right, wrong = math.log1p(math.exp(-0.5)), math.log1p(math.exp(0.5))
    assert losses.tolist() == pytest.approx([0.75 * right + 0.25 * wrong, 0.25 * right + 0.75 * wrong])
    assert total.grad.tolist() == pytest.approx([-0.1 * (p - 1 / (1 + math.exp(-0.5))) for p in (0.75, 0.25)])


def test_certain_labels_are_dpo_and_reversed_ones_dpo_the_other_way_round():
    expected = [DPOLoss(0.1)(tiny.at_margin(margin)).item() for margin in (5.0, -5.0)]
    assert SoftDPOLoss(0.1)(_pairs(1.0, 0.0)).tolist() == pytest.approx(expected)


def test_one_probability_for_all_is_cdpo():
    columns = {"probability": torch.full((3,), 0.9, dtype=torch.float64)}
    pairs = tiny.at_margin(-7.0, 0.0, 30.0)._replace(columns=columns)
    torch.testing.assert_close(SoftDPOLoss(0.2)(pairs), CDPOLoss(0.2, 0.1)(pairs))


def test_equals_are_pulled_together():
    pairs = _pairs(0.5)
    total = pairs.policy_chosen.total.requires_grad_()
    SoftDPOLoss(0.1)(pairs).sum().backward()
    assert total.grad.item() > 0
