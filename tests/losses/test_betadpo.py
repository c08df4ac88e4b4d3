"""β-DPO (arXiv 2407.08639)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import BetaDPOLoss, DPOLoss

PAIRS = tiny.at_margin(5.0, -1.0)


def _memory(loss, *batches):
    state = loss.initial_state()
    for batch in batches:
        state = loss.next_state(state, loss.sums(batch))
    return state


def test_value_by_hand():
    """M = 2 and M₀ = 0.5·0 + 0.5·2 = 1, so β_b = 0.1·(1 + 0.6·1) = 0.16."""
    loss = BetaDPOLoss(0.1, adaptivity=0.6, momentum=0.5)
    state = _memory(loss, PAIRS)
    assert state.tolist() == pytest.approx([1.0, 2.0])
    expected = [math.log1p(math.exp(-0.8)), math.log1p(math.exp(0.16))]
    assert loss(PAIRS._replace(state=state)).tolist() == pytest.approx(expected)


def test_the_running_mean_over_batches():
    """M₀ after margins of mean 2 and then −4: 0.9·(0.1·2) + 0.1·(−4)."""
    state = _memory(BetaDPOLoss(), PAIRS, tiny.at_margin(-4.0))
    assert state.tolist() == pytest.approx([0.18 - 0.4, -4.0])


def test_slope_by_hand():
    """−β_b·σ(−β_b·Δ): β_b has no gradient."""
    loss, pairs = BetaDPOLoss(0.1, adaptivity=0.6, momentum=0.5), tiny.at_margin(5.0, -1.0)
    total = pairs.policy_chosen.total.requires_grad_()
    loss(pairs._replace(state=_memory(loss, pairs))).sum().backward()
    assert total.grad.tolist() == pytest.approx([-0.16 / (1 + math.exp(0.8)), -0.16 / (1 + math.exp(-0.16))])


def test_clear_batches_raise_beta_and_close_ones_lower_it_to_a_thousandth_at_least():
    loss = BetaDPOLoss(0.1, adaptivity=0.6)
    at = tiny.at_margin(1.0)
    clear, close = (at._replace(state=torch.tensor(state, dtype=torch.float64)) for state in ([1.0, 3.0], [9.0, 1.0]))
    assert torch.equal(loss(clear), DPOLoss(0.1 * (1 + 0.6 * 2))(at))
    assert torch.equal(loss(close), DPOLoss(1e-3)(at))


def test_before_the_first_batch_it_is_dpo():
    assert torch.equal(BetaDPOLoss(0.2)(PAIRS._replace(state=BetaDPOLoss().initial_state())), DPOLoss(0.2)(PAIRS))


def test_bad_arguments_are_refused_by_name():
    for adaptivity in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="`adaptivity`"):
            BetaDPOLoss(adaptivity=adaptivity)
    for momentum in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="`momentum`"):
            BetaDPOLoss(momentum=momentum)
