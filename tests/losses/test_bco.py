"""BCO on pairs (arXiv 2404.04656, section 4)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import BCOLoss

# Log-ratios 2, −1 and −3, −5: rewards 0.2, −0.1 and −0.3, −0.5 at β = 0.1.
PAIRS = tiny.logps([-3.0, -6.0], [-9.0, -7.0], [-5.0, -5.0], [-6.0, -2.0])


def _bce(reward, label):
    return math.log1p(math.exp(-reward if label else reward))


def test_value_by_hand_without_a_baseline():
    expected = [_bce(0.2, True) + _bce(-0.3, False), _bce(-0.1, True) + _bce(-0.5, False)]
    assert BCOLoss(0.1, "zero")(PAIRS).tolist() == pytest.approx(expected)


def test_the_running_baseline_is_the_mean_of_all_rewards_seen():
    """A first batch of one pair with rewards 0.3 and 0.1; then ours: δ = (0.2 − 0.05 − 0.3) / 3 = −0.05."""
    loss, first = BCOLoss(0.1), tiny.logps([-2.0], [-3.0], [-5.0], [-4.0])
    state = loss.next_state(loss.initial_state(), loss.sums(first))
    assert state.tolist() == pytest.approx([0.2, 1])
    state = loss.next_state(state, loss.sums(PAIRS))
    assert state.tolist() == pytest.approx([0.2 - 0.05 - 0.3, 3])
    expected = [_bce(0.25, True) + _bce(-0.25, False), _bce(-0.05, True) + _bce(-0.45, False)]
    assert loss(PAIRS._replace(state=state)).tolist() == pytest.approx(expected)


def test_slopes_by_hand():
    """−β·σ(−(r_w − δ)) in the chosen and β·σ(r_l − δ) in the rejected log-prob; δ has none."""
    pairs = PAIRS._replace(state=torch.tensor([0.5, 5.0], dtype=torch.float64))
    sides = [pairs.policy_chosen.total.clone().requires_grad_(), pairs.policy_rejected.total.clone().requires_grad_()]
    pairs = pairs._replace(
        policy_chosen=pairs.policy_chosen._replace(total=sides[0]),
        policy_rejected=pairs.policy_rejected._replace(total=sides[1]),
    )
    up, down = torch.autograd.grad(BCOLoss(0.1)(pairs).sum(), sides)
    assert up.tolist() == pytest.approx([-0.1 / (1 + math.exp(reward - 0.1)) for reward in (0.2, -0.1)])
    assert down.tolist() == pytest.approx([0.1 / (1 + math.exp(-(reward - 0.1))) for reward in (-0.3, -0.5)])


def test_a_drift_of_all_rewards_does_not_matter_once_the_baseline_has_followed():
    loss, drifted = BCOLoss(0.1), PAIRS._replace(
        policy_chosen=PAIRS.policy_chosen._replace(total=PAIRS.policy_chosen.total + 40),
        policy_rejected=PAIRS.policy_rejected._replace(total=PAIRS.policy_rejected.total + 40),
    )  # fmt: skip
    here, there = (
        one._replace(state=loss.next_state(loss.initial_state(), loss.sums(one))) for one in (PAIRS, drifted)
    )
    torch.testing.assert_close(loss(here), loss(there))


def test_before_the_first_batch_the_baseline_is_zero():
    loss = BCOLoss(0.1)
    assert torch.equal(loss(PAIRS._replace(state=loss.initial_state())), BCOLoss(0.1, "zero")(PAIRS))


def test_a_bad_baseline_is_refused_by_name():
    with pytest.raises(ValueError, match="`baseline`"):
        BCOLoss(baseline="mean")
