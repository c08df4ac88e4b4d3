"""WPO (arXiv 2406.11827)."""

from __future__ import annotations

import math

import pytest
import torch

from lit_dpo.logps import PairLogps, SequenceLogps
from lit_dpo.losses import AOTLoss, CDPOLoss, DPOLoss, LDDPOLoss, MixtureLoss, SFTLoss, WPOLoss


def _side(tokens: list[float], collision: list[float], lengths: list[int]) -> SequenceLogps:
    length = torch.tensor(lengths, dtype=torch.float64)
    numbers = (torch.tensor(given, dtype=torch.float64) for given in (tokens, collision))
    side = SequenceLogps(length, length, *numbers)
    return side._replace(total=side.sums(side.per_token))


# Lengths 2, 1 and 1, 2. log w: −1 and 2.5 of the chosen, −0.5 and 0.5 of the rejected answers.
CHOSEN = _side([-3.0, -2.0, -0.5], [-1.0, -2.0, -3.0], [2, 1])
REJECTED = _side([-1.5, -1.0, -2.0], [-1.0, -2.0, -2.0], [1, 2])
PAIRS = PairLogps(CHOSEN, REJECTED, CHOSEN._replace(total=CHOSEN.total - 1), REJECTED)


@pytest.mark.parametrize(
    ("options", "logs"),
    [
        ({}, [-1.5, 0.0]),
        ({"clamp": False}, [-1.5, 3.0]),
        ({"alignment": "none"}, [-2.5 - 1.5, -0.5 - 1.5]),
    ],
)
def test_values_by_hand(options, logs):
    """Margins 1: exp(log w_w + log w_l) · log(1 + e^{−β})."""
    loss = WPOLoss(DPOLoss(0.1), **options)
    assert loss.weights(PAIRS).tolist() == pytest.approx([math.exp(log) for log in logs])
    assert loss(PAIRS).tolist() == pytest.approx([math.exp(log) * math.log1p(math.exp(-0.1)) for log in logs])


def test_it_is_the_product_that_is_held_at_1_not_each_weight():
    pairs = PAIRS._replace(policy_rejected=REJECTED._replace(collision=torch.full((3,), 1.5, dtype=torch.float64)))
    assert WPOLoss().weights(pairs)[1].item() == pytest.approx(math.exp(2.5 - 3))


@pytest.mark.parametrize("inner", [DPOLoss(0.1), CDPOLoss(0.2, 0.1), MixtureLoss([DPOLoss(), SFTLoss()])])
def test_the_gradient_is_the_inner_losss_times_the_weight(inner):
    def gradient(loss, number):
        leaf = CHOSEN.per_token.clone().requires_grad_()
        pairs = PAIRS._replace(policy_chosen=CHOSEN._replace(per_token=leaf, total=CHOSEN.sums(leaf)))
        loss(pairs)[number].backward()
        return leaf.grad

    for number, weight in enumerate(WPOLoss(inner).weights(PAIRS)):
        torch.testing.assert_close(gradient(WPOLoss(inner), number), weight * gradient(inner, number))


def test_weights_are_of_the_models_own_log_probs_whichever_way_it_is_nested():
    around, within = WPOLoss(LDDPOLoss(DPOLoss(), 0.2)), LDDPOLoss(WPOLoss(DPOLoss()), 0.2)
    pairs = PAIRS._replace(
        reference_chosen=CHOSEN, reference_rejected=REJECTED._replace(per_token=REJECTED.per_token - 1)
    )
    torch.testing.assert_close(around(pairs), within(pairs))


def test_extreme_log_probs_leave_it_finite():
    far = [-2e4, -1e4, -0.0]
    pairs = PAIRS._replace(policy_chosen=_side(far, [-1.0] * 3, [2, 1]), policy_rejected=_side(far, [-1.0] * 3, [1, 2]))
    assert WPOLoss()(pairs).isfinite().all()


def test_a_loss_that_couples_pairs_is_refused():
    for inner in (AOTLoss(), SFTLoss("token"), MixtureLoss([DPOLoss(), SFTLoss("token")])):
        with pytest.raises(ValueError, match="`loss`"):
            WPOLoss(inner)


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="`alignment`"):
        WPOLoss(alignment="greedy")
    with pytest.raises(ValueError, match="`clamp`"):
        WPOLoss(alignment="none", clamp=False)
