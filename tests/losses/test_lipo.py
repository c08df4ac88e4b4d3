"""LiPO-λ (arXiv 2402.01878)."""

from __future__ import annotations

import math

import pytest
import torch

import lists
from lit_dpo.losses import DPOLoss, LiPOLoss


def _scored(loss, record):
    leaf = record.policy.total.clone().requires_grad_()
    losses = loss(record._replace(policy=record.policy._replace(total=leaf)).pairs())
    return losses.tolist(), torch.autograd.grad(losses.sum(), leaf)[0].tolist()


def _by_hand(psi, rewards, weighting="paper"):
    """Eq. 8, pair by pair."""
    log = math.log if weighting == "paper" else math.log2
    position = {one: place for place, one in enumerate(sorted(rewards, reverse=True), 1)}
    terms = [
        abs(2 ** psi[i] - 2 ** psi[j])
        * abs(1 / log(1 + position[rewards[i]]) - 1 / log(1 + position[rewards[j]]))
        * math.log1p(math.exp(rewards[j] - rewards[i]))
        for i in range(len(psi))
        for j in range(len(psi))
        if psi[i] > psi[j]
    ]
    return sum(terms) if weighting == "paper" else len(psi) * sum(terms) / len(terms)


@pytest.mark.parametrize("weighting", ["paper", "rax"])
def test_values_by_hand(weighting):
    """ψ is (wins + ½)/K: ⅞, ⅝, ⅜, ⅛ of four and ¾, ¼ of two."""
    first, second = [3.0, -1.0, 2.0, 0.5], [1.0, 4.0]
    losses, _ = _scored(LiPOLoss(0.1, weighting), lists.ranked(first, second))
    expected = [
        _by_hand([7 / 8, 5 / 8, 3 / 8, 1 / 8], [0.1 * one for one in first], weighting),
        _by_hand([3 / 4, 1 / 4], [0.1 * one for one in second], weighting),
    ]
    assert losses == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weighting", ["paper", "rax"])
def test_completions_that_are_not_compared_are_equally_good(weighting):
    """Wins and half the ties, itself among them, over K: ⅞ and thrice ⅜."""
    ratios = [3.0, -1.0, 2.0, 0.5]
    losses, _ = _scored(LiPOLoss(0.1, weighting), lists.ranked(ratios, top=True))
    by_hand = _by_hand([7 / 8, 3 / 8, 3 / 8, 3 / 8], [0.1 * one for one in ratios], weighting)
    assert losses == pytest.approx([by_hand], rel=1e-12)


@pytest.mark.parametrize(("weighting", "constant"), [("paper", 0.2623), ("rax", 0.3636)])
def test_of_two_completions_it_is_dpo_times_a_constant(weighting, constant):
    exact = (2**0.75 - 2**0.25) * {"paper": 1 / math.log(2) - 1 / math.log(3), "rax": 2 - 2 / math.log2(3)}[weighting]
    assert exact == pytest.approx(constant, abs=5e-5)
    record = lists.ranked([1.0, 0.5], [-3.0, 40.0], [0.3, 0.3])
    for one, dpo in zip(_scored(LiPOLoss(0.3, weighting), record), _scored(DPOLoss(0.3), record), strict=True):
        assert one == pytest.approx([exact * value for value in dpo], rel=1e-12)


def test_raxs_weighting_is_k_log_2_of_the_papers_and_the_mean_over_pairs():
    record = lists.random((4, 2, 7))
    paper, rax = (torch.tensor(_scored(LiPOLoss(weighting=one), record)[0]) for one in ("paper", "rax"))
    factor = torch.tensor([count * math.log(2) / (count * (count - 1) / 2) for count in (4, 2, 7)])
    torch.testing.assert_close(rax, paper * factor)


def test_the_weights_have_no_gradient_and_follow_the_present_rewards():
    record = lists.ranked([0.0, 1.0, 2.0])
    _, slopes = _scored(LiPOLoss(0.1), record)
    gain, discount = [2**psi for psi in (5 / 6, 3 / 6, 1 / 6)], [1 / math.log(1 + position) for position in (3, 2, 1)]
    force = {
        (i, j): 0.1 * abs(gain[i] - gain[j]) * abs(discount[i] - discount[j]) / (1 + math.exp(0.1 * (i - j)))
        for i, j in [(0, 1), (0, 2), (1, 2)]
    }
    expected = [-force[0, 1] - force[0, 2], force[0, 1] - force[1, 2], force[0, 2] + force[1, 2]]
    assert slopes == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("top", [False, True])
def test_where_the_policy_is_its_reference_the_order_of_completions_does_not_matter(top):
    record = lists.ranked([0.5] * 5, [1.0, 1.0, 2.0], top=top)
    other, tokens = lists.rearranged(record, [(0, [3, 1, 0, 4, 2]), (1, [2, 1, 0])])
    (losses, slopes), (others, moved) = _scored(LiPOLoss(), record), _scored(LiPOLoss(), other)
    assert others == pytest.approx(losses, rel=1e-12)
    if not top:  # of equals in both, one is before the other
        assert moved == pytest.approx([slopes[one] for one in tokens], rel=1e-12)


WRONG = {
    "neighbours": [(0, 1), (1, 2), (2, 3)],
    "one missing": [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)][:4],
    "circle": [(0, 1), (1, 2), (2, 0), (0, 3), (1, 3), (2, 3)],
    "both ways": [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (3, 2)],
    "two pairs": [(0, 1), (2, 3)],
    "itself": [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (3, 3)],
}


@pytest.mark.parametrize("comparisons", WRONG.values(), ids=WRONG)
def test_comparisons_that_are_not_those_of_a_ranking_are_refused_by_the_prompts_place(comparisons):
    record = lists.ranked([1.0, 2.0], [0.0, 1.0, 2.0, 3.0], [2.0, 1.0])
    record = lists.compared(record, [(0, 1), *comparisons, (1, 0)], [1, len(comparisons), 1])
    with pytest.raises(ValueError, match=r"completions of prompt 1 of the batch .*`--data.comparisons all`"):
        LiPOLoss()(record.pairs())


def test_a_prompt_without_anything_to_compare_has_no_loss():
    for weighting in ("paper", "rax"):
        record = lists.compared(lists.ranked([5.0], [1.0, 2.0], [1.0, 0.0]), [(0, 1)], [0, 0, 1])
        losses, slopes = _scored(LiPOLoss(weighting=weighting), record)
        assert losses[:2] == [0, 0]
        assert losses[2] > 0
        assert slopes[:3] == [0, 0, 0]


def test_a_bad_weighting_is_refused_by_name():
    with pytest.raises(ValueError, match="`weighting`"):
        LiPOLoss(weighting="sum")
