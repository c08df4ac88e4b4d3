"""LD-DPO (arXiv 2409.06411)."""

from __future__ import annotations

import math

import pytest
import torch

from lit_dpo.logps import PairLogps, SequenceLogps
from lit_dpo.losses import (
    BCOLoss,
    DPOLoss,
    LDDPOLoss,
    LiPOLoss,
    MixtureLoss,
    PlackettLuceLoss,
    SFTLoss,
    SimPOLoss,
    WPOLoss,
)


def _side(*sequences: list[float]) -> SequenceLogps:
    tokens = torch.tensor([logp for one in sequences for logp in one], dtype=torch.float64)
    lengths = torch.tensor([len(one) for one in sequences], dtype=torch.float64)
    side = SequenceLogps(lengths, lengths, tokens)
    return side._replace(total=side.sums(tokens))


# Lengths 4 and 2, 1 and 3, 2 and 2.
PAIRS = PairLogps(
    _side([-1.0, -2.0, -3.0, -4.0], [-1.0], [-2.0, -1.0]),
    _side([-5.0, -1.0], [-2.0, -4.0, -8.0], [-3.0, -3.0]),
    _side([-1.0, -1.0, -1.0, -1.0], [-2.0], [-1.0, -1.0]),
    _side([-2.0, -2.0], [-1.0, -2.0, -2.0], [-1.0, -1.0]),
)


def _dpo(margin, beta=0.1):
    return math.log1p(math.exp(-beta * margin))


def test_values_by_hand_with_the_reference_decoupled():
    """α = 1/4. Chosen −3 − 7/4, −1, −3; rejected −6, −2 − 12/4, −6; references −2 − 2/4, −2, −2 and −4, −2, −2."""
    margins = [(-4.75 + 6) - (-2.5 + 4), (-1 + 5) - (-2 + 2), (-3 + 6) - (-2 + 2)]
    assert LDDPOLoss(DPOLoss(0.1), surplus_weight=0.25)(PAIRS).tolist() == pytest.approx(list(map(_dpo, margins)))


def test_values_by_hand_with_the_reference_plain():
    """The references are −4, −2, −2 and −4, −5, −2."""
    margins = [(-4.75 + 6) - (-4 + 4), (-1 + 5) - (-2 + 5), (-3 + 6) - (-2 + 2)]
    losses = LDDPOLoss(DPOLoss(0.1), surplus_weight=0.25, reference="plain")(PAIRS)
    assert losses.tolist() == pytest.approx(list(map(_dpo, margins)))


def test_the_slope_is_alphas_part_in_surplus_tokens_only():
    tokens = PAIRS.policy_chosen.per_token.clone().requires_grad_()
    chosen = PAIRS.policy_chosen._replace(per_token=tokens, total=PAIRS.policy_chosen.sums(tokens))
    losses = LDDPOLoss(DPOLoss(0.1), surplus_weight=0.25)(PAIRS._replace(policy_chosen=chosen))
    losses[0].backward()
    slope = -0.1 / (1 + math.exp(0.1 * ((-4.75 + 6) - (-2.5 + 4))))
    assert tokens.grad.tolist() == pytest.approx([slope, slope, slope / 4, slope / 4, 0, 0, 0])


def test_a_policy_that_is_its_reference_has_margin_0_only_if_both_are_decoupled():
    same = PAIRS._replace(reference_chosen=PAIRS.policy_chosen, reference_rejected=PAIRS.policy_rejected)
    assert LDDPOLoss(surplus_weight=0.3)(same).tolist() == pytest.approx([math.log(2)] * 3)
    assert LDDPOLoss(surplus_weight=0.3, reference="plain")(same).tolist() != pytest.approx([math.log(2)] * 3)


def test_answers_of_one_length_have_the_inner_loss():
    for reference in ("decoupled", "plain"):
        assert LDDPOLoss(surplus_weight=0.0, reference=reference)(PAIRS)[2] == DPOLoss()(PAIRS)[2]


def test_with_alpha_near_1_it_is_the_inner_loss():
    for inner in (DPOLoss(), SimPOLoss()):
        torch.testing.assert_close(LDDPOLoss(inner, surplus_weight=1 - 1e-12)(PAIRS), inner(PAIRS))


def test_a_loss_without_a_reference_divides_by_the_real_lengths():
    bare = PAIRS._replace(reference_chosen=None, reference_rejected=None)
    z = 2.0 * (-4.75 / 4 - -6 / 2) - 1.0
    assert LDDPOLoss(SimPOLoss(), surplus_weight=0.25)(bare)[0].item() == pytest.approx(math.log1p(math.exp(-z)))


def test_the_inner_losss_memory_is_of_what_it_sees():
    """β = 1: decoupled log-ratios are −2.25, 1, −1 of the chosen and −2, −3, −4 of the rejected answers."""
    loss = LDDPOLoss(BCOLoss(1.0), surplus_weight=0.25)
    state = loss.next_state(loss.initial_state(), loss.sums(PAIRS))
    assert state.tolist() == pytest.approx([(-2.25 + 1 - 1 - 2 - 3 - 4) / 2, 3])


@pytest.mark.parametrize("surplus_weight", [-0.1, 1.0, math.nan])
def test_a_bad_alpha_is_refused_by_name(surplus_weight):
    with pytest.raises(ValueError, match="`surplus_weight`"):
        LDDPOLoss(surplus_weight=surplus_weight)


def test_a_bad_reference_is_refused_by_name():
    with pytest.raises(ValueError, match="`reference`"):
        LDDPOLoss(reference="both")


@pytest.mark.parametrize("over_lists", [PlackettLuceLoss(), LiPOLoss(), SFTLoss(of="best")], ids=str)
def test_a_loss_over_lists_has_no_shared_length_nor_the_weight_of_a_pair(over_lists):
    for inner in (over_lists, MixtureLoss([DPOLoss(), over_lists])):
        with pytest.raises(ValueError, match="`loss` to score pairs, which share a length"):
            LDDPOLoss(inner)
        with pytest.raises(ValueError, match="`loss` to score each pair by itself"):
            WPOLoss(inner)
