"""Hinge loss (arXiv 2305.10425, 2309.06657)."""

from __future__ import annotations

import torch

import tiny
from lit_dpo.losses import DPOLoss, HingeLoss


def test_value_is_what_is_missing_to_a_reward_margin_of_one():
    losses = HingeLoss(0.5)(tiny.at_margin(-4.0, 0.0, 1.0, 2.0, 30.0))
    torch.testing.assert_close(losses, torch.tensor([3.0, 1.0, 0.5, 0.0, 0.0]).double())


def test_slope_is_minus_beta_until_there_and_then_zero():
    pairs = tiny.at_margin(-1e4, 0.0, 1.9, 2.1, 1e4)
    total = pairs.policy_chosen.total.requires_grad_()
    HingeLoss(0.5)(pairs).sum().backward()
    assert total.grad.tolist() == [-0.5, -0.5, -0.5, 0.0, 0.0]


def test_it_is_dpos_asymptote_on_the_wrong_side():
    """−log σ(z) → −z and 1 − z: a constant apart."""
    pairs = tiny.at_margin(-1e3, -1e4)
    torch.testing.assert_close(HingeLoss(0.1)(pairs) - DPOLoss(0.1)(pairs), torch.ones(2).double())
