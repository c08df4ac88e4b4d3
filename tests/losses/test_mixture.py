"""Weighted sums of losses: RPO (arXiv 2404.19733, 2405.16436), MPO (2411.10442), and any other."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest
import torch

import tiny
from lit_dpo.logps import Field
from lit_dpo.losses import (
    BCOLoss,
    BetaDPOLoss,
    CPOLoss,
    DPOLoss,
    HingeLoss,
    LDDPOLoss,
    MixtureLoss,
    SFTLoss,
    SimPOLoss,
    TDPOLoss,
    WPOLoss,
)

PAIRS = tiny.logps([-3.0, -20.0], [-5.0, -8.0], [-4.0, -18.0], [-4.0, -9.0], lengths=([4, 10], [2, 5]))


def test_value_and_slope_by_hand():
    """Margins 2 and −3, means −0.75 and −2; slope −0.8·β·σ(−β·Δ) − 0.5/n_w."""
    pairs = tiny.logps([-3.0, -20.0], [-5.0, -8.0], [-4.0, -18.0], [-4.0, -9.0], lengths=([4, 10], [2, 5]))
    total = pairs.policy_chosen.total.requires_grad_()
    losses = MixtureLoss([DPOLoss(0.1), SFTLoss()], [0.8, 0.5])(pairs)
    losses.sum().backward()
    expected = [0.8 * math.log1p(math.exp(-0.2)) + 0.375, 0.8 * math.log1p(math.exp(0.3)) + 1.0]
    assert losses.tolist() == pytest.approx(expected)
    slopes = [-0.08 / (1 + math.exp(0.2)) - 0.5 / 4, -0.08 / (1 + math.exp(-0.3)) - 0.5 / 10]
    assert total.grad.tolist() == pytest.approx(slopes)


def test_it_is_the_weighted_sum_of_its_unweighted_parts():
    loss = MixtureLoss([HingeLoss(0.1), SFTLoss("token"), BCOLoss(0.2, "zero")], [0.5, 2.0, 3.0])
    parts = loss.parts(PAIRS)
    assert loss.part_names == tuple(parts) == ("hinge", "sft", "bco")
    for one, part in zip(loss.losses, parts.values(), strict=True):
        assert torch.equal(part, one(PAIRS))
    torch.testing.assert_close(loss(PAIRS), 0.5 * parts["hinge"] + 2 * parts["sft"] + 3 * parts["bco"])


def test_with_the_likelihood_mixed_in_cpo_is_cpo():
    both = MixtureLoss([CPOLoss(0.1, nll_weight=0.0), SFTLoss()], [1.0, 0.3])
    torch.testing.assert_close(both(PAIRS), CPOLoss(0.1, nll_weight=0.3)(PAIRS))
    assert Field.REFERENCE not in both.requires


def test_names_are_numbered_where_they_repeat():
    loss = MixtureLoss([DPOLoss(0.1), SFTLoss(), DPOLoss(0.3), DPOLoss(0.5)])
    assert loss.part_names == ("dpo", "sft", "dpo_2", "dpo_3")
    assert torch.equal(loss.parts(PAIRS)["dpo_3"], DPOLoss(0.5)(PAIRS))


def test_it_needs_what_its_parts_need():
    assert MixtureLoss([TDPOLoss(), WPOLoss()]).requires == {*Field} - {Field.REFERENCE_PER_TOKEN}
    assert Field.REFERENCE in MixtureLoss([SimPOLoss(), DPOLoss()]).requires
    assert MixtureLoss([SimPOLoss(), SFTLoss()]).requires == frozenset()
    assert MixtureLoss([DPOLoss(), SFTLoss("token")]).couples_pairs
    assert not MixtureLoss([DPOLoss(), SFTLoss()]).couples_pairs
    assert MixtureLoss().initial_state() is None


def test_each_part_has_its_own_memory():
    running, adaptive = BCOLoss(0.1), BetaDPOLoss(0.2)
    for loss in (
        MixtureLoss([DPOLoss(), running, SFTLoss(), adaptive], [0.5, 0.6, 0.7, 0.8]),
        MixtureLoss([DPOLoss(), MixtureLoss([running, SFTLoss()], [0.6, 0.7]), adaptive], [0.5, 1.0, 0.8]),
    ):
        state = loss.initial_state()
        states = [one.initial_state() for one in (running, adaptive)]
        assert torch.equal(state, torch.cat(states))
        for _ in range(2):
            state = loss.next_state(state, loss.sums(PAIRS))
            states = [
                one.next_state(own, one.sums(PAIRS)) for one, own in zip((running, adaptive), states, strict=True)
            ]
        torch.testing.assert_close(state, torch.cat(states))
        parts = [one(PAIRS._replace(state=own)) for one, own in zip((running, adaptive), states, strict=True)]
        expected = 0.5 * DPOLoss()(PAIRS) + 0.6 * parts[0] + 0.7 * SFTLoss()(PAIRS) + 0.8 * parts[1]
        torch.testing.assert_close(loss(PAIRS._replace(state=state)), expected)


def test_rewards_and_beta_are_those_of_the_first_loss_with_a_reference():
    """Whatever the order, a run with a reference compares with it; without one, the first loss leads."""
    for losses in ([DPOLoss(0.3), SimPOLoss(2.0)], [SimPOLoss(2.0), DPOLoss(0.3)], [SFTLoss(), DPOLoss(0.3)]):
        assert MixtureLoss(losses).beta == 0.3
        assert torch.equal(MixtureLoss(losses).rewards(PAIRS)[0], 0.3 * PAIRS.chosen_logratio)
    alone = MixtureLoss([SimPOLoss(2.0), SFTLoss()])
    assert torch.equal(alone.rewards(PAIRS)[0], 2.0 * PAIRS.policy_chosen.total)


def test_lists_become_tuples_so_that_it_hashes_and_pickles():
    loss = MixtureLoss([DPOLoss(), LDDPOLoss()], [1, 2])
    assert loss == MixtureLoss((DPOLoss(), LDDPOLoss()), (1.0, 2.0))
    assert hash(loss) == hash(MixtureLoss((DPOLoss(), LDDPOLoss()), (1.0, 2.0)))
    assert pickle.loads(pickle.dumps(loss)) == dataclasses.replace(loss) == loss
    assert repr(MixtureLoss([DPOLoss()], [2])) == "MixtureLoss(losses=(DPOLoss(beta=0.1),), weights=(2.0,))"


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="`losses`"):
        MixtureLoss([])
    with pytest.raises(ValueError, match="`weights` to be 2"):
        MixtureLoss([DPOLoss(), SFTLoss()], [1.0])
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="`weights`"):
            MixtureLoss([DPOLoss(), SFTLoss()], [1.0, weight])
