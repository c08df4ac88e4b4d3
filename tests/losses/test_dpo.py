"""DPO (arXiv 2305.18290, eq. 7)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import DPOLoss


@pytest.mark.parametrize("margin", [-30.0, -1.0, 0.0, 2.5, 30.0])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_value_is_log_one_plus_exp_of_minus_beta_margin(margin, beta):
    assert DPOLoss(beta)(tiny.at_margin(margin)).item() == pytest.approx(math.log1p(math.exp(-beta * margin)), rel=1e-9)


def test_torchtunes_three_numbers_by_hand():
    """Margins 0, 10 and 20 at β = 0.1: log 2, log(1 + e⁻¹), log(1 + e⁻²)."""
    losses = DPOLoss(beta=0.1)(tiny.at_margin(0.0, 10.0, 20.0))
    torch.testing.assert_close(losses, torch.tensor([0.693147, 0.313262, 0.126928]).double(), rtol=0, atol=1e-6)


def test_slope_is_minus_beta_times_the_probability_of_the_wrong_order():
    """eq. 7's gradient: −β·σ(−β·Δ), the weight of section 4."""
    pairs = tiny.at_margin(-7.0, 0.0, 4.0)
    total = pairs.policy_chosen.total.requires_grad_()
    DPOLoss(beta=0.2)(pairs).sum().backward()
    torch.testing.assert_close(total.grad, -0.2 * torch.sigmoid(-0.2 * torch.tensor([-7.0, 0.0, 4.0]).double()))


def test_it_falls_with_the_margin():
    assert (DPOLoss()(tiny.at_margin(-10.0, -1.0, 0.0, 1.0, 10.0)).diff() < 0).all()


def test_it_is_linear_far_on_the_wrong_side_and_zero_far_on_the_right_one():
    assert DPOLoss(beta=0.1)(tiny.at_margin(-1e4, 1e4)).tolist() == pytest.approx([1000.0, 0.0])


def test_lengths_do_not_matter():
    short, long = (tiny.logps([-3.0], [-5.0], [-4.0], [-4.5], lengths=([n], [2 * n])) for n in (1, 50))
    assert torch.equal(DPOLoss()(short), DPOLoss()(long))
