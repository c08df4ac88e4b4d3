"""Negative log-likelihood of the chosen answer."""

from __future__ import annotations

import pytest
import torch

import lists
import tiny
from lit_dpo.losses import DPOLoss, MixtureLoss, SFTLoss

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
    assert repr(SFTLoss()) == "SFTLoss(average_over='sequence', of='chosen')"
    assert (SFTLoss().couples_pairs, SFTLoss("token").couples_pairs) == (False, True)


def test_the_best_completion_of_each_prompt_counts_once():
    """A ranking of four chooses the first three times, the second twice, and the third once."""
    record = lists.random((4, 2, 3), seed=3)
    leaf = record.policy.per_token.clone().requires_grad_()
    pairs = lists.with_tokens(record, leaf).pairs()
    firsts, numbers = [0, 4, 6], [6, 1, 3]
    best = []
    for first, chosen in zip(firsts, record.comparisons[:, 0].split(numbers), strict=True):
        best.append(first + int(chosen.mode().values))
    total, length = record.policy.total[best], record.policy.length[best]
    assert SFTLoss(of="best")(pairs).tolist() == pytest.approx((-total / length).tolist(), rel=1e-12)
    losses = SFTLoss("token", of="best")(pairs)
    assert losses.mean().item() == pytest.approx(float(-total.sum() / length.sum()), rel=1e-12)
    (slopes,) = torch.autograd.grad(losses.sum(), leaf)
    moved = [bool(part.any()) for part in slopes.split(record.lengths.tolist())]
    assert [place for place, one in enumerate(moved) if one] == best
    (slopes,) = torch.autograd.grad(SFTLoss()(lists.with_tokens(record, leaf).pairs()).sum(), leaf)
    assert sum(bool(part.any()) for part in slopes.split(record.lengths.tolist())) == 3 + 1 + 2


def test_a_mixture_hands_each_pair_what_is_of_its_prompt():
    pairs = lists.random((4, 2, 3), seed=3).pairs()
    parts = MixtureLoss([DPOLoss(), SFTLoss(of="best")]).parts(pairs)
    of_prompts = SFTLoss(of="best")(pairs)
    assert torch.equal(parts["sft"], of_prompts.repeat_interleave(torch.tensor([6, 1, 3])))
    assert (SFTLoss(of="best").per_prompt, SFTLoss().per_prompt) == (True, False)


def test_a_prompt_without_one_best_completion_is_refused():
    record = lists.compared(lists.random((2, 4)), [(0, 1), (0, 1), (2, 3)], [1, 2])
    with pytest.raises(ValueError, match=r"completions of prompt 1 of the batch .* which one is best, but"):
        SFTLoss(of="best")(record.pairs())
    assert SFTLoss()(record.pairs()).shape == (3,)


def test_a_bad_choice_is_refused_by_name():
    with pytest.raises(ValueError, match="`of`"):
        SFTLoss(of="worst")


def test_a_bad_average_is_refused_by_name():
    with pytest.raises(ValueError, match="`average_over`"):
        SFTLoss(average_over="mean")
