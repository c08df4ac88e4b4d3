"""Runs of an ablation share what is the same, and a kill of everything changes no digit."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from lit_dpo.cli import main as command
from lit_dpo.errors import AblationError
from lit_dpo.tools.ablate import main, run
from lit_dpo.tools.ablate.axes import grid, typed
from lit_dpo.tools.ablate.preparing import Options
from lit_dpo.tools.ablate.records import Layout
from lit_dpo.tools.ablate.running import differences, run_all
from lit_dpo.tools.ablate.single import read_result

NAMES = [f"loss={loss},seed={seed}" for loss in ("dpo", "ipo") for seed in (1, 2)]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_runs_of_a_seed_see_the_same_and_others_do_not(straight):
    layout = Layout(straight.root)
    for name in ("order.txt", "start.txt"):
        seen = {one: (layout.run(one) / name).read_text() for one in NAMES}
        assert seen["loss=dpo,seed=1"] == seen["loss=ipo,seed=1"] != seen["loss=dpo,seed=2"] == seen["loss=ipo,seed=2"]


def test_the_reference_computes_each_completion_once_in_all(straight):
    counted = sum(int(line) for line in straight.counts.read_text().split())
    assert counted == 42  # 21 pairs; training and validation are the same


def test_each_run_leaves_what_fit_leaves_and_its_result_last(straight):
    layout = Layout(straight.root)
    losses = {"loss/dpo", "loss/ipo", "weight/dpo", "weight/ipo"}
    for name in NAMES:
        folder = layout.run(name)
        there = {path.name for path in folder.iterdir()}
        assert {
            "config.yaml",
            "environment.json",
            "last.ckpt",
            "adapter",
            "log.txt",
            "pairs.parquet",
            "result.json",
        } <= there
        assert any(one.startswith("events.out.tfevents") for one in there)
        result = read_result(folder)
        assert result is not None
        assert (result.status, result.steps, len(result.completions)) == ("done", 12, 2)
        assert result.seconds > 0
        assert [row["tokens"] for row in result.curves] == sorted(row["tokens"] for row in result.curves)
        assert result.curves[-1]["tokens"] == result.tokens
        assert max(path.stat().st_mtime_ns for path in folder.iterdir()) == (folder / "result.json").stat().st_mtime_ns
        pairs = pq.read_table(folder / "pairs.parquet")
        assert losses <= set(pairs.column_names)
        assert len(pairs) == 21


def test_a_run_is_that_of_fit_to_the_bit(straight, tmp_path):
    """Though it was the third of its process, on a base that two others had before."""
    folder = Layout(straight.root).run("loss=ipo,seed=1")
    command(["fit", "--config", str(folder / "config.yaml"), "--trainer.logger.save_dir", str(tmp_path)])
    assert equal(adapter(folder), adapter(tmp_path / "version_0"))


def _killed(arguments: list[str], root: Path) -> None:
    """Run an ablation in a process group of its own, and kill all of it inside the second run."""

    def work() -> None:
        os.setsid()
        main(arguments)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    second = Layout(root).run(NAMES[1])
    while len(_seen(second)) < 7:
        assert process.is_alive()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert read_result(Layout(root).run(NAMES[0])) is not None
    assert read_result(second) is None


def _seen(folder: Path) -> list[str]:
    """The rows of each batch."""
    path = folder / "order.txt"
    return path.read_text().splitlines() if path.is_file() else []


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_killed_and_started_again_it_is_the_same_to_the_last_digit(straight, tmp_path):
    root, counts = tmp_path / "out", tmp_path / "counts.txt"
    (held := tmp_path / "held").touch()
    given = straight.arguments(root, counts, held=str(held))
    _killed(given, root)
    held.unlink()
    first = Layout(root).run(NAMES[0]) / "result.json"
    before = first.stat().st_mtime_ns
    main(given)
    assert first.stat().st_mtime_ns == before  # it is kept
    for name in NAMES:
        folders = [Layout(one).run(name) for one in (root, straight.root)]
        tables = [pq.read_table(folder / "pairs.parquet") for folder in folders]
        assert tables[0].equals(tables[1]), name
        assert equal(*(adapter(folder) for folder in folders))
        curves = [_without_cost(folder) for folder in folders]
        assert curves[0] == curves[1]
    second, whole = _seen(Layout(root).run(NAMES[1])), _seen(Layout(straight.root).run(NAMES[1]))
    assert second == whole[:7] + whole[6:]  # it went on from its first epoch, and did not begin again
    assert sum(map(int, counts.read_text().split())) == 42
    for name in ("pairs.parquet", "pairs.csv", "comparisons.csv"):
        assert (root / name).read_bytes() == (straight.root / name).read_bytes()


def _without_cost(folder: Path) -> list[dict[str, float]]:
    result = read_result(folder)
    assert result is not None
    cost = ("seconds", "memory", "per_second", "data_wait")
    return [
        {name: value for name, value in row.items() if not any(word in name for word in cost)} for row in result.curves
    ]


def test_failures_and_deaths_cost_their_runs_alone(straight, tmp_path):
    """One run raises, the process of another is killed, twice; the third is done, and the status says it."""
    root = tmp_path / "out"
    given = straight.arguments(
        root, tmp_path / "counts.txt", "--vary", "loss=dpo", "--trainer.max_epochs", "1", fails=1, dies=2
    )
    given[given.index("--seeds") + 1] = "1,3,2"
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 1
    raised, killed, done = (read_result(Layout(root).run(f"loss=dpo,seed={seed}")) for seed in (1, 2, 3))
    assert raised is not None
    assert killed is not None
    assert done is not None
    assert (raised.status, killed.status, done.status) == ("failed", "failed", "done")
    assert raised.error == "ArithmeticError: planted"
    assert "SIGKILL" in killed.error
    assert "planted" in (root / "report.html").read_text()


def test_runs_that_are_done_are_not_made_again(straight, caplog):
    """No process starts for them."""
    caplog.set_level(logging.INFO)
    layout = Layout(straight.root)
    file = straight.arguments(straight.root, straight.counts)[1]
    asked = grid([typed("loss=dpo,ipo")], [1, 2], [f"--config={file}"], of_data=True)
    before = [read_result(layout.run(one.name)) for one in asked]
    assert run_all(asked, layout, jobs=1, options=Options(completions=2)) == before
    assert "4 of 4 runs are done already." in caplog.text


def test_another_command_into_the_folder_is_refused(straight):
    given = straight.arguments(straight.root, straight.counts, "--vary", "loss=dpo")
    with pytest.raises(AblationError, match="there was loss=ipo,seed=1, loss=ipo,seed=2"):
        main(given)


def test_what_differs_is_named_as_it_is_typed():
    before = {"a": "model:\n  class_path: M\n  init_args:\n    policy: {r: 4}\n"}
    assert differences(before, before) == ""
    now = {"a": before["a"].replace("4", "8")}
    assert differences(before, now) == "`model.policy.r` was 4 and is 8 (in a)"
    assert differences(before, {**before, "b": ""}) == "was no b"


def test_a_sweeper_gets_numbers(straight, tmp_path):
    given = straight.arguments(tmp_path, tmp_path / "counts.txt")
    config = {"config": given[1], "model.loss": "IPOLoss", "model": {"loss": {"beta": 0.5}}, "trainer.max_epochs": 1}
    found = run(config, tmp_path / "run")
    assert all(isinstance(value, float) for value in found.values())
    assert {"val/loss", "val/reward_accuracy", "seconds", "tokens", "steps"} <= found.keys()
    assert found["steps"] == 6
    assert json.dumps(found)
    assert (tmp_path / "run" / "config.yaml").is_file()
