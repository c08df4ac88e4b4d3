"""Faults from outside, for real: processes that are killed, and what is left of the run then."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

import ranks
import tiny
from lit_dpo.callbacks import LastCheckpoint, TrainingDynamics
from lit_dpo.callbacks.interrupts import HeldInterrupt
from lit_dpo.errors import TrainingError, explanation
from training import adapter, data, module, trainer


class Pace(Callback):
    """Says when a step was made, and gives the test time to do something; the rank that is to fail does."""

    def __init__(self, seconds: float = 0.1, fails: int = -1) -> None:
        self.seconds, self.fails = seconds, fails

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        print("step", trainer.global_step, flush=True)
        time.sleep(self.seconds)
        if trainer.global_step == 3 and trainer.global_rank == self.fails:
            raise TrainingError("This rank has found something.")


def _command(model: Path, pairs: Path, *more: str, fails: int = -1, seconds: float = 0.1) -> list[str]:
    return [
        "fit",
        f"--model.policy.model={model}",
        "--model.policy.quantization=none",
        f"--data.train={pairs}",
        "--data.batch_size=4",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=training.Unestimated",
        *("--trainer.callbacks+=test_faults.Pace", f"--trainer.callbacks.fails={fails}"),
        f"--trainer.callbacks.seconds={seconds}",
        *more,
    ]


def _two_ranks(command: list[str], folder: Path) -> list[ranks.Command]:
    """As under `torchrun`: something else starts each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    often = ["--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_n_steps=1"]
    variables = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    return [
        ranks.command(
            [*command, *often, "--trainer.devices=2", "--trainer.strategy=ddp"],
            log=folder / f"rank-{rank}",
            cwd=folder,
            environment=variables | {"LOCAL_RANK": str(rank), "RANK": str(rank)},
        )
        for rank in range(2)
    ]


def _wait_for(run: ranks.Command, text: str, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while text not in run.output():
        assert run.process.is_alive(), run.output()[-5000:]
        assert time.monotonic() < until, run.output()[-5000:]
        time.sleep(0.05)


def _ends(run: ranks.Command) -> str:
    """See that a run ends within seconds, with one sentence; return that."""
    begin = time.monotonic()
    assert run.wait(60) == 1, run.output()[-3000:]
    assert time.monotonic() - begin < 20  # on a busy machine
    said = run.output()
    assert "Traceback" not in said
    (sentence,) = re.findall(r"lit-dpo: error: (.*)", said)
    return str(sentence)


def _nothing_half_written(folder: Path) -> None:
    assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".old"))]
    assert not list(folder.glob("runs/*/adapter"))


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("way", ["killed 0", "fails 1"])
def test_a_rank_that_is_gone_ends_the_others(tiny_model, pairs_file, tmp_path, way):
    how, number = way.split()
    gone = int(number)
    both = _two_ranks(_command(tiny_model, pairs_file, fails=gone if how == "fails" else -1), tmp_path)
    if how == "killed":
        _wait_for(both[0], "step 2\n")
        os.kill(both[gone].pid, signal.SIGKILL)
    sentence = _ends(both[1 - gone])
    assert f"Rank {1 - gone} stops, since another one of the 2 ranks does not answer" in sentence
    if how == "fails":
        assert _ends(both[gone]) == "This rank has found something."
    assert both[gone].wait() == (1 if how == "fails" else -signal.SIGKILL)
    checkpoint = re.search(r"To go on, repeat the command with --ckpt_path (\S+)", sentence).group(1)
    assert torch.load(tmp_path / checkpoint, weights_only=True)["global_step"] >= 1, "whole"
    assert not list(tmp_path.glob("runs/*/adapter"))
    if how == "fails":  # a killed writer's temporary name goes with the next one's
        _nothing_half_written(tmp_path)


class Late(Callback):
    """Ctrl-C on one rank, when nothing is left to train and so no batch to wait for."""

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 1:
            signal.raise_signal(signal.SIGINT)


def _interrupted_late(model: Path, pairs: Path, folder: Path) -> str:
    given = {"strategy": "ddp", "devices": 2, "callbacks": [Late(), LastCheckpoint(), TrainingDynamics()]}
    try:
        trainer(folder, **given).fit(module(model), data(pairs))
    except BaseException as error:
        return f"{type(error).__name__} after {type(error.__context__).__name__}"
    return "ended"


