"""SimPO (arXiv 2405.14734, eq. 6)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.logps import Field
from lit_dpo.losses import CPOLoss, SimPOLoss

PAIRS = tiny.logps([-3.0, -20.0], [-5.0, -8.0], lengths=([4, 10], [2, 5]))


def test_value_by_hand():
    """Means −0.75, −2.5 and −2, −1.6: z = 2·1.75 − 1 and −2·0.4 − 1."""
    expected = [math.log1p(math.exp(-2.5)), math.log1p(math.exp(1.8))]
    assert SimPOLoss(2.0, gamma=1.0)(PAIRS).tolist() == pytest.approx(expected)


def test_gamma_is_beta_times_the_ratio_that_the_authors_code_takes():
    ratio, beta = 0.3, 2.5
    z = beta * (PAIRS.policy_chosen.mean - PAIRS.policy_rejected.mean - ratio)
    torch.testing.assert_close(SimPOLoss(beta, gamma=beta * ratio)(PAIRS), torch.log1p(torch.exp(-z)))


def test_without_gamma_and_length_it_is_cpo_without_its_likelihood_term():
    pairs = tiny.logps([-3.0, -20.0], [-5.0, -8.0])
    torch.testing.assert_close(SimPOLoss(0.1, gamma=0.0)(pairs), CPOLoss(0.1, nll_weight=0.0)(pairs))


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_smoothing_mixes_both_labels(epsilon):
    z = 2.0 * (PAIRS.policy_chosen.mean - PAIRS.policy_rejected.mean) - 0.5
    expected = (1 - epsilon) * torch.log1p(torch.exp(-z)) + epsilon * torch.log1p(torch.exp(z))
    torch.testing.assert_close(SimPOLoss(2.0, 0.5, epsilon)(PAIRS), expected)


def test_repeating_an_answer_changes_nothing():
    twice = PAIRS._replace(
        policy_chosen=PAIRS.policy_chosen._replace(
            total=2 * PAIRS.policy_chosen.total, length=2 * PAIRS.policy_chosen.length
        )
    )
    torch.testing.assert_close(SimPOLoss()(twice), SimPOLoss()(PAIRS))


def test_it_needs_no_reference_and_reads_none():
    assert Field.REFERENCE not in SimPOLoss.requires
    other = tiny.logps([-3.0, -20.0], [-5.0, -8.0], [-1.0, -2.0], [-3.0, -9.0], lengths=([4, 10], [2, 5]))
    assert torch.equal(SimPOLoss()(other), SimPOLoss()(PAIRS))


@pytest.mark.parametrize("gamma", [-0.1, math.nan, math.inf])
def test_a_bad_gamma_is_refused_by_name(gamma):
    with pytest.raises(ValueError, match="`gamma`"):
        SimPOLoss(gamma=gamma)


@pytest.mark.parametrize("epsilon", [-0.1, 0.5, 0.7, math.nan])
def test_a_bad_smoothing_is_refused_by_name(epsilon):
    with pytest.raises(ValueError, match="`label_smoothing`"):
        SimPOLoss(label_smoothing=epsilon)


def test_hinge_by_hand():
    """z = 2·1.75 − 1 and −2·0.4 − 1, as above: beyond the margin 1, and 2.8 short of it, with slope −β/n_w."""
    pairs = tiny.logps([-3.0, -20.0], [-5.0, -8.0], lengths=([4, 10], [2, 5]))
    total = pairs.policy_chosen.total.requires_grad_()
    losses = SimPOLoss(2.0, gamma=1.0, link="hinge")(pairs)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0.0, 2.8])
    assert total.grad.tolist() == pytest.approx([0.0, -0.2])


def test_a_bad_link_is_refused_by_name():
    with pytest.raises(ValueError, match="`link`"):
        SimPOLoss(link="square")


def test_smoothing_has_no_place_in_a_hinge():
    with pytest.raises(ValueError, match="`label_smoothing` 0"):
        SimPOLoss(label_smoothing=0.1, link="hinge")
