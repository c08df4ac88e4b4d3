from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from lit_dpo.data.position import first_position
from lit_dpo.data.sampler import PromptSampler, Uncounted
from lit_dpo.errors import ResumeError

CASES = [(rows, batch, ranks) for rows in (4, 7, 24, 101) for batch in (1, 3, 8) for ranks in (1, 2, 4)]


def per_rank(rows: int, batch: int, ranks: int, epoch: int = 0, **options) -> list[list[list[int]]]:
    lengths = np.random.default_rng(0).integers(1, 50, rows)
    samplers = [PromptSampler(lengths, batch, rank=r, num_replicas=ranks, **options) for r in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    passes = [list(sampler) for sampler in samplers]
    assert [len(batches) for batches in passes] == [len(sampler) for sampler in samplers]
    return passes


def flat(passes: list[list[list[int]]]) -> list[int]:
    """The rows that are counted."""
    return [row for batches in passes for share in batches for row in share if not isinstance(share, Uncounted)]


@pytest.mark.parametrize(("rows", "batch", "ranks"), CASES)
def test_training_sees_each_row_once_and_ranks_step_together(rows: int, batch: int, ranks: int) -> None:
    passes = per_rank(rows, batch, ranks)
    assert sorted(flat(passes)) == list(range(rows))
    assert len({len(batches) for batches in passes}) == 1
    for step in zip(*passes, strict=True):
        sizes = [len(share) * (not isinstance(share, Uncounted)) for share in step]
        assert max(sizes) - min(sizes) <= 1
        assert 1 <= max(sizes) <= batch
        assert all(share for share in step), "a rank without a share runs something"
    assert all(len(share) == batch for batches in passes for share in batches[:-1])


@pytest.mark.parametrize(("rows", "batch", "ranks"), CASES)
def test_evaluation_sees_every_row_exactly_once(rows: int, batch: int, ranks: int) -> None:
    passes = per_rank(rows, batch, ranks, shuffle=False)
    assert sorted(flat(passes)) == list(range(rows))
    assert len({len(batches) for batches in passes}) == 1, "what ranks wait for each other in happens on all of them"


def test_evaluation_keeps_the_order_of_the_file() -> None:
    assert flat(per_rank(10, 3, 1, shuffle=False)) == list(range(10))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    orders = [flat(per_rank(40, 4, 1, epoch, seed=seed)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    np.random.seed(3)
    assert flat(per_rank(40, 4, 1, 1, seed=1)) == orders[3]


@pytest.mark.parametrize("rows", [48, 49, 50, 54])
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_the_rows_of_a_step_do_not_depend_on_how_they_are_shared(ranks: int, rows: int) -> None:
    for step, alone in zip(zip(*per_rank(rows, 6 // ranks, ranks), strict=True), per_rank(rows, 6, 1)[0], strict=True):
        assert sorted(flat([list(step)])) == sorted(alone)


@pytest.mark.parametrize("start", [0, 1, 5, 12])
def test_a_loaded_position_gives_the_remaining_batches(start: int) -> None:
    sampler = PromptSampler(range(50), 4, seed=5)
    sampler.set_epoch(3)
    straight = list(sampler)
    resumed = PromptSampler(range(50), 4, seed=5)
    resumed.load_position(3, start)
    resumed.set_epoch(3)  # as Lightning does
    assert list(resumed) == straight[start:]
    assert len(resumed) == len(straight)
    resumed.set_epoch(4)
    sampler.set_epoch(4)
    assert list(resumed) == list(sampler)


def test_batches_hold_pairs_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 800)

    def spread(bucket: int) -> float:
        return float(np.mean([np.ptp(lengths[rows]) for rows in PromptSampler(lengths, 8, bucket=bucket)]))

    assert spread(50) < spread(0) / 5
    first = [lengths[rows].mean() for rows in PromptSampler(lengths, 8)]
    assert abs(np.corrcoef(first, range(len(first)))[0, 1]) < 0.3  # the batches themselves are not in order


def test_ranks_share_a_step_evenly() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 800)
    ranks = [list(PromptSampler(lengths, 8, rank=rank, num_replicas=4)) for rank in range(4)]
    loads = np.array([[lengths[rows].sum() for rows in batches] for batches in ranks])
    assert (loads.max(0) / loads.mean(0)).mean() < 1.05


def test_a_million_rows_are_ordered_at_once() -> None:
    sampler = PromptSampler(np.random.default_rng(0).integers(1, 1000, 1_000_000), 8)
    assert len(next(iter(sampler))) == 8


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        PromptSampler([1, 2], 0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_position_is_of_all_ranks_together(ranks: int) -> None:
    """The same batches on another number of ranks, unless `max_tokens` fills those of each rank by themselves."""
    there = {"pairs": 50, "batch_size": 6, "max_tokens": None, "ranks": 1, "seed": 0}
    here = there | {"batch_size": 6 // ranks, "ranks": ranks}
    trainer = SimpleNamespace(fit_loop=SimpleNamespace(restarting=True))
    stands = {"epoch": 1, "batches": 3}
    assert first_position(there | stands, trainer, None, here) == (1, 3)
    if ranks == 1:
        return
    with pytest.raises(ResumeError, match=rf"ranks 1 -> {ranks}. .*all ranks together have 6 again"):
        first_position(there | stands, trainer, None, here | {"batch_size": 6})
    tokens = {"max_tokens": 90, "batch_size": None}
    with pytest.raises(ResumeError, match=rf"ranks 1 -> {ranks}. With `max_tokens` each rank's"):
        first_position(there | stands | tokens, trainer, None, here | tokens)
