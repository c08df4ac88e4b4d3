"""Humanline clipping (arXiv 2509.24207)."""

from __future__ import annotations

import math

import pytest
import torch

from lit_dpo.logps import PairLogps, SequenceLogps
from lit_dpo.losses import BCOLoss, DPOLoss, HumanlineLoss, LDDPOLoss, MixtureLoss, SFTLoss, SimPOLoss, WPOLoss


def _side(*sequences: list[float]) -> SequenceLogps:
    tokens = torch.tensor([logp for one in sequences for logp in one], dtype=torch.float64)
    lengths = torch.tensor([len(one) for one in sequences], dtype=torch.float64)
    side = SequenceLogps(lengths, lengths, tokens, tokens + 0.5)
    return side._replace(total=side.sums(tokens))


# Lengths 3 and 1, 1 and 2. Log-ratios of the chosen: 5, 0, −2 and 1; of the rejected: −6 and 0.5, −0.5.
PAIRS = PairLogps(
    _side([-1.0, -1.0, -3.0], [-1.0]),
    _side([-9.0], [-1.0, -2.0]),
    _side([-6.0, -1.0, -1.0], [-2.0]),
    _side([-3.0], [-1.5, -1.5]),
)
RAW = [3 - -6, 1 - 0]
HELD = [(1.5 + 0 - 1) - -1, 1 - 0]


def test_value_by_hand_is_dpos_at_the_clamped_margin():
    assert DPOLoss(0.1)(PAIRS).tolist() == pytest.approx([math.log1p(math.exp(-0.1 * one)) for one in RAW])
    assert HumanlineLoss(DPOLoss(0.1))(PAIRS).tolist() == pytest.approx([math.log1p(math.exp(-0.1 * m)) for m in HELD])


def test_tokens_beyond_a_bound_have_no_gradient():
    tokens = PAIRS.policy_chosen.per_token.clone().requires_grad_()
    chosen = PAIRS.policy_chosen._replace(per_token=tokens, total=PAIRS.policy_chosen.sums(tokens))
    HumanlineLoss(DPOLoss(0.1))(PAIRS._replace(policy_chosen=chosen)).sum().backward()
    inside = [-0.1 / (1 + math.exp(0.1 * margin)) for margin in HELD]
    assert tokens.grad.tolist() == pytest.approx([0, inside[0], 0, inside[1]])


def test_with_wide_bounds_it_is_the_inner_loss():
    for inner in (DPOLoss(0.2), LDDPOLoss(), MixtureLoss(), WPOLoss()):
        wide = HumanlineLoss(inner, lower=-100.0, upper=100.0)
        torch.testing.assert_close(wide(PAIRS), inner(PAIRS))


def test_at_the_reference_the_margin_is_exactly_0_whatever_its_total_rounded_to():
    side = lambda total: SequenceLogps(torch.tensor([total]), torch.tensor([3.0]), torch.tensor([-0.1, -0.2, -0.3]))  # noqa: E731
    pairs = PairLogps(side(-0.6), side(-0.6000001), side(-0.6), side(-0.6000001))
    assert torch.equal(HumanlineLoss()(pairs), DPOLoss()(pairs))


def test_what_is_within_sees_clamped_tokens_too():
    """LD-DPO's surplus tokens are clamped first: chosen 1.5 + ½·(0 − 1) over a shared length of 1, rejected −1."""
    losses = HumanlineLoss(LDDPOLoss(DPOLoss(0.1), surplus_weight=0.5))(PAIRS)
    assert losses[0].item() == pytest.approx(math.log1p(math.exp(-0.1 * (1.5 - 0.5 + 1))))


def test_the_inner_losss_memory_is_of_what_it_sees():
    """β = 1: clamped log-ratios are 0.5 and 1 of the chosen, −1 and 0 of the rejected completions."""
    loss = HumanlineLoss(BCOLoss(1.0))
    state = loss.next_state(loss.initial_state(), loss.sums(PAIRS))
    assert state.tolist() == pytest.approx([(0.5 + 1 - 1 + 0) / 2, 2])


def test_rewards_are_of_the_log_ratios_as_they_are():
    chosen, rejected = HumanlineLoss(DPOLoss(0.1)).rewards(PAIRS)
    assert (chosen - rejected).tolist() == pytest.approx([0.1 * margin for margin in RAW])


def test_a_loss_without_a_reference_is_refused():
    for inner in (SimPOLoss(), MixtureLoss([SimPOLoss(), SFTLoss()])):
        with pytest.raises(ValueError, match="`loss` to read the reference"):
            HumanlineLoss(inner)


def test_within_lddpo_which_sums_tokens_again_it_is_refused():
    for inner in (HumanlineLoss(), WPOLoss(HumanlineLoss()), MixtureLoss([SFTLoss(), HumanlineLoss()])):
        with pytest.raises(ValueError, match="Expected `HumanlineLoss` around `LDDPOLoss`, not within"):
            LDDPOLoss(inner)


def test_bad_bounds_are_refused_by_name():
    for name, values in {"lower": [0.0, 0.5, math.nan], "upper": [0.0, -0.5, math.inf]}.items():
        for value in values:
            with pytest.raises(ValueError, match=f"`{name}`"):
                HumanlineLoss(**{name: value})
