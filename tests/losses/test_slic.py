"""SLiC (arXiv 2305.10425, section 2)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import HingeLoss, SLiCLoss

PAIRS = tiny.logps([-3.0, -20.0], [-5.0, -8.0], lengths=([4, 10], [2, 5]))


def test_value_by_hand():
    """Contrasts 2 and −12, means −0.75 and −2."""
    assert SLiCLoss(0.1, nll_weight=0.5)(PAIRS).tolist() == pytest.approx([0.8 + 0.375, 2.2 + 1.0])


def test_slopes_by_hand_within_the_margin_and_beyond():
    pairs = tiny.logps([-3.0, -3.0], [-5.0, -30.0], lengths=([4, 4], [2, 2]))
    sides = [pairs.policy_chosen.total.requires_grad_(), pairs.policy_rejected.total.requires_grad_()]
    up, down = torch.autograd.grad(SLiCLoss(0.1, 0.5)(pairs).sum(), sides)
    assert up.tolist() == pytest.approx([-0.1 - 0.5 / 4, -0.5 / 4])
    assert down.tolist() == pytest.approx([0.1, 0.0])


@pytest.mark.parametrize("delta", [0.5, 20.0])
def test_the_papers_likelihood_of_the_whole_answer_is_one_per_token_times_its_length(delta):
    """Of answers of 4 and 10 tokens, each with its own λ = λ′·n_w/δ; no single λ does for both."""
    weight, chosen = 0.3, PAIRS.policy_chosen
    papers = torch.relu(delta - chosen.total + PAIRS.policy_rejected.total) - weight * chosen.total
    converted = [SLiCLoss(1 / delta, weight * length / delta)(PAIRS) for length in chosen.length.tolist()]
    torch.testing.assert_close(torch.stack(converted).diagonal(), papers / delta)
    assert all(not torch.allclose(one, papers / delta) for one in converted)


@pytest.mark.parametrize("delta", [0.5, 1.0, 20.0])
def test_a_margin_in_nats_is_this_loss_times_that_margin(delta):
    weight = 0.3
    contrast = PAIRS.policy_chosen.total - PAIRS.policy_rejected.total
    papers = torch.relu(delta - contrast) - weight * PAIRS.policy_chosen.mean
    torch.testing.assert_close(SLiCLoss(1 / delta, weight / delta)(PAIRS), papers / delta)


def test_without_likelihood_and_under_a_uniform_reference_it_is_the_hinge():
    pairs = tiny.logps([-3.0, -20.0], [-5.0, -8.0], [-7.0, -7.0], [-7.0, -7.0])
    torch.testing.assert_close(SLiCLoss(0.1, 0.0)(pairs), HingeLoss(0.1)(pairs))


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_bad_weight_is_refused_by_name(weight):
    with pytest.raises(ValueError, match="`nll_weight`"):
        SLiCLoss(nll_weight=weight)
