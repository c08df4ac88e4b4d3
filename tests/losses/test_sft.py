"""Negative log-likelihood of the chosen answer."""

from __future__ import annotations

import pytest
import torch

import tiny
from lit_dpo.losses import SFTLoss

PAIRS = tiny.logps([-3.0, -20.0], [-5.0, -8.0], lengths=([4, 16], [2, 5]))


def test_values_by_hand():
    """3/4 and 20/16; over the batch of 20 tokens 2·3/20 and 2·20/20, whose mean is 23/20."""
    assert SFTLoss()(PAIRS).tolist() == pytest.approx([0.75, 1.25])
    losses = SFTLoss(average_over="token")(PAIRS)
    assert losses.tolist() == pytest.approx([0.3, 2.0])
    assert losses.mean().item() == pytest.approx(23 / 20)


@pytest.mark.parametrize(("average_over", "slopes"), [("sequence", [-1 / 4, -1 / 16]), ("token", [-1 / 10, -1 / 10])])
def test_slopes_by_hand(average_over, slopes):
    pairs = tiny.logps([-3.0, -20.0], [-5.0, -8.0], lengths=([4, 16], [2, 5]))
    sides = [pairs.policy_chosen.total.requires_grad_(), pairs.policy_rejected.total.requires_grad_()]
    up, down = torch.autograd.grad(SFTLoss(average_over=average_over)(pairs).sum(), sides, materialize_grads=True)
    assert up.tolist() == pytest.approx(slopes)
    assert down.tolist() == [0, 0]


def test_it_has_no_beta_and_prints_none():
    assert repr(SFTLoss()) == "SFTLoss(average_over='sequence')"
    assert (SFTLoss().couples_pairs, SFTLoss("token").couples_pairs) == (False, True)


def test_a_bad_average_is_refused_by_name():
    with pytest.raises(ValueError, match="`average_over`"):
        SFTLoss(average_over="mean")
