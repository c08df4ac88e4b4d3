from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from lit_dpo.data.budget import BudgetSampler
from lit_dpo.data.sampler import Uncounted

LENGTHS = np.random.default_rng(0).integers(1, 50, 101)
CASES = [
    (rows, budget, cap, ranks)
    for rows in (4, 7, 24, 101)
    for budget in (49, 130, 700)
    for cap in (None, 3)
    for ranks in (1, 2, 4)
]


def per_rank(rows: int, budget: int, cap: int | None, ranks: int, epoch: int = 0, **options) -> list[list[list[int]]]:
    samplers = [
        BudgetSampler(LENGTHS[:rows], budget, cap, rank=rank, num_replicas=ranks, **options) for rank in range(ranks)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    passes = [list(sampler) for sampler in samplers]
    assert [len(batches) for batches in passes] == [len(sampler) for sampler in samplers]
    return passes


def flat(passes: list[list[list[int]]]) -> list[int]:
    """The rows that are counted."""
    return [row for batches in passes for share in batches for row in share if not isinstance(share, Uncounted)]


@pytest.mark.parametrize(("rows", "budget", "cap", "ranks"), CASES)
def test_batches_keep_the_budget_and_every_epoch_has_the_same_number_of_steps(rows, budget, cap, ranks) -> None:
    steps = set()
    for epoch in range(20):
        passes = per_rank(rows, budget, cap, ranks, epoch)
        steps |= {len(batches) for batches in passes}
        for batch in chain.from_iterable(passes):
            assert LENGTHS[batch].sum() <= budget
            assert 1 <= len(batch) <= (cap or rows)
    assert len(steps) == 1


@pytest.mark.parametrize(("rows", "budget", "cap", "ranks"), CASES)
def test_training_sees_each_row_once(rows, budget, cap, ranks) -> None:
    for epoch in range(20):
        passes = per_rank(rows, budget, cap, ranks, epoch)
        assert sorted(flat(passes)) == list(range(rows))
        uncounted = [isinstance(share, Uncounted) for batches in passes for share in batches]
        if rows >= 2 * len(per_rank(rows, budget, cap, 1)[0]) + ranks:  # there are rows enough for all ranks
            assert not any(uncounted)
        assert sum(uncounted) < ranks


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equal_pairs_fill_the_budget(ranks: int) -> None:
    """48 pairs of 10 tokens, 3 to a batch of 30: 16 batches, and no other number."""
    for epoch in range(3):
        samplers = [BudgetSampler([10] * 48, 39, rank=rank, num_replicas=ranks) for rank in range(ranks)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        assert [[len(batch) for batch in sampler] for sampler in samplers] == [[3] * (16 // ranks)] * ranks


@pytest.mark.parametrize(("rows", "budget", "cap", "ranks"), CASES)
def test_evaluation_sees_every_row_exactly_once(rows, budget, cap, ranks) -> None:
    passes = per_rank(rows, budget, cap, ranks, shuffle=False)
    assert sorted(flat(passes)) == list(range(rows))
    assert all(LENGTHS[batch].sum() <= budget for batch in chain.from_iterable(passes))
    assert len({len(batches) for batches in passes}) == 1


def test_evaluation_keeps_the_order_of_the_file() -> None:
    assert flat(per_rank(101, 130, None, 1, shuffle=False)) == list(range(101))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    orders = [per_rank(101, 130, None, 1, epoch, seed=seed) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(flat(order)) for order in orders}) == 4
    np.random.seed(3)
    assert per_rank(101, 130, None, 1, 1, seed=1) == orders[3]


@pytest.mark.parametrize("start", [0, 1, 5])
def test_a_loaded_position_gives_the_remaining_batches(start: int) -> None:
    sampler = BudgetSampler(LENGTHS, 130, seed=5)
    sampler.set_epoch(3)
    straight = list(sampler)
    resumed = BudgetSampler(LENGTHS, 130, seed=5)
    resumed.load_position(3, start)
    resumed.set_epoch(3)  # as Lightning does
    assert list(resumed) == straight[start:]
    assert len(resumed) == len(straight)


def test_impossible_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`max_tokens`=49 but one has 50"):
        BudgetSampler([1, 50], 49)
    with pytest.raises(ValueError, match="batch_size"):
        BudgetSampler([1, 50], 50, 0)
