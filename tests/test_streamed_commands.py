"""Streams and mixtures as they are typed: from files, with a schedule and a plan; `test_hub.py` streams from a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_dpo.cli import main

ROWS = [{"prompt": f"is {i} so?", "chosen": " yes", "rejected": " no" * (1 + i % 3)} for i in range(21)]


def _lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def fit(tiny_model, pairs_file, tmp_path, monkeypatch):
    """The arguments of a run over a stream."""
    monkeypatch.chdir(tmp_path)
    return [
        "fit",
        f"--model.policy.model={tiny_model}",
        "--model.policy.quantization=none",
        f"--data.train={pairs_file}",
        "--data.streaming=true",
        "--data.batch_size=4",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]


def _error(capsys, *arguments) -> str:
    with pytest.raises(SystemExit):
        main([*arguments])
    return capsys.readouterr().err


def _steps(folder: Path) -> list[int]:
    """Of each run."""
    return [int(file.stem.split("step=")[1]) for file in sorted(folder.glob("runs/*/checkpoints/epoch*.ckpt"))]


def test_a_falling_rate_needs_to_know_the_end_of_a_stream(fit, tmp_path, capsys):
    assert "Expected `max_epochs` (with data of a known length) or `max_steps`" in _error(
        capsys, *fit, "--trainer.max_epochs=1"
    )
    main([*fit, "--model.warmup_ratio=0.5", "--trainer.max_steps=4", "--trainer.log_every_n_steps=1"])
    assert _steps(tmp_path) == [4]


def test_a_stream_cannot_be_planned(fit, capsys):
    assert "`--data.streaming false`" in _error(capsys, *fit, "--trainer.max_steps=4", "--plan")


def test_a_mixture_is_typed_in_a_file_and_on_the_command_line(fit, pairs_file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_bytes(_lines(ROWS[:7]))
    weights = {str(pairs_file): 3.0, str(other): 1.0}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"data": {"train": weights}}))
    fit = [one for one in fit if not one.startswith(("--data.train", "--data.streaming"))]
    for typed in (["--config", str(tmp_path / "mixture.yaml")], [f"--data.train={json.dumps(weights)}"]):
        main([*fit, *typed, "--trainer.max_epochs=1"])
    assert _steps(tmp_path) == [7, 7]  # an epoch of 28 prompts, so that each of 21 and 7 comes
    saved = yaml.safe_load((tmp_path / "runs" / "version_1" / "config.yaml").read_text())
    assert saved["data"]["init_args"]["train"] == weights


def test_memory_is_flat_over_200000_rows():
    """31 MiB of rows are read, and 6400 of them batched, within 8 MiB; a block of 2000 rows has been there before."""
    script = Path(__file__).parent / "data" / "stream_memory.py"
    path = os.pathsep.join(
        [*map(str, (Path(__file__).parent, Path(__file__).parents[1] / "src")), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, str(script), "200000", "6400"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["file"][0] > 30
    for name in ("read", "batched"):
        middle, end = found[name]
        assert end - middle < 8, found