def test_a_rank_that_is_interrupted_alone_asks_the_others_for_nothing(tiny_model, pairs_file, tmp_path):
    found = ranks.run(_interrupted_late, 2, tiny_model, pairs_file, tmp_path / "run", folder=tmp_path, seconds=60)
    assert found == ["ended", "SystemExit after KeyboardInterrupt"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_worker_that_is_killed_ends_the_run_and_nothing_is_lost(tiny_model, pairs_file, tmp_path, streaming):
    more = ["--data.num_workers=2", *(["--data.streaming=true", "--trainer.max_steps=6"] if streaming else [])]
    run = ranks.command(_command(tiny_model, pairs_file, *more), log=tmp_path / "log", cwd=tmp_path)
    _wait_for(run, "step 2\n")
    workers = [int(one) for one in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    os.kill(workers[-1], signal.SIGKILL)
    sentence = _ends(run)
    assert f"process {workers[-1]}: it is killed by signal: Killed. Most likely the system had no memory" in sentence
    assert "--ckpt_path runs/version_0/last.ckpt" in sentence
    _nothing_half_written(tmp_path)
    if not streaming:  # in another order
        again = _command(tiny_model, pairs_file, *more, "--ckpt_path=last", seconds=0)
        assert ranks.command(again, log=tmp_path / "log", cwd=tmp_path).wait() == 0
        assert (
            ranks.command(_command(tiny_model, pairs_file, seconds=0), log=tmp_path / "log", cwd=tmp_path).wait() == 0
        )
        found, straight = (_adapter(tmp_path / "runs" / f"version_{number}") for number in (1, 2))
        assert all(torch.equal(found[name], tensor) for name, tensor in straight.items())


class Halfway(torch.optim.Optimizer):
    """Gradient descent that somebody stops with Ctrl-C when half of the weights have moved."""

    def __init__(self, params: Any, lr: float = 0.5, at: int = 0) -> None:
        super().__init__(params, {"lr": lr})
        self.at, self.steps = at, 0

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        self.steps += 1
        parameters = self.param_groups[0]["params"]
        for number, parameter in enumerate(parameters):
            if self.steps == self.at and number == len(parameters) // 2:
                signal.raise_signal(signal.SIGINT)
            parameter.data.add_(parameter.grad, alpha=-self.param_groups[0]["lr"])
        return loss


class Counts(Callback):
    """Counts optimizer steps, and keeps the count in checkpoints."""

    seen = 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen = trainer.global_step

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}


class Fails(Callback):
    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 4:
            raise TrainingError("Now.")


def test_a_checkpoint_of_a_step_holds_what_each_callback_has_counted_of_it(tiny_model, pairs_file, tmp_path):
    run = trainer(tmp_path, callbacks=[LastCheckpoint(every_n_steps=4), Counts(), Fails()])
    with pytest.raises(TrainingError, match="Now"):
        run.fit(module(tiny_model), data(pairs_file))
    found = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert (found["global_step"], found["callbacks"]["Counts"]) == (4, {"seen": 4})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_interrupt_within_an_optimizer_step_waits_for_its_end(tiny_model, pairs_file, tmp_path, accumulate):
    def fit(at: int = 0, **given: Any) -> dict[str, torch.Tensor]:
        dpo = module(tiny_model, optimizer=functools.partial(Halfway, at=at))
        run = trainer(tmp_path, callbacks=[LastCheckpoint(), counts := Counts()], accumulate_grad_batches=accumulate)
        try:
            run.fit(dpo, data(pairs_file), **given)
        except SystemExit:
            assert run.global_step == counts.seen == at == 2, "no callback is cut short"
        return adapter(dpo)

    before = signal.getsignal(signal.SIGINT)
    straight, _ = fit(), fit(at=2)
    signal.signal(signal.SIGINT, before)  # Lightning has it ignored from there on
    resumed = fit(ckpt_path=tmp_path / "last.ckpt")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


class _Fails(Callback):
    """Something from outside, after two steps, when the folder for checkpoints is gone too; or in validation."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2 and self.folder is not None:
            shutil.rmtree(self.folder)
            self.folder.write_text("a file in its place")
            raise MemoryError("no more")

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        raise MemoryError("no more")


def test_a_fault_is_what_is_raised_where_no_checkpoint_of_it_can_be_written(tiny_model, pairs_file, tmp_path):
    """Nor is there one from before; and in validation there is nothing to go on with."""
    keeper, dpo = LastCheckpoint(directory=str(tmp_path / "kept")), module(tiny_model)
    run = trainer(tmp_path, callbacks=[keeper, _Fails(tmp_path / "kept")])
    with tiny.records("lit_dpo.callbacks.faults") as lines, pytest.raises(MemoryError, match="no more") as refused:
        run.fit(dpo, data(pairs_file))
    assert [line.getMessage().partition(":")[0] for line in lines] == ["No checkpoint of this moment could be written"]
    assert "There is no checkpoint of this run yet" in explanation(refused.value)
    with pytest.raises(MemoryError) as refused:
        trainer(tmp_path, callbacks=[_Fails()]).validate(dpo, data(pairs_file, val=str(pairs_file)), verbose=False)
    assert "MemoryError: no more" in explanation(refused.value)
    assert "ckpt_path" not in explanation(refused.value)
    assert "no checkpoint" not in explanation(refused.value)


def test_a_second_interrupt_does_not_wait():
    held = HeldInterrupt()
    held.hold()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    held.let_go(forget=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
