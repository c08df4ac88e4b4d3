"""A base in shards trains as a whole one does: on two ranks as on one, whatever is different between the ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sharded import runs

import ranks

CASES = ["nf4", "kl", "coupled", "lists"]


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model with a head of its own, and one whose head is its embedding."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tied = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(tiny_model, tied)
    config = AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tied)
    return {"untied": tiny_model, "tied": tied}


@pytest.fixture(scope="module")
def files(pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pairs of unequal lengths, some of which are longer than a micro-batch: 21, 13, 10, and 5 that are held out."""
    lines = pairs_file.read_text().splitlines(keepends=True)
    folder = tmp_path_factory.mktemp("files")
    found = {name: folder / f"{name}.jsonl" for name in ("all", "rows", "half", "held out", "lists")}
    for name, count in (("all", 21), ("rows", 13), ("half", 10)):
        found[name].write_text("".join(lines[:count]))
    other = [json.dumps({**json.loads(line), "prompt": f"And {number}?"}) + "\n" for number, line in enumerate(lines)]
    found["held out"].write_text("".join(other[:5]))
    ranked = [
        {"prompt": f"Say {number}!", "completions": [letter * 25 for letter in "abcd"], "scores": [4, 3, 2, number / 9]}
        for number in range(5)
    ]
    found["lists"].write_text("".join(json.dumps(row) + "\n" for row in ranked))
    return found


@pytest.fixture(scope="module")
def one(files: dict[str, Path], models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("one")
    ranks.run(runs, 1, folder, files, models, ["fill"], "none", folder=folder / "logs")
    for run in ("nf4-none-1", "nf4-all-2"):
        shutil.copytree(folder / "fill-none-1" / "cache", folder / run / "cache")
    (found,) = ranks.run(runs, 1, folder, files, models, ["first", *CASES, "both"], "none", folder=folder / "logs")
    return found, folder


@pytest.fixture(scope="module")
def two(one: Any, files: dict[str, Path], models: dict[str, Path]) -> list[Any]:
    folder = one[1]
    cases = [*CASES, "first", "second"]
    return ranks.run(runs, 2, folder, files, models, cases, "all", folder=folder / "logs-2", seconds=200)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_with_a_part_each_train_what_one_with_all_of_it_does(case: str, one: Any, two: list[Any]) -> None:
    alone, parts = one[0][case], [rank[case] for rank in two]
    for rank in parts:
        for name, expected in alone["adapter"].items():
            assert np.abs(rank["adapter"][name] - expected).max() < 2e-5, name
        assert rank["measured"].keys() == alone["measured"].keys()
        for name, value in alone["measured"].items():
            assert rank["measured"][name] == pytest.approx(value, abs=2e-5), name
        assert rank["held"] < 0.52 * alone["held"]
        assert rank["flat"]
    assert parts[0]["texts"] == alone["texts"]


def test_a_run_goes_on_with_another_number_of_parts(
    one: Any, two: list[Any], files: dict[str, Path], models: dict[str, Path]
) -> None:
    straight, folder = one
    (back,) = ranks.run(runs, 1, folder, files, models, ["second"], "all", folder=folder / "logs")
    for went_on in (two[0]["second"], two[1]["second"], back["second"]):
        for name, expected in straight["both"]["adapter"].items():
            assert np.abs(went_on["adapter"][name] - expected).max() < 2e-5, name


def test_each_of_two_nodes_holds_the_base_once(one: Any, files: dict[str, Path], models: dict[str, Path]) -> None:
    straight, folder = one
    found = ranks.run(runs, 4, folder, files, models, ["first"], "node", folder=folder / "logs-4", seconds=200)
    for rank in found:
        assert rank["first"]["held"] < 0.52 * straight["first"]["held"]
        for name, expected in straight["first"]["adapter"].items():
            assert np.abs(rank["first"]["adapter"][name] - expected).max() < 2e-5, name
