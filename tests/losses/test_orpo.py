"""ORPO (arXiv 2403.07691)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import ORPOLoss

# Geometric means of the probabilities: 1/2 and 1/4, and 0.9 and 0.2.
PAIRS = tiny.logps(
    [4 * math.log(1 / 2), 10 * math.log(0.9)], [2 * math.log(1 / 4), 5 * math.log(0.2)], lengths=([4, 10], [2, 5])
)


def test_value_by_hand():
    """Odds 1 and 1/3, whose ratio is 3: log 2 + β·log(4/3). Odds 9 and 1/4, ratio 36: −log 0.9 + β·log(37/36)."""
    expected = [math.log(2) + 0.2 * math.log(4 / 3), -math.log(0.9) + 0.2 * math.log(37 / 36)]
    assert ORPOLoss(0.2)(PAIRS).tolist() == pytest.approx(expected)


def test_slopes_by_hand():
    """With ratio 3 and p = 1/2, 1/4: −(1 + β/4·2)/4 in the chosen, β/4·(4/3)/2 in the rejected log-prob."""
    pairs = tiny.logps([4 * math.log(1 / 2)], [2 * math.log(1 / 4)], lengths=([4], [2]))
    sides = [pairs.policy_chosen.total.requires_grad_(), pairs.policy_rejected.total.requires_grad_()]
    up, down = torch.autograd.grad(ORPOLoss(0.2)(pairs).sum(), sides)
    assert up.item() == pytest.approx(-(1 + 0.2 / 4 * 2) / 4)
    assert down.item() == pytest.approx(0.2 / 4 * (4 / 3) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logp", [-1e-5, -math.log(2), -3.0, -30.0, -300.0])
def test_log_odds_are_exact_near_both_ends(logp, dtype):
    """Against the same odds in exact arithmetic: p/(1 − p) = 1/(e^{−log p} − 1)."""
    pairs = tiny.logps([logp], [-math.log(2)], dtype=dtype)
    logp = pairs.policy_chosen.total.item()
    odds = -math.log(math.expm1(-logp))
    found = ORPOLoss(1.0)(pairs).item() + logp
    assert found == pytest.approx(math.log1p(math.exp(-odds)), rel=3 * torch.finfo(dtype).eps ** 0.75)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_answers_leave_it_finite(dtype):
    pairs = tiny.logps([0.0, 0.0, -1.0], [0.0, -1.0, 0.0], dtype=dtype)
    sides = [pairs.policy_chosen.total.requires_grad_(), pairs.policy_rejected.total.requires_grad_()]
    losses = ORPOLoss(0.1)(pairs)
    gradients = torch.autograd.grad(losses.sum(), sides)
    assert losses.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_it_reads_no_reference():
    other = tiny.logps([-3.0], [-5.0], [-1.0], [-3.0])
    assert torch.equal(ORPOLoss()(other), ORPOLoss()(tiny.logps([-3.0], [-5.0])))
