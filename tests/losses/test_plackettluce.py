"""DPO over rankings (arXiv 2305.18290, appendix A.3) and S-DPO (2406.09215)."""

from __future__ import annotations

import math

import pytest
import torch

import lists
from lit_dpo.losses import DPOLoss, HumanlineLoss, PlackettLuceLoss
from lit_dpo.losses.order import ranking


def _scored(loss, record):
    """Losses, and slopes in log π of the completions."""
    leaf = record.policy.total.clone().requires_grad_()
    losses = loss(record._replace(policy=record.policy._replace(total=leaf)).pairs())
    return losses.tolist(), torch.autograd.grad(losses.sum(), leaf)[0].tolist()


def _by_hand(rewards, top=None):
    return sum(
        math.log(sum(math.exp(other) for other in rewards[place:])) - one
        for place, one in enumerate(rewards[: top or len(rewards)])
    )


def test_values_by_hand():
    ratios = [3.0, -1.0, 2.0, 0.5], [1.0, 4.0]
    for top in (None, 1, 2, 3):
        losses, _ = _scored(PlackettLuceLoss(0.1, top), lists.ranked(*ratios))
        assert losses == pytest.approx([_by_hand([0.1 * one for one in prompt], top) for prompt in ratios], rel=1e-12)


def test_two_completions_are_dpo_to_the_bit():
    ratios = [[1.0, 0.5], [-3.0, 40.0], [2000.0, -500.0], [-4.0, 4e4], [0.3, 0.3]]
    record = lists.ranked(*ratios)
    assert _scored(PlackettLuceLoss(0.3), record) == _scored(DPOLoss(0.3), record)


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_of_equal_rewards_it_is_log_of_k_factorial_with_the_slopes_of_the_docstring(count):
    (loss,), slopes = _scored(PlackettLuceLoss(0.1), lists.ranked([0.7] * count))
    assert loss == pytest.approx(math.lgamma(count + 1), rel=1e-12)
    assert slopes[0] == pytest.approx(-0.1 * (count - 1) / count, rel=1e-12)
    assert slopes[-1] == pytest.approx(0.1 * (sum(1 / (k + 1) for k in range(count)) - 1), rel=1e-12)
    assert sum(slopes) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_finite_where_a_product_of_exponentials_is_not(dtype):
    """Rewards 0, 500, −500, 2000: 2000 − 0, 2000 − 500 and 2000 + 500 nats."""
    record = lists.ranked([0.0, 500.0, -500.0, 2000.0])
    record = record._replace(policy=record.policy._replace(total=record.policy.total.to(dtype)))
    record = record._replace(reference=record.reference._replace(total=record.reference.total.to(dtype)))
    losses, slopes = _scored(PlackettLuceLoss(1.0), record)
    assert losses == [6000.0]
    assert slopes == [-1.0, -1.0, -1.0, 3.0]


def test_all_but_one_position_are_all():
    record = lists.random((5, 5))
    assert _scored(PlackettLuceLoss(top=4), record) == _scored(PlackettLuceLoss(), record)
    assert _scored(PlackettLuceLoss(top=9), record) == _scored(PlackettLuceLoss(), record)
    assert _scored(PlackettLuceLoss(top=3), record) != _scored(PlackettLuceLoss(), record)


def test_the_first_position_alone_is_s_dpo_and_asks_for_nothing_else():
    """−log σ(−log Σ e^(s_j − s_w)), of the best one against others that are not compared among themselves."""
    ratios = [3.0, -1.0, 2.0, 0.5]
    record = lists.ranked(ratios, [1.0, 2.0, 0.0], top=True)
    losses, _ = _scored(PlackettLuceLoss(0.1, top=1), record)
    others = math.log(sum(math.exp(0.1 * (one - 3.0)) for one in ratios[1:]))
    assert losses[0] == pytest.approx(math.log1p(math.exp(others)), rel=1e-12)
    assert losses == _scored(PlackettLuceLoss(0.1, top=1), lists.ranked(ratios, [1.0, 2.0, 0.0]))[0]


