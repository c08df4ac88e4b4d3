"""Runs that start together have a directory each."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lit_dpo.callbacks.export import claim_versions
from lit_dpo.errors import TrainingError
from training import data, module, trainer


def test_commands_that_start_at_once_each_leave_a_whole_run(tiny_model, pairs_file, tmp_path):
    command = [
        *(sys.executable, "-m", "lit_dpo", "fit"),
        f"--model.policy.model={tiny_model}",
        "--model.policy.quantization=none",
        f"--data.train={pairs_file}",
        *("--trainer.accelerator=cpu", "--trainer.max_steps=1", "--trainer.enable_progress_bar=false"),
    ]
    runs = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], said
    found = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in found] == ["version_0", "version_1", "version_2"]
    for run in found:
        assert (run / "adapter" / "adapter_model.safetensors").is_file()
        assert (run / "config.yaml").is_file()
        assert len(list(run.glob("events.out.tfevents.*"))) == 1
        assert len(list(run.glob("checkpoints/*.ckpt"))) == 1


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_loggers_that_are_asked_at_once_have_a_number_each(tmp_path, kind):
    loggers, together = [kind(tmp_path, name="here") for _ in range(8)], Barrier(8)
    claim_versions(SimpleNamespace(loggers=loggers, is_global_zero=True))

    def ask(logger) -> int:
        together.wait()
        return logger.version

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(ask, loggers)) == list(range(8))
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == [f"version_{n}" for n in range(8)]


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_lightning_has_the_name_that_numbers_runs(kind):
    assert callable(kind._get_next_version)


def test_a_trainer_in_python_claims_too_and_a_number_that_is_given_stays(tiny_model, pairs_file, tmp_path):
    mine, given = CSVLogger(tmp_path, name=""), TensorBoardLogger(tmp_path, name="", version=7)
    (tmp_path / "version_0").mkdir()
    trainer(tmp_path, logger=[mine, given], max_steps=1).fit(module(tiny_model), data(pairs_file))
    assert (mine.version, given.version) == (1, 7)
    assert {path.name for path in tmp_path.iterdir()} >= {"version_0", "version_1", "version_7"}
    assert (tmp_path / "version_1" / "metrics.csv").is_file()


def test_a_place_that_takes_no_directory_is_named(tmp_path):
    (tmp_path / "runs").write_text("a file")
    logger = TensorBoardLogger(tmp_path / "runs", name="")
    claim_versions(SimpleNamespace(loggers=[logger], is_global_zero=True))
    with pytest.raises(TrainingError, match=f"Cannot write to {tmp_path}/runs"):
        assert logger.version
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at all")
    logger = CSVLogger(tmp_path / "link", name="")
    claim_versions(SimpleNamespace(loggers=[logger], is_global_zero=True))
    with pytest.raises(TrainingError, match="Cannot write to"):
        assert logger.version
