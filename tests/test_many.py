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
    """Of pairs in micro-batches, 3 on one rank and 2 on the other; of rankings 2, 2, 2, and then 1, 1 and none."""
    losses = ON_RANKINGS if ranked else _every_loss()
    file = str((many.rankings if ranked else many.pairs_with_columns)(tmp_path / "rows.jsonl", rows))
    work = functools.partial(many.run_each, str(tiny_model), file, losses, tmp_path, ranked=ranked)
    (one,) = ranks.run(work, 1, 1, 1000, folder=tmp_path / "one", seconds=120)
    found = ranks.run(work, count, count, tokens, folder=tmp_path / "many", seconds=120)
    for loss, expected, *of_ranks in zip(losses, one, *found, strict=True):
        for mine in of_ranks:  # each of them holds all of it
            _close(expected["moved"], mine["moved"], str(loss))
            for name in ("val", "state", "steps"):
                _close(expected[name], mine[name], f"{loss}: {name}")
        assert max(float(p.abs().max()) for p in expected["moved"].values()) > 1e-6, loss