def test_neighbours_and_repeated_comparisons_are_enough():
    record = lists.ranked([3.0, -1.0, 2.0, 0.5], [1.0, 2.0])
    chain = lists.compared(record, [(2, 3), (0, 1), (1, 2), (0, 1), (0, 1)], [4, 1])
    assert _scored(PlackettLuceLoss(), chain) == _scored(PlackettLuceLoss(), record)


@pytest.mark.parametrize("count", [2, 3, 8, 9, 33])
def test_a_chain_of_any_length_is_followed_to_its_end(count):
    record = lists.compared(lists.ranked(range(count)), [(k + 1, k) for k in range(count - 1)], [count - 1])
    assert ranking(record).tolist() == [[*range(count)][::-1]]


def test_a_prompt_with_one_completion_has_no_loss():
    losses, slopes = _scored(PlackettLuceLoss(), lists.ranked([5.0], [1.0, 1.0]))
    assert losses == pytest.approx([0, math.log(2)])
    assert slopes[0] == 0


OPEN = {
    "ties": ([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)], 2),
    "best alone": ([(0, 1), (0, 2), (0, 3)], 1),
    "worst alone": ([(0, 3), (1, 3), (2, 3)], 0),
    "circle": ([(0, 1), (1, 2), (2, 3), (3, 1)], 1),
    "both ways": ([(0, 1), (1, 2), (2, 3), (3, 2)], 2),
    "large circle": ([(0, 1), (1, 2), (2, 3), (3, 0)], 0),
    "two pairs": ([(0, 1), (2, 3)], 0),
    "one left out": ([(0, 1), (1, 2), (0, 2)], 0),
    "none": ([], 0),
    "itself": ([(0, 1), (1, 2), (2, 3), (0, 0)], 0),
}


@pytest.mark.parametrize(("comparisons", "clear"), OPEN.values(), ids=OPEN)
def test_what_the_comparisons_leave_open_is_refused_by_the_prompts_place(comparisons, clear):
    """So many first positions are `clear`, and asking for more is refused; three would be all."""
    record = lists.compared(
        lists.ranked([1.0, 2.0], [0.0, 1.0, 2.0, 3.0], [2.0, 1.0]),
        [(0, 1), *comparisons, (1, 0)],
        [1, len(comparisons), 1],
    )
    for top in (None, 1, 2, 3):
        loss = PlackettLuceLoss(top=top)
        if clear >= (top or 3):
            assert loss(record.pairs()).isfinite().all()
            continue
        words = {1: "which one is best", 2: "which ones are the best 2, in order"}.get(top, "which one is above which")
        with pytest.raises(ValueError, match=f"of the 4 completions of prompt 1 of the batch .* {words}, but") as error:
            loss(record.pairs())
        assert "`--data.comparisons all`" in str(error.value)
        assert ("`top: 1`" in str(error.value)) == (top != 1)


def test_within_humanline_it_sees_clamped_tokens():
    record = lists.random((3, 5), seed=2)
    ratios = (record.policy.per_token - record.reference.per_token).clamp(-0.3, 0.2)
    assert (ratios.abs() >= 0.2).sum() > 5
    held = record._replace(policy=record.policy._replace(total=record.reference.total + record.policy.sums(ratios)))
    for top in (None, 1):
        loss = PlackettLuceLoss(top=top)
        losses = HumanlineLoss(loss, lower=-0.3, upper=0.2)(record.pairs())
        torch.testing.assert_close(losses, loss(held.pairs()), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(losses, loss(record.pairs()))


@pytest.mark.parametrize("top", [0, -1, 1.5, True, "1"])
def test_a_bad_top_is_refused_by_name(top):
    with pytest.raises(ValueError, match="`top` to be a whole number >= 1"):
        PlackettLuceLoss(top=top)
