"""Reward-aware preference optimization (arXiv 2406.11704 and 2502.00203)."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

import tiny
from lit_dpo.losses import RPOLoss, SoftDPOLoss

DISTANCES = ("bwd_kl", "fwd_kl", "sq")


def _pairs(margins, scores):
    return tiny.at_margin(*margins)._replace(columns={"score_margin": torch.tensor(scores, dtype=torch.float64)})


def _independent(distance, margin, target):
    if distance == "sq":
        return (margin - target) ** 2
    policy, data = (Bernoulli(logits=one) for one in (margin, target))
    return kl_divergence(data, policy) if distance == "bwd_kl" else kl_divergence(policy, data)


@pytest.mark.parametrize("distance", DISTANCES)
def test_values_are_the_distances_between_distributions(distance):
    margins, scores = [5.0, -3.0, 20.0], [2.0, 0.5, -1.0]
    losses = RPOLoss(0.2, reward_scale=0.5, distance=distance)(_pairs(margins, scores))
    expected = _independent(distance, *(torch.tensor(one).double() for one in ([1.0, -0.6, 4.0], [1.0, 0.25, -0.5])))
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-12)


def test_values_by_hand():
    """β·Δ = log 3, so σ is 3/4; η·s = 0, so it is 1/2."""
    pairs = _pairs([10 * math.log(3)], [0.0])
    both = [RPOLoss(0.1, distance=one)(pairs).item() for one in DISTANCES]
    backward = math.log(1 / 2 / (3 / 4)) / 2 + math.log(1 / 2 / (1 / 4)) / 2
    forward = 3 / 4 * math.log(3 / 4 / (1 / 2)) + 1 / 4 * math.log(1 / 4 / (1 / 2))
    assert both == pytest.approx([backward, forward, math.log(3) ** 2])


@pytest.mark.parametrize("distance", DISTANCES)
def test_it_is_0_with_slope_0_where_the_margin_is_the_scores_and_falls_towards_it(distance):
    pairs = _pairs([1.0, 4.0, 9.0], [2.0, 2.0, 2.0])
    total = pairs.policy_chosen.total.requires_grad_()
    losses = RPOLoss(0.1, reward_scale=0.2, distance=distance)(pairs)
    losses.sum().backward()
    assert losses[1].item() == pytest.approx(0, abs=1e-12)
    assert total.grad[1].item() == pytest.approx(0, abs=1e-10)
    assert total.grad[0] < 0 < total.grad[2]


def test_backward_pulls_as_soft_labels_of_the_scores_do():
    pairs = _pairs([3.0, -4.0], [1.5, 0.4])
    probability = torch.sigmoid(pairs.columns["score_margin"])

    def slopes(loss):
        given = pairs.detach()._replace(columns={**pairs.columns, "probability": probability})
        total = given.policy_chosen.total.requires_grad_()
        return torch.autograd.grad(loss(given).sum(), total)[0]

    torch.testing.assert_close(slopes(RPOLoss(0.1)), slopes(SoftDPOLoss(0.1)))


def test_extreme_scores_leave_it_finite():
    for distance in DISTANCES:
        pairs = _pairs([-1e4, 0.0, 1e4] * 2, [1e4] * 3 + [-1e4] * 3)
        total = pairs.policy_chosen.total.requires_grad_()
        losses = RPOLoss(0.5, distance=distance)(pairs)
        losses.sum().backward()
        assert losses.isfinite().all()
        assert total.grad.isfinite().all()


def test_bad_arguments_are_refused_by_name():
    for reward_scale in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="`reward_scale`"):
            RPOLoss(reward_scale=reward_scale)
    with pytest.raises(ValueError, match="`distance`"):
        RPOLoss(distance="sqloo")
