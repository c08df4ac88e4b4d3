"""`lit-dpo fork`, as a user types it: arms from one checkpoint, of which the control is the run itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lit_dpo.callbacks import ExactResume
from lit_dpo.cli import main
from lit_dpo.errors import LitDPOError
from lit_dpo.losses import BCOLoss, BetaDPOLoss
from lit_dpo.tools.fork import check_changes, found, options_in
from training import data, module, trainer

STEP = 3  # inside the first epoch of six


@pytest.fixture(scope="module")
def run(tiny_model, pairs_file, tmp_path_factory):
    """A run of two epochs, with a checkpoint every three steps, and dropout."""
    folder = tmp_path_factory.mktemp("whole")
    main(
        [
            *("fit", f"--model.policy.model={tiny_model}", "--model.policy.quantization=none"),
            *("--model.policy.dropout=0.1", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-2"),
            *("--model.lr_scheduler=linear", f"--data.train={pairs_file}", f"--data.val={pairs_file}"),
            *("--data.batch_size=4", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"),
            *("--trainer.enable_progress_bar=false", f"--trainer.logger.save_dir={folder}"),
            *("--trainer.callbacks+=TrainingDynamics", "--trainer.callbacks+=ModelCheckpoint"),
            *("--trainer.callbacks.every_n_train_steps=3", "--trainer.callbacks.save_top_k=-1"),
        ]
    )
    return folder / "version_0"


@pytest.fixture(scope="module")
def forked(run):
    """An arm and the control."""
    main(["fork", f"{run}@{STEP}", "--vary", "loss=ipo", "--model.optimizer.lr", "5e-3", "--completions", "0"])
    return run / f"fork-{STEP}"


class Memory(Callback):
    """What a loss remembers when training begins."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.first = pl_module.loss_state.clone()


@pytest.fixture(scope="module")
def remembered(tiny_model, pairs_file, tmp_path_factory):
    """A checkpoint of a loss with a memory, and that."""
    folder = tmp_path_factory.mktemp("remembered")
    dpo = module(tiny_model, loss=BCOLoss())
    run = trainer(folder, max_steps=2)
    run.fit(dpo, data(pairs_file))
    run.save_checkpoint(folder / "two.ckpt")
    assert dpo.loss_state.abs().min() > 0
    return folder / "two.ckpt", dpo.loss_state.clone()


def arm(folder: Path, start: str) -> Path:
    (there,) = (one for one in (folder / "runs").iterdir() if one.name.startswith(start))
    return there


def dynamics(folder: Path) -> Any:
    return pq.read_table(folder / "dynamics.parquet").to_pandas()


def test_the_control_is_the_run_to_the_bit(run, forked):
    for file in ("adapter/adapter_model.safetensors", "dynamics.parquet"):
        assert (arm(forked, "control") / file).read_bytes() == (run / file).read_bytes()


def test_an_arm_sees_the_runs_batches_and_becomes_something_else(run, forked):
    whole, other = dynamics(run), dynamics(arm(forked, "loss=ipo"))
    assert whole[["epoch", "step", "index"]].equals(other[["epoch", "step", "index"]])
    before = whole.step < STEP
    assert whole[before].equals(other[before])
    first = whole.step == STEP  # the weights are the same there, the loss is another
    assert np.array_equal(whole.margin[first], other.margin[first])
    assert not np.allclose(whole.loss[first], other.loss[first])
    assert not np.allclose(whole.margin[whole.step > STEP], other.margin[whole.step > STEP])
    weights = "adapter/adapter_model.safetensors"
    assert (arm(forked, "loss=ipo") / weights).read_bytes() != (run / weights).read_bytes()


def test_all_arms_are_compared(forked):
    results = {one.name: json.loads((one / "result.json").read_text()) for one in (forked / "runs").iterdir()}
    assert {result["status"] for result in results.values()} == {"done"}
    assert {result["steps"] for result in results.values()} == {12}
    assert sorted(name.partition(",")[0] for name in results) == ["control", "loss=ipo"]
    assert (forked / "report.html").is_file()


def test_what_of_the_data_changes_no_batch_may_change_and_numbers_are_looked_at(capsys):
    check_changes(["data.val", "data.val.a", "data.eval_batch_size", "data.num_workers", "model.loss"])
    for wrong, said in ((["--jobs", "0"], "but got 0 and 32"), (["--jobs", "two"], "invalid int"), (["x", "y"], "'x'")):
        with pytest.raises(SystemExit) as stopped:
            main(["fork", "run@last", *wrong])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


def test_steps_that_are_not_there_are_said_with_those_that_are(run, tmp_path):
    assert found(f"{run}@last").step == 12
    with pytest.raises(LitDPOError, match=r"step 4 .* those of step 3, 6, 9, 12\. .*every_n_train_steps"):
        found(f"{run}@4")
    for text in ("nothing", "@3", f"{run}@", f"{run}@first"):
        with pytest.raises(LitDPOError, match="Expected RUN@STEP"):
            found(text)
    with pytest.raises(LitDPOError, match="directory of a run"):
        found(f"{tmp_path}@3")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--data.batch_size=8"], "`data.batch_size` cannot change at a fork: the arms would not see the batches"),
        (["--vary", "model.policy.r=4,8"], "`model.policy.r` cannot change at a fork: the checkpoint's adapter"),
        (["--trainer.accumulate_grad_batches", "2"], "`trainer.accumulate_grad_batches` cannot change"),
        (["--seed_everything=1"], "`seed_everything` cannot change"),
        ([], "Expected what the arms differ in"),
        (["--vary", "loss=ip"], "Near it: ipo"),
    ],
)
def test_what_cannot_change_is_refused_by_name(run, typed, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fork", f"{run}@{STEP}", *typed])
    assert ended.value.code == 1
    assert said in capsys.readouterr().err
    assert not (run / "fork-9").exists()


def test_a_run_that_is_at_its_end_has_nothing_to_compare(run, capsys):
    with pytest.raises(SystemExit):
        main(["fork", f"{run}@last", "--model.loss=IPOLoss"])
    assert "Expected steps after step 12 but the run ends there" in capsys.readouterr().err


@pytest.mark.parametrize(("loss", "goes_on"), [(BCOLoss(beta=0.2), True), (BetaDPOLoss(beta=0.2), False)])
def test_a_loss_of_another_class_begins_with_a_memory_of_its_own(
    tiny_model, pairs_file, remembered, tmp_path, loss, goes_on
):
    """Both memories are two numbers, which mean something else."""
    file, memory = remembered
    seen = Memory()
    run = trainer(tmp_path, max_steps=3, callbacks=[seen, ExactResume(changes="accept")])
    run.fit(module(tiny_model, loss=loss), data(pairs_file), ckpt_path=file)
    assert torch.equal(seen.first, memory if goes_on else torch.zeros(2, dtype=torch.float64))


def test_options_are_read_as_they_are_typed(capsys):
    assert options_in(["--a.b", "-1", "--c=--d"]) == {"a.b": "-1", "c": "--d"}
    for wrong in (["loose"], ["--a"], ["--a", "--b=1"]):
        with pytest.raises(SystemExit):
            options_in(wrong)
