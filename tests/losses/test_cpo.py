"""CPO (arXiv 2401.08417, eq. 3)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.logps import Field
from lit_dpo.losses import CPOLoss, DPOLoss

PAIRS = tiny.logps([-3.0, -20.0], [-5.0, -8.0], lengths=([4, 10], [2, 5]))


def test_value_by_hand():
    """Margins 2 and −12, negative log-likelihoods 0.75 and 2 per token."""
    expected = [math.log1p(math.exp(-0.2)) + 0.5 * 0.75, math.log1p(math.exp(1.2)) + 0.5 * 2.0]
    assert CPOLoss(0.1, nll_weight=0.5)(PAIRS).tolist() == pytest.approx(expected)


def test_without_the_likelihood_term_it_is_dpo_under_a_uniform_reference():
    uniform = tiny.logps([-3.0, -20.0], [-5.0, -8.0], [-4.0, -4.0], [-4.0, -4.0])
    torch.testing.assert_close(CPOLoss(0.1, nll_weight=0.0)(PAIRS), DPOLoss(0.1)(uniform))


def test_at_a_large_margin_only_the_likelihood_of_the_chosen_answer_is_left():
    pairs = tiny.logps([-3.0], [-5e4], lengths=([4], [2]))
    sides = [pairs.policy_chosen.total.requires_grad_(), pairs.policy_rejected.total.requires_grad_()]
    up, down = torch.autograd.grad(CPOLoss(0.1)(pairs).sum(), sides)
    assert (up.item(), down.item()) == (-1 / 4, 0.0)


def test_it_needs_no_reference_and_reads_none():
    assert Field.REFERENCE not in CPOLoss.requires
    other = tiny.logps([-3.0, -20.0], [-5.0, -8.0], [-1.0, -2.0], [-3.0, -9.0], lengths=([4, 10], [2, 5]))
    assert torch.equal(CPOLoss()(other), CPOLoss()(PAIRS))


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_bad_weight_is_refused_by_name(weight):
    with pytest.raises(ValueError, match="`nll_weight`"):
        CPOLoss(nll_weight=weight)
