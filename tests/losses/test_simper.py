"""SimPER (arXiv 2502.00883)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import SimPERLoss

LENGTHS = ([2, 4], [1, 5])


def test_value_is_the_difference_of_geometric_means_of_probabilities():
    """Two tokens of probabilities 1/2 and 1/8: their geometric mean is 1/4; one of 1/10. Then 1 and 1/2."""
    pairs = tiny.logps([math.log(1 / 16), 0.0], [math.log(1 / 10), 5 * math.log(1 / 2)], lengths=LENGTHS)
    assert SimPERLoss()(pairs).tolist() == pytest.approx([0.1 - 0.25, 0.5 - 1])


def test_slopes_by_hand():
    """−(1/4)/2 and (1/10)/1; −1/4 and (1/2)/5."""
    pairs = tiny.logps([math.log(1 / 16), 0.0], [math.log(1 / 10), 5 * math.log(1 / 2)], lengths=LENGTHS)
    sides = [pairs.policy_chosen.total.requires_grad_(), pairs.policy_rejected.total.requires_grad_()]
    up, down = torch.autograd.grad(SimPERLoss()(pairs).sum(), sides)
    assert up.tolist() == pytest.approx([-0.125, -0.25])
    assert down.tolist() == pytest.approx([0.1, 0.1])


def test_it_is_bounded_and_an_unlikely_completion_hardly_moves_it():
    pairs = tiny.logps([0.0, -1e4], [-1e4, 0.0], lengths=([1, 1], [1, 1]))
    assert SimPERLoss()(pairs).tolist() == [-1.0, 1.0]


def test_it_has_no_arguments_and_prints_none():
    assert repr(SimPERLoss()) == "SimPERLoss()"
