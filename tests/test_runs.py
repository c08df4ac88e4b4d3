"""Runs that start together have a directory each."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import ranks
from lit_dpo.callbacks import LastCheckpoint
from lit_dpo.callbacks.export import _unused, claim_versions, unnumbered
from lit_dpo.errors import TrainingError
from lit_dpo.writing import written_whole
from test_writing import _read_only
from training import data, module, trainer


def test_commands_that_start_at_once_each_leave_a_whole_run(tiny_model, pairs_file, tmp_path):
    command = [
        "fit",
        f"--model.policy.model={tiny_model}",
        "--model.policy.quantization=none",
        f"--data.train={pairs_file}",
        *("--trainer.accelerator=cpu", "--trainer.max_steps=1", "--trainer.enable_progress_bar=false"),
    ]
    runs = [ranks.command(command, log=tmp_path / f"log-{number}.txt", cwd=tmp_path) for number in range(2)]
    assert [run.wait() for run in runs] == [0, 0], [run.output() for run in runs]
    found = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in found] == ["version_0", "version_1"]
    for run in found:
        assert (run / "adapter" / "adapter_model.safetensors").is_file()
        assert (run / "config.yaml").is_file()
        assert len(list(run.glob("events.out.tfevents.*"))) == 1
        assert len(list(run.glob("checkpoints/*.ckpt"))) == 1


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_loggers_that_are_asked_at_once_have_a_number_each(tmp_path, kind):
    loggers, together = [kind(tmp_path, name="here") for _ in range(8)], Barrier(8)
    assert unnumbered(SimpleNamespace(loggers=loggers)) == loggers
    assert {logger.version for logger in loggers} == {0}  # Lightning asks before there is data

    def ask(logger) -> int:
        together.wait()
        claim_versions([logger])
        return logger.version

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(ask, loggers)) == list(range(8))
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == [f"version_{n}" for n in range(8)]


def test_adapters_of_runs_without_a_directory_of_their_own_have_a_name_each(tmp_path):
    together = Barrier(8)

    def name(_) -> str:
        together.wait()
        return _unused(tmp_path / "adapter").name

    with ThreadPoolExecutor(8) as pool:
        found = sorted(pool.map(name, range(8)))
    assert found == ["adapter", *(f"adapter-{number}" for number in range(1, 8))]


def test_a_trainer_in_python_claims_too_and_a_number_that_is_given_stays(tiny_model, pairs_file, tmp_path):
    mine, given = CSVLogger(tmp_path, name=""), TensorBoardLogger(tmp_path, name="", version=7)
    (tmp_path / "version_0").mkdir()
    trainer(tmp_path, logger=[mine, given], max_steps=1).fit(module(tiny_model), data(pairs_file))
    assert (mine.version, given.version) == (1, 7)
    assert {path.name for path in tmp_path.iterdir()} >= {"version_0", "version_1", "version_7"}
    assert (tmp_path / "version_1" / "metrics.csv").is_file()


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_a_place_that_takes_no_directory_is_named(tmp_path, kind):
    (tmp_path / "runs").write_text("a file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at all")
    for place in ("runs", "link"):
        with pytest.raises(TrainingError, match=f"Cannot write to {tmp_path}/{place}"):
            claim_versions([kind(tmp_path / place, name="")])


def test_a_disk_that_takes_no_run_is_said_before_weights_load(tiny_model, pairs_file, tmp_path):
    with _read_only(tmp_path / "disk") as folder:
        dpo = module(tiny_model)
        run = trainer(tmp_path, logger=TensorBoardLogger(folder, name=""), max_steps=1)
        with pytest.raises(TrainingError, match="read-only: name another place"):
            run.fit(dpo, data(pairs_file))
        assert dpo.model is None


def _fit_in(model, pairs, root, version: int) -> None:
    waits = Waits(root / "go")
    run = trainer(root, logger=TensorBoardLogger(root, name="", version=version), callbacks=[LastCheckpoint(), waits])
    run.fit(module(model), data(pairs))


class Waits(Callback):
    """Stops after the first step until a file is there."""

    def __init__(self, path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, *_) -> None:
        (self.path.parent / "begun").touch()
        while not self.path.exists():
            time.sleep(0.05)


def test_of_two_runs_in_one_directory_the_second_stops_and_spoils_nothing(tiny_model, pairs_file, tmp_path):
    """Though somebody gave both the same number; one that was killed is in nobody's way."""
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ranks.run, _fit_in, 1, tiny_model, pairs_file, tmp_path, 3, folder=tmp_path / "logs")
        while not (tmp_path / "begun").exists():
            assert not first.done(), first.result()
            time.sleep(0.05)
        before = sorted((tmp_path / "version_3").rglob("*"))
        with pytest.raises(TrainingError, match=r"another process trains in .*version_3: let the logger number it"):
            _fit_in(tiny_model, pairs_file, tmp_path, 3)
        assert sorted((tmp_path / "version_3").rglob("*")) == before
        (tmp_path / "go").touch()
        first.result()
    assert (tmp_path / "version_3" / "last.ckpt").is_file()
    _fit_in(tiny_model, pairs_file, tmp_path, 3)


def test_of_two_that_write_one_folder_the_first_that_is_ready_has_it(tmp_path):
    def write(text: str, meanwhile=lambda: None) -> None:
        with written_whole(tmp_path / "out", new=True) as fresh:
            fresh.mkdir()
            (fresh / "file").write_text(text)
            meanwhile()

    def quick() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("quick")

    with pytest.raises(TrainingError, match="another process has made it meanwhile, which was left as it is"):
        write("slow", quick)
    assert (tmp_path / "out" / "file").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    shutil.rmtree(tmp_path / "out")
    write("alone")
    assert (tmp_path / "out" / "file").read_text() == "alone"
