"""IPO (arXiv 2310.12036, eq. 17), per token and per sequence."""

from __future__ import annotations

import pytest
import torch

import tiny
from lit_dpo.losses import IPOLoss

LENGTHS = ([4, 10], [2, 5])
PAIRS = tiny.logps([-3.0, -20.0], [-5.0, -8.0], [-5.0, -30.0], [-4.0, -9.0], lengths=LENGTHS)
SIDES = dict(zip(PAIRS._fields, PAIRS[:4], strict=False))


def test_sum_regresses_the_margin_onto_one_over_two_beta():
    """Log-ratios 2, 10 and −1, 1: margins 3 and 9, target 5."""
    torch.testing.assert_close(IPOLoss(0.1, "sum")(PAIRS), torch.tensor([4.0, 16.0]).double())


def test_mean_divides_each_log_ratio_by_its_own_length():
    """2/4 + 1/2 = 1 and 10/10 − 1/5 = 0.8 against 5."""
    torch.testing.assert_close(IPOLoss(0.1, "mean")(PAIRS), torch.tensor([16.0, 4.2**2]).double())


def test_mean_is_the_default():
    assert torch.equal(IPOLoss(0.1)(PAIRS), IPOLoss(0.1, "mean")(PAIRS))


def test_with_one_token_each_mean_is_sum():
    pairs = PAIRS._replace(**{name: side._replace(length=torch.ones(2)) for name, side in SIDES.items()})
    assert torch.equal(IPOLoss(0.2, "mean")(pairs), IPOLoss(0.2, "sum")(pairs))


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_minimum_is_0_at_the_target_and_beyond_it_pulls_back(beta):
    pairs = tiny.at_margin(1 / (2 * beta) - 1, 1 / (2 * beta), 1 / (2 * beta) + 1)
    total = pairs.policy_chosen.total.requires_grad_()
    losses = IPOLoss(beta, "sum")(pairs)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.tensor([1.0, 0.0, 1.0]).double())
    torch.testing.assert_close(total.grad, torch.tensor([-2.0, 0.0, 2.0]).double())


def test_repeating_both_completions_leaves_mean_and_doubles_the_margin_of_sum():
    """Twice the tokens with the same log-probs: the scale of the answer leaves `mean` alone."""
    twice = PAIRS._replace(
        **{
            name: side._replace(total=2 * side.total, length=2 * side.length)
            for name, side in PAIRS._asdict().items()
            if side
        }
    )
    torch.testing.assert_close(IPOLoss(0.1, "mean")(twice), IPOLoss(0.1, "mean")(PAIRS))
    torch.testing.assert_close(IPOLoss(0.1, "sum")(twice), (2 * PAIRS.margin - 5) ** 2)


@pytest.mark.parametrize("average", ["token", "", None, "Mean"])
def test_a_bad_average_is_refused_by_name(average):
    with pytest.raises(ValueError, match="`average`"):
        IPOLoss(average=average)
