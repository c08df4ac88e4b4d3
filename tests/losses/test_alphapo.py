"""AlphaPO (arXiv 2501.03884)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.logps import Field
from lit_dpo.losses import AlphaPOLoss, SimPOLoss

PAIRS = tiny.logps([-3.0, -20.0], [-5.0, -8.0], lengths=([4, 10], [2, 5]))


@pytest.mark.parametrize("alpha", [-0.5, 0.1, 0.25, 1.0])
def test_value_by_the_power_of_the_mean_probability(alpha):
    sides = (PAIRS.policy_chosen, PAIRS.policy_rejected)
    chosen, rejected = ((1 - torch.exp(side.mean) ** -alpha) / alpha for side in sides)
    expected = torch.log1p(torch.exp(-(2.0 * (chosen - rejected) - 0.3)))
    torch.testing.assert_close(AlphaPOLoss(2.0, 0.3, alpha)(PAIRS), expected)


@pytest.mark.parametrize("alpha", [-1e-9, 1e-9])
def test_with_a_small_alpha_it_is_simpo(alpha):
    torch.testing.assert_close(AlphaPOLoss(2.0, 0.3, alpha)(PAIRS), SimPOLoss(2.0, 0.3)(PAIRS))


@pytest.mark.parametrize(("alpha", "sign"), [(0.25, 1), (-0.25, -1)])
def test_a_positive_alpha_pulls_unlikely_answers_harder(alpha, sign):
    """Slope −β·σ(−z)·p^(−α)/n, divided by SimPO's at the same z."""
    pairs = tiny.logps([-0.5, -4.0], [-0.5, -4.0])
    total = pairs.policy_chosen.total.requires_grad_()
    AlphaPOLoss(2.0, 0.3, alpha)(pairs).sum().backward()
    ratio = total.grad / (-2.0 * torch.sigmoid(torch.tensor(0.3).double()))
    torch.testing.assert_close(ratio, torch.exp(alpha * torch.tensor([0.5, 4.0]).double()))
    assert sign * ratio.diff().item() > 0


def test_it_is_exact_as_far_as_float32_holds_it_and_finite_beyond():
    pairs = tiny.logps([-70.0, -90.0, -1e4], [0.0] * 3, dtype=torch.float32)
    total = pairs.policy_chosen.total.requires_grad_()
    losses = AlphaPOLoss(1.0, 0.0, 1.0)(pairs)
    losses.sum().backward()
    assert losses[0].item() == pytest.approx(math.exp(70), rel=1e-4)
    assert losses.isfinite().all()
    assert total.grad[0].item() == pytest.approx(-math.exp(70), rel=1e-4)
    assert total.grad[1:].tolist() == [0.0, 0.0]


def test_it_needs_no_reference_and_reads_none():
    assert Field.REFERENCE not in AlphaPOLoss.requires
    other = tiny.logps([-3.0, -20.0], [-5.0, -8.0], [-1.0, -2.0], [-3.0, -9.0], lengths=([4, 10], [2, 5]))
    assert torch.equal(AlphaPOLoss()(other), AlphaPOLoss()(PAIRS))


@pytest.mark.parametrize("alpha", [0.0, math.nan, math.inf])
def test_a_bad_alpha_is_refused_by_name(alpha):
    with pytest.raises(ValueError, match="`alpha`"):
        AlphaPOLoss(alpha=alpha)


@pytest.mark.parametrize("gamma", [-0.1, math.nan, math.inf])
def test_a_bad_gamma_is_refused_by_name(gamma):
    with pytest.raises(ValueError, match="`gamma`"):
        AlphaPOLoss(gamma=gamma)
