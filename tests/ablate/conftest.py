"""A small ablation that ran through, for all tests of ablations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))  # for `watched`, in workers too


class Straight(NamedTuple):
    """What was typed, where it wrote, and what its reference computed."""

    arguments: Callable[..., list[str]]
    root: Path
    counts: Path


@pytest.fixture(scope="session")
def arguments(tiny_model, pairs_file, tmp_path_factory) -> Callable[..., list[str]]:
    """The command line of four short runs into a folder; `counts` is what its reference writes."""

    def made(out: Path, counts: Path, *more: str, **watched: Any) -> list[str]:
        config = {
            "model": {
                "policy": {"model": str(tiny_model), "quantization": "none", "r": 4, "dropout": 0.1},
                "reference": {"class_path": "watched.Counted", "init_args": {"counts": str(counts)}},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
            },
            "data": {"init_args": {"train": str(pairs_file), "val": str(pairs_file), "batch_size": 4}},
            "trainer": {
                "max_epochs": 2,
                "accelerator": "cpu",
                "log_every_n_steps": 2,
                "callbacks": [
                    {"class_path": "watched.Watched", "init_args": watched},
                    {"class_path": "training.Unestimated"},
                ],
            },
        }
        file = tmp_path_factory.mktemp("base") / "base.yaml"
        file.write_text(yaml.safe_dump(config))
        given = ["--config", str(file), "--seeds", "1,2", "--completions", "2", "--out", str(out)]
        return [*given, *(more or ("--vary", "loss=dpo,ipo"))]

    return made


@pytest.fixture(scope="session")
def straight(arguments, tmp_path_factory) -> Straight:
    """Four runs, two losses and two seeds, without a stop."""
    from lit_dpo.tools.ablate import main

    folder = tmp_path_factory.mktemp("straight")
    root, counts = folder / "out", folder / "counts.txt"
    main(arguments(root, counts))
    return Straight(arguments, root, counts)
