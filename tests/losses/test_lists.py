"""What holds for losses of many completions of a prompt: those of its pairs, and those of its list."""

from __future__ import annotations

import pytest
import torch
from test_contract import EVERY, named

import lists
from lit_dpo.losses.composed import within

# Ragged: 4, 2 and 7 completions, with all 28 comparisons.
RECORD = lists.random()
BY_PAIRS = [make for make in EVERY if not any(one.per_prompt for one in within(make()))]
BY_LISTS = [make for make in EVERY if make().per_prompt]
MIXED = [make for make in EVERY if make not in (*BY_PAIRS, *BY_LISTS)]


def _columns(pairs):
    of = torch.Generator().manual_seed(1)
    size = pairs.policy_chosen.total.shape[0]
    ranges = {"score_margin": (0.2, 3), "probability": (0.55, 0.95)}
    draw = {name: low + (high - low) * torch.rand(size, generator=of, dtype=torch.float64)
            for name, (low, high) in ranges.items()}  # fmt: skip
    return pairs._replace(columns=draw)


def _scored(loss, record, view=lambda record: record.pairs()):
    """Losses, gradients of a sum in which each has its own weight, and the state."""
    tokens = record.policy.per_token.clone().requires_grad_()
    pairs = _columns(view(lists.with_tokens(record, tokens)))
    state = loss.initial_state()
    if state is not None:
        state = loss.next_state(state, loss.sums(pairs.detach()))
        pairs = pairs._replace(state=state)
    losses = loss(pairs)
    (gradient,) = torch.autograd.grad((losses * torch.linspace(1, 2, len(losses), dtype=torch.float64)).sum(), tokens)
    return losses.detach(), gradient, torch.zeros(0) if state is None else state


@pytest.mark.parametrize("make", BY_PAIRS, ids=named)
def test_comparisons_of_shared_completions_are_the_same_pairs_written_out(make):
    """Losses, gradients in the completions' tokens, and what is remembered."""
    for one, other in zip(_scored(make(), RECORD), _scored(make(), RECORD, lists.written_out), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", BY_LISTS + MIXED, ids=named)
def test_a_list_of_two_is_the_pair(make):
    record = lists.random((2, 2, 2, 2))
    for one, other in zip(_scored(make(), record), _scored(make(), record, lists.written_out), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", BY_LISTS, ids=named)
def test_a_loss_over_lists_has_one_number_for_each_prompt_wherever_its_completions_lie(make):
    order = [(2, [3, 6, 0, 1, 5, 2, 4]), (0, [2, 3, 1, 0]), (1, [1, 0])]
    other, tokens = lists.rearranged(RECORD, order)
    for record in (RECORD, other):
        assert make()(record.pairs()).shape == (3,)
    losses, gradient = ([], [])
    for this in (RECORD, other):
        leaf = this.policy.per_token.clone().requires_grad_()
        found = make()(lists.with_tokens(this, leaf).pairs())
        losses.append(found.detach())
        gradient.append(torch.autograd.grad(found.sum(), leaf)[0])
    torch.testing.assert_close(losses[1], losses[0][[2, 0, 1]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient[1], gradient[0][tokens], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", EVERY, ids=named)
def test_micro_batches_of_whole_prompts_have_the_losses_of_the_batch_unless_it_couples(make):
    loss = make()
    if loss.couples_pairs or loss.initial_state() is not None:
        return
    whole, numbers = _columns(RECORD.pairs()), RECORD.comparisons_per_prompt.tolist()
    parts = []
    for prompt, count in enumerate(RECORD.completions_per_prompt.tolist()):
        record, _ = lists.rearranged(RECORD, [(prompt, range(count))])
        columns = {name: values.split(numbers)[prompt] for name, values in whole.columns.items()}
        parts.append(loss(record.pairs(columns)))
    torch.testing.assert_close(torch.cat(parts), loss(whole), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", MIXED, ids=named)
def test_where_only_some_parts_are_of_lists_each_pair_gets_its_prompts(make):
    loss, pairs = make(), RECORD.pairs()
    assert not loss.per_prompt
    view = pairs._replace(
        state=None if (start := loss.initial_state()) is None else loss.next_state(start, loss.sums(pairs))
    )
    shared = [name for name, one in zip(loss.part_names, loss.inner, strict=True) if one.per_prompt]
    assert shared
    for name, values in loss.parts(view).items():
        assert values.shape == (28,)
        distinct = [len(set(part.tolist())) for part in values.split([6, 1, 21])]
        assert (distinct == [1, 1, 1]) == (name in shared)
    total = sum(
        weight * part for weight, part in zip(loss.weights or (1,) * 9, loss.parts(view).values(), strict=False)
    )
    torch.testing.assert_close(loss(view), total)


@pytest.mark.parametrize("make", BY_LISTS, ids=named)
def test_the_order_is_read_where_the_comparisons_are_and_nothing_waits_for_the_device(make):
    """On `meta` there are no numbers to read."""
    on_meta = [type(model)(*(values.to("meta") for values in model)) for model in RECORD[:2]]
    losses = make()(RECORD._replace(policy=on_meta[0], reference=on_meta[1]).pairs())
    assert (losses.device.type, losses.shape) == ("meta", (3,))
