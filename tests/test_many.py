"""Many processes give what one gives: every loss, every tail, to 1e-5."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lit_dpo.losses
import many
import ranks
from lit_dpo.logps import coupling
from lit_dpo.logps.microbatch import join
from lit_dpo.losses import (
    AOTLoss,
    AOTUnpairedLoss,
    BCOLoss,
    BetaDPOLoss,
    HumanlineLoss,
    LiPOLoss,
    MixtureLoss,
    PlackettLuceLoss,
    PreferenceLoss,
    SFTLoss,
)


def _every_loss() -> list[PreferenceLoss]:
    found = {
        given
        for module in pkgutil.walk_packages(lit_dpo.losses.__path__, "lit_dpo.losses.")
        for given in vars(importlib.import_module(module.name)).values()
        if isinstance(given, type) and issubclass(given, PreferenceLoss) and not inspect.isabstract(given)
    }
    return [one() for one in sorted(found, key=lambda one: one.__name__)]


ON_RANKINGS = [
    *(PlackettLuceLoss(), LiPOLoss(), BetaDPOLoss(), SFTLoss("token"), SFTLoss("token", "best")),
    *(AOTLoss(), HumanlineLoss(AOTUnpairedLoss(label_smoothing=0.1))),
    MixtureLoss([PlackettLuceLoss(), AOTUnpairedLoss(), BCOLoss()]),
]


def _close(expected: Any, found: Any, what: str, least: float = 0.1) -> None:
    """To 1e-5 of the largest of them, or of `least`."""
    if isinstance(expected, dict | list):
        names = expected if isinstance(expected, dict) else range(len(expected))
        assert len(expected) == len(found), what
        for name in names:
            _close(expected[name], found[name], f"{what} {name}", least)
        return
    if expected is None:
        assert found is None, what
        return
    expected, found = (torch.as_tensor(one, dtype=torch.float64) for one in (expected, found))
    assert (found - expected).abs().max() <= 1e-5 * max(least, float(expected.abs().max())), (what, found, expected)


@pytest.mark.parametrize(("ranked", "count", "rows", "tokens"), [(False, 2, 5, 200), (True, 3, 8, 1000)])
def test_ranks_train_and_measure_every_loss_like_one_process(
    tiny_model: Path, tmp_path: Path, ranked: bool, count: int, rows: int, tokens: int
) -> None:
    """Of pairs in micro-batches, 3 on one rank and 2 on the other; of rankings 2, 2, 2, and then 1, 1 and none.

    A validation of two prompts leaves the third rank without any.
    """
    losses = ON_RANKINGS if ranked else _every_loss()
    file = str((many.rankings if ranked else many.pairs_with_columns)(tmp_path / "rows.jsonl", rows))
    many.rankings(tmp_path / "few.jsonl", 2)
    work = functools.partial(many.run_each, str(tiny_model), file, losses, tmp_path, ranked=ranked)
    (one,) = ranks.run(work, 1, 1, 1000, folder=tmp_path / "one", seconds=120)
    found = ranks.run(work, count, count, tokens, folder=tmp_path / "many", seconds=120)
    for loss, expected, *of_ranks in zip(losses, one, *found, strict=True):
        for mine in of_ranks:  # each of them holds all of it
            for name in ("moved", "val", "state", "steps"):  # a second step of rankings brings out the rounding
                _close(expected[name], mine[name], f"{loss}: {name}", 1.0 if ranked else 1e-2)
        assert max(float(p.abs().max()) for p in expected["moved"].values()) > 1e-6, loss
    if ranked:  # by all ranks, of which one has nothing to predict
        for expected, mine in zip(one[-1]["predicted"], found[0][-1]["predicted"], strict=True):
            # which completions are compared is said of batches that hold more than two of a prompt
            _close({name: expected[name] for name in mine}, mine, "predicted", 1.0)


@pytest.mark.parametrize("cpu", [True, False])
def test_every_rank_has_the_record_of_all(tmp_path: Path, cpu: bool) -> None:
    """To the bit, whatever the numbers are of, and in the order of ranks."""
    expected = join([many.record(rank, 1 + 2 * rank) for rank in range(3)])
    begin = 0
    for rank, (joined, own) in enumerate(ranks.run(many.exchange, 3, cpu, folder=tmp_path)):
        torch.testing.assert_close(joined, expected, rtol=0, atol=0)
        size = len(many.record(rank, 1 + 2 * rank).policy_chosen.total)
        assert torch.equal(own, expected.policy_chosen.total[begin : begin + size])
        begin += size


def test_values_are_of_all_pairs_or_of_all_prompts() -> None:
    before, pairs, after = (many.record(seed, 2) for seed in range(3))
    others = coupling.Others([before], [after])
    prompts = torch.arange(6.0)
    assert others.own(prompts, pairs).tolist() == [2.0, 3.0]
    count = [len(one.policy_chosen.total) for one in (before, pairs, after)]
    found = others.own(torch.arange(float(sum(count))), pairs)
    assert found.tolist() == [*range(count[0], count[0] + count[1])]
    with pytest.raises(ValueError, match="Expected values of all pairs or of all prompts but got 99"):
        others.own(torch.zeros(99), pairs)


def test_what_is_on_a_device_goes_by_itself_and_what_is_on_the_cpu_with_the_record() -> None:
    mine: list[Any] = []
    here, there = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.half, device="meta")
    assert coupling._leave(here, mine) is here
    stands = coupling._leave(there, mine)
    assert mine == [there]
    assert (stands.shape, stands.dtype, stands.bytes) == ((2, 3), torch.half, 12)


def test_a_run_goes_on_with_another_number_of_ranks_in_the_middle_of_an_epoch(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Weights, AdamW, the loss's memory, a reference that moves, and rows that hold what was counted before: to 1e-5.

    A schedule too, whose length is that of an epoch: 21 pairs in batches of 6 have a tail of 3, one for each of 3.
    """

    def go_on(name: str, count: int, **given: Any) -> list[dict[str, Any]]:
        folder = tmp_path / name
        return ranks.run(
            functools.partial(many.go_on, str(tiny_model), str(pairs_file), folder, count, **given),
            count,
            folder=folder,
        )

    (straight,) = go_on("of-1", 1)
    assert straight["steps"] == 4
    go_on("of-2", 2, kill=True)
    for before, after in ((1, 2), (2, 1), (2, 2), (2, 3)):
        resumed = go_on(f"{before}-{after}", after, ckpt=str(tmp_path / f"of-{before}" / "third.ckpt"))
        what = f"{before} -> {after}"
        for mine in resumed:
            assert mine["steps"] == 4, what
            _close(straight["adapter"], mine["adapter"], what)
            _close(straight["state"], mine["state"], what)
        rows = resumed[0]["rows"]
        assert rows.keys() == {key for key in straight["rows"] if key[0] >= "3"}, what
        _close({key: straight["rows"][key] for key in rows}, rows, what)
        _close(straight["noted"], resumed[0]["noted"], what)
        said = (tmp_path / f"{before}-{after}" / "rank-0.log").read_text()
        assert ("going on with" in said) == (before != after)


def test_a_rank_without_a_share_of_a_step_gathers_what_was_measured_with_the_others(
    tiny_model: Path, tmp_path: Path
) -> None:
    file = str(many.pairs_with_columns(tmp_path / "rows.jsonl", 5))
    found = ranks.run(many.tail, 2, str(tiny_model), file, tmp_path, folder=tmp_path / "two", seconds=40)
    assert found[0] == found[1]
    assert found[0][0] == 4
    assert found[0][1]["train/loss"] > 0
