"""The records between models, losses and metrics."""

from __future__ import annotations

import pickle

import pytest
import torch

import tiny
from lit_dpo.logps import PairLogps, SequenceLogps

PAIRS = tiny.logps([-1.0, -2.0], [-3.0, -5.0], [-1.5, -2.5], [-2.0, -9.0], lengths=([2, 4], [1, 5]))


def test_log_ratios_are_policy_minus_reference_and_the_margin_is_their_difference():
    assert PAIRS.chosen_logratio.tolist() == [0.5, 0.5]
    assert PAIRS.rejected_logratio.tolist() == [-1.0, 4.0]
    assert PAIRS.margin.tolist() == [1.5, -3.5]


def test_swapping_the_sides_negates_the_margin():
    swapped = PairLogps(*(PAIRS[number] for number in (1, 0, 3, 2)))
    assert swapped.margin.tolist() == (-PAIRS.margin).tolist()


def test_policy_equal_to_reference_has_margin_0():
    assert PairLogps(PAIRS[0], PAIRS[1], PAIRS[0], PAIRS[1]).margin.tolist() == [0.0, 0.0]


def test_the_mean_is_nats_per_token():
    assert PAIRS.policy_chosen.mean.tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("name", ["chosen_logratio", "rejected_logratio", "margin"])
def test_a_log_ratio_without_a_reference_is_an_error_that_names_noreference(name):
    pairs = PairLogps(PAIRS.policy_chosen, PAIRS.policy_rejected)
    with pytest.raises(ValueError, match="NoReference"):
        getattr(pairs, name)


def test_detached_records_hold_the_same_numbers_without_a_graph():
    total = torch.tensor([-1.0], requires_grad=True)
    side = SequenceLogps(2 * total, torch.ones(1), 2 * total)
    pairs = PairLogps(side, side).detach()
    assert pairs.policy_chosen.total.item() == -2.0
    assert not pairs.policy_chosen.total.requires_grad
    assert not pairs.policy_rejected.per_token.requires_grad
    assert pairs.reference_chosen is None
    assert side.total.requires_grad


def test_records_without_tokens_detach():
    assert PAIRS.policy_chosen.detach().per_token is None


def test_records_pickle():
    again = pickle.loads(pickle.dumps(PAIRS))
    assert type(again) is PairLogps
    assert again.margin.tolist() == PAIRS.margin.tolist()


def test_scored_totals_are_the_sums_of_their_tokens_and_lengths():
    from lit_dpo.logps.choice import choose_layout
    from lit_dpo.logps.score import completion_logps

    model = tiny.model().requires_grad_(False)
    choose_layout(model)
    found = completion_logps(model, tiny.batch())
    parts = found.per_token.split([int(length) for length in found.length])
    assert len(parts) == len(found.total)
    torch.testing.assert_close(torch.stack([part.sum() for part in parts]), found.total)
    assert all(field.dtype == torch.float32 for field in found[:3])
    assert found.collision is None
    assert found.kl is None


def test_sums_are_taken_per_sequence_and_have_gradients():
    side = SequenceLogps(torch.zeros(3), torch.tensor([2.0, 1.0, 3.0]))
    values = torch.arange(6, dtype=torch.float64, requires_grad=True)
    sums = side.sums(values)
    assert sums.tolist() == [1.0, 2.0, 12.0]
    (gradient,) = torch.autograd.grad(sums @ torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64), values)
    assert gradient.tolist() == [1.0, 1.0, 10.0, 100.0, 100.0, 100.0]


@pytest.mark.parametrize("name", ["state", "policy_chosen.per_token", "policy_rejected.kl", "reference_chosen"])
def test_what_is_not_there_is_an_error_by_name(name):
    pairs = PairLogps(PAIRS.policy_chosen, PAIRS.policy_rejected)
    with pytest.raises(ValueError, match=f"Expected `{name}` in the pairs but there is none. [A-Z]"):
        pairs.require(name)


def test_what_is_there_is_given():
    given = torch.tensor([0.5, 1.0])
    assert PAIRS._replace(columns={"difficulty": given}).column("difficulty") is given
    assert PAIRS.require("policy_chosen.total") is PAIRS.policy_chosen.total


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("score_margin", r"`--data.format.score_margin COLUMN`"),
        ("difficulty", r"`--data.format.numeric_columns \[difficulty\]`"),
    ],
)
def test_a_column_that_is_not_there_is_an_error_with_its_remedy(name, remedy):
    pairs = PAIRS._replace(columns={"weight": torch.ones(2)})
    with pytest.raises(ValueError, match=rf"Expected a column `{name}` .* \(there: weight\).* {remedy}"):
        pairs.column(name)


def _side(lengths, *, tokens=True, seed=0):
    random = torch.Generator().manual_seed(seed)
    summands = [torch.randn(sum(lengths), generator=random) for _ in range(3)] if tokens else [None] * 3
    return SequenceLogps(torch.randn(len(lengths), generator=random), torch.tensor(lengths), *summands)


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("tokens", [(True, True), (True, False), (False, True)])
def test_sides_are_lists_of_two_and_these_are_the_sides_again(reference, tokens):
    chosen, rejected = _side([3, 1], tokens=tokens[0]), _side([2, 5], tokens=tokens[1], seed=1)
    pairs = PairLogps(chosen, rejected, *((_side([3, 1], seed=2), _side([2, 5], seed=3)) if reference else ()))
    lists = pairs.lists
    assert lists.lengths.tolist() == [3, 2, 1, 5]
    assert lists.completions_per_prompt.tolist() == [2, 2]
    assert lists.policy.total.tolist() == [x for both in zip(chosen.total, rejected.total, strict=True) for x in both]
    again = lists.pairs()
    assert (again.reference_chosen is None) == (not reference)
    both = tokens == (True, True)  # what one side lacks, a list of both lacks
    for name in (
        "policy_chosen",
        "policy_rejected",
        *(("reference_chosen", "reference_rejected") if reference else ()),
    ):
        given, found = getattr(pairs, name), getattr(again, name)
        for field in SequenceLogps._fields:
            mine, theirs = getattr(found, field), getattr(given, field)
            whole = both or name.startswith("reference") or field in ("total", "length")
            assert torch.equal(mine, theirs) if whole else mine is None, (name, field)


def test_a_list_without_its_reference_on_one_side_says_so():
    with pytest.raises(ValueError, match="Expected `reference_rejected` in the pairs"):
        PAIRS._replace(reference_rejected=None).lists  # noqa: B018 - it raises


def test_a_changed_view_is_of_policy_and_reference_of_the_same_completions():
    """Whether a record was made of sides, or of lists."""

    def doubled(policy, reference):
        return policy._replace(total=2 * policy.total), reference._replace(total=policy.total - reference.total)

    for pairs in (PAIRS, PAIRS.lists.pairs()):
        changed = pairs.map_models(doubled)
        assert changed.policy_chosen.total.tolist() == [-2.0, -4.0]
        assert changed.policy_rejected.total.tolist() == [-6.0, -10.0]
        assert changed.reference_chosen.total.tolist() == pairs.chosen_logratio.tolist()
        assert changed.reference_rejected.total.tolist() == pairs.rejected_logratio.tolist()
