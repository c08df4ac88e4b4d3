"""Length-normalised DPO (Tülu 3, arXiv 2411.15124)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import DPOLoss, NormalizedDPOLoss

LENGTHS = ([4, 10], [2, 5])
PAIRS = tiny.logps([-3.0, -20.0], [-5.0, -8.0], [-5.0, -30.0], [-4.0, -9.0], lengths=LENGTHS)
SIDES = dict(zip(PAIRS._fields, PAIRS[:4], strict=False))


def test_each_log_ratio_is_divided_by_its_own_length():
    """2/4 + 1/2 = 1 and 10/10 − 1/5 = 0.8."""
    expected = [math.log1p(math.exp(-2.0)), math.log1p(math.exp(-1.6))]
    assert NormalizedDPOLoss(2.0)(PAIRS).tolist() == pytest.approx(expected)


def test_with_one_token_each_it_is_dpo():
    pairs = PAIRS._replace(**{name: side._replace(length=torch.ones(2)) for name, side in SIDES.items()})
    assert torch.equal(NormalizedDPOLoss(0.3)(pairs), DPOLoss(0.3)(pairs))


def test_with_n_tokens_each_it_is_dpo_at_a_beta_n_times_smaller():
    pairs = PAIRS._replace(**{name: side._replace(length=torch.tensor(8.0)) for name, side in SIDES.items()})
    torch.testing.assert_close(NormalizedDPOLoss(0.8)(pairs), DPOLoss(0.1)(pairs))


def test_slope_is_shared_among_the_tokens():
    pairs = tiny.logps([-3.0], [-5.0], [-3.0], [-5.0], lengths=([4], [10]))
    sides = [pairs.policy_chosen.total.requires_grad_(), pairs.policy_rejected.total.requires_grad_()]
    up, down = torch.autograd.grad(NormalizedDPOLoss(2.0)(pairs).sum(), sides)
    assert (up.item(), down.item()) == (-2.0 / 8, 2.0 / 20)


def test_rewards_are_not_normalised():
    chosen, _ = NormalizedDPOLoss(2.0).rewards(PAIRS)
    assert torch.equal(chosen, torch.tensor([4.0, 20.0]).double())
