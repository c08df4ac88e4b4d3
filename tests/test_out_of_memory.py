"""Memory that runs out for real, by the system's limit: explained, or survived by a run that is the same."""

from __future__ import annotations

import errno
import functools
import re
import resource
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

import ranks
import tiny
from lit_dpo import DPOModule
from lit_dpo.callbacks import OutOfMemory
from lit_dpo.errors import TrainingError, explanation
from lit_dpo.losses import BCOLoss
from lit_dpo.memory.room import is_out_of_memory
from training import Trace, adapter, data, module, trainer

MIB = 2**20
ROOM = 300 * MIB  # at 2 MiB for each token: enough for half a batch


class Hungry(DPOModule):
    """Takes much memory for each token, from the allocator that all tensors are from."""

    couples_pairs = False

    def forward(self, batch: Any) -> Any:
        scored = super().forward(batch)  # masks have been drawn, and a loss has remembered, when there is no more
        if torch.is_grad_enabled() or not self.model.training:
            torch.empty(2 * batch.input_ids.shape[1] * MIB // 4)
        return scored


@contextmanager
def little_room(room: int = ROOM) -> Any:
    """Let this process have no more than this on top of what it has."""
    size = int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Limit(Callback):
    """Makes the room little from a batch on; or lowers `microbatch_tokens` there, as if somebody had known."""

    def __init__(self, batch: int = 2, tokens: int | None = None, room: int = ROOM) -> None:
        self.batch, self.tokens, self.room = batch, tokens, room
        self.limit: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and self.tokens:
            pl_module.microbatch_tokens = self.tokens
        elif batch_idx == self.batch and self.limit is None:
            self.limit = little_room(self.room)
            self.limit.__enter__()

    def _lift(self, *_: Any) -> None:
        if self.limit is not None:
            self.limit.__exit__(None, None, None)
            self.limit = None

    on_train_end = on_exception = _lift


def _fit(
    model, pairs, root, *callbacks, halvings=1, dropout=0.0, loss=None, accumulate=1, ckpt_path=None, epochs=1, **given
):
    sgd = functools.partial(torch.optim.SGD, lr=0.5)
    policy = {"dropout": dropout}
    dpo = module(model, kind=Hungry, policy=policy, optimizer=sgd, **({"loss": loss} if loss else {}), **given)
    trace = Trace()
    run = trainer(
        root,
        callbacks=[*callbacks, trace, OutOfMemory(halvings)],
        accumulate_grad_batches=accumulate,
        log_every_n_steps=50,
        max_epochs=epochs,
    )
    run.fit(dpo, data(pairs), ckpt_path=ckpt_path)
    measured = {name: float(value) for name, value in run.callback_metrics.items()}
    return {"adapter": adapter(dpo), "measured": measured, "losses": trace.losses, "rows": trace.rows,
            "state": None if dpo.loss_state is None else dpo.loss_state.clone(), "run": run, "dpo": dpo}  # fmt: skip


def _same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 0.0) -> None:
    assert one["rows"] == other["rows"]
    assert one["losses"] == pytest.approx(other["losses"], abs=tolerance)
    assert one["measured"] == pytest.approx(other["measured"], abs=tolerance)
    for name, tensor in one["adapter"].items():
        torch.testing.assert_close(tensor, other["adapter"][name], rtol=0, atol=tolerance)
    if one["state"] is not None:
        torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=tolerance)


def survives(model: Path, pairs: Path, root: Path) -> None:
    """In a process of its own: the run that ran out is the one that had the smaller size from there on, to the bit."""
    stateful = {"dropout": 0.1, "loss": BCOLoss(), "accumulate": 2, "microbatch_tokens": 120}
    for number, (room, given) in enumerate(((160 * MIB, stateful), (ROOM, {}))):
        with tiny.records("lit_dpo.callbacks.out_of_memory") as lines:
            found = _fit(model, pairs, root, Limit(batch=3, room=room), **given)
        (line,) = [one.getMessage() for one in lines]
        size = found["dpo"].microbatch_tokens
        assert f"`microbatch_tokens` is {size} from here on, and the batch is computed again" in line
        assert f"in a micro-batch of {2 * size} tokens" in line or f"of {2 * size + 1} tokens" in line
        _same(found, _fit(model, pairs, root, Limit(batch=3, tokens=size), **given))
        if number == 0:  # whoever goes on from its checkpoint has its size
            found["run"].save_checkpoint(root / "found.ckpt")
            saved = torch.load(root / "found.ckpt", weights_only=True)
            assert saved["callbacks"]["OutOfMemory"] == {"microbatch_tokens": size}
            more = _fit(model, pairs, root, ckpt_path=root / "found.ckpt", epochs=2, **given)
            assert more["dpo"].microbatch_tokens == size
        else:  # without dropout the size is rounding alone
            _same(found, _fit(model, pairs, root, halvings=0, microbatch_tokens=size), 1e-5)


def stops(model: Path, pairs: Path, root: Path) -> None:
    """One prompt alone is too large; and evaluation that is too large is measured in smaller pieces."""
    with pytest.raises(RuntimeError, match="can't allocate memory") as stopped:
        _fit(model, pairs, root, Limit(room=20 * MIB), halvings=3)
    assert "Out of memory in training, after step 2. This process has" in explanation(stopped.value)
    dpo = module(model, kind=Hungry)
    run = trainer(root, callbacks=[OutOfMemory(1)])
    run.validate(dpo, data(pairs, val=str(pairs)), verbose=False)
    expected = {name: float(value) for name, value in run.callback_metrics.items()}
    with little_room():
        run.validate(dpo, data(pairs, val=str(pairs)), verbose=False)
    assert dpo.microbatch_tokens
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("work", [survives, stops])
def test_memory_that_runs_out(tiny_model, pairs_file, tmp_path, work):
    ranks.run(work, 1, tiny_model, pairs_file, tmp_path / "run", folder=tmp_path, seconds=120)


def test_the_command_says_what_takes_less_and_loses_nothing(tiny_model, pairs_file, tmp_path):
    def fit(*more: str) -> tuple[int, str]:
        words = [
            "fit",
            "--model=test_out_of_memory.Hungry",
            f"--model.policy.model={tiny_model}",
            "--model.policy.quantization=none",
            f"--data.train={pairs_file}",
            "--data.batch_size=4",
            "--trainer.accelerator=cpu",
            "--trainer.max_epochs=1",
            "--trainer.enable_progress_bar=false",
            *more,
        ]
        run = ranks.command(words, log=tmp_path / "log", cwd=tmp_path)
        return run.wait(), run.output()

    limit = "--trainer.callbacks+=test_out_of_memory.Limit"
    status, said = fit(limit)
    assert status == 1, said
    assert "Traceback" not in said
    (sentence,) = re.findall(r"lit-dpo: error: (.*)", said)
    for part in (
        r"Out of memory in training, after step 2\. This process has \d\.\d\d GiB of memory, \d+\.\d\d of the ",
        r"Micro-batches have up to 1,024 tokens \(`microbatch_tokens`\)\. A training step needs about .*: weights ",
        "lower `--model.microbatch_tokens` or `--data.max_length`; set `--model.policy.gradient_checkpointing true`; ",
        r"hold the base in 4 bits, .*; let the run .*`--trainer.callbacks\+=OutOfMemory ",
        r"DefaultCPUAllocator: can't allocate memory.*go on, repeat the command with --ckpt_path runs/version_0/last\.",
    ):
        assert re.search(part, sentence), (part, sentence)
    halve = ["--trainer.callbacks+=OutOfMemory", "--trainer.callbacks.halvings=1"]
    status, said = fit("--ckpt_path=last", limit, *halve)
    assert status == 0, said
    assert len(re.findall("the batch is computed again", said)) == 1


def test_whoever_says_that_there_is_no_more_is_understood():
    for run_out in (lambda: bytearray(2**62), lambda: np.empty(2**58), lambda: torch.empty(2**58)):
        with pytest.raises((MemoryError, RuntimeError)) as refused:
            run_out()
        assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_out_of_memory(RuntimeError("The memory of the loss is of another shape"))


def test_several_ranks_are_refused_before_weights_load(tiny_model, pairs_file, tmp_path):
    run = trainer(tmp_path, callbacks=[OutOfMemory(1)], devices=2, strategy="ddp_spawn")
    with pytest.raises(TrainingError, match=r"Expected one process with `OutOfMemory\(halvings=1\)` but there are 2"):
        OutOfMemory(1).setup(run, module(tiny_model), "fit")
    with pytest.raises(TrainingError, match="Expected `halvings` >= 0 but got -1"):
        OutOfMemory(-1)


def _again(halvings, room, *, whole=None):
    """A batch of three prompts, of which a micro-batch may have so many tokens; what came, and what was tried."""
    dpo = SimpleNamespace(microbatch_tokens=None, loss_state=None, why_whole=whole, device=torch.device("cpu"),
                          trainer=SimpleNamespace(global_step=3))  # fmt: skip
    guard, tried = OutOfMemory(halvings), []

    def cut():
        return tiny.batch().cut(dpo.microbatch_tokens or 10**6)

    def run():
        tried.append(max(part.input_ids.shape[1] for part in cut()))
        if tried[-1] > room:
            raise MemoryError(f"{tried[-1]} tokens")
        return "made"

    return guard, dpo, tried, lambda: guard.again(dpo, run, cut)


def test_a_batch_is_made_smaller_as_often_as_that_is_allowed_and_helps():
    whole = tiny.batch().input_ids.shape[1]
    guard, dpo, tried, run = _again(5, room=whole // 2)
    assert run() == "made"
    assert tried[0] == whole
    assert dpo.microbatch_tokens == whole // 2 == guard.state_dict()["microbatch_tokens"]
    # one prompt is not cut: the limit is what it was, and the error is the last one
    guard, dpo, tried, run = _again(5, room=0)
    with pytest.raises(MemoryError) as refused:
        run()
    assert str(refused.value) == f"{tried[-1]} tokens"
    assert len(tried) == len(set(tried)) < 6
    assert dpo.microbatch_tokens == guard.state_dict()["microbatch_tokens"]
    for halvings, reason in ((0, None), (3, "it stays whole")):
        guard, dpo, tried, run = _again(halvings, room=0, whole=reason)
        with pytest.raises(MemoryError, match=f"^{whole} tokens$"):
            run()
        assert (tried, dpo.microbatch_tokens, guard.state_dict()) == ([whole], None, {})
    guard, dpo, tried, run = _again(1, room=0)
    with pytest.raises(MemoryError):
        run()
    assert len(tried) == 2


def test_a_size_that_was_found_is_taken_up_if_the_run_may_find_one():
    for halvings, tokens in ((1, 10), (0, None)):
        guard, dpo = OutOfMemory(halvings), SimpleNamespace(microbatch_tokens=None)
        guard.load_state_dict({"microbatch_tokens": 10})
        with tiny.records("lit_dpo.callbacks.out_of_memory") as lines:
            for _ in range(2):
                guard.on_train_batch_start(None, dpo, tiny.batch(), 0)
        assert dpo.microbatch_tokens == tokens
        assert len(lines) == halvings
        assert guard.state_dict() == ({} if tokens is None else {"microbatch_tokens": 10})


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("spared", [True, False])
def test_only_what_is_not_done_already_is_advised(loaded, spared):
    policy = SimpleNamespace(gradient_checkpointing=spared, quantization="nf4" if spared else "none")
    dpo = SimpleNamespace(policy=policy, model=object() if loaded else None, device=torch.device("cpu"))
    dpo.why_whole, dpo.microbatch_limit = "so it is", 1024
    run = SimpleNamespace(training=True, state=None, global_step=3, callbacks=[], world_size=1)
    said = OutOfMemory().explain(run, dpo)
    assert said.startswith("Out of memory in training, after step 3.")
    assert ("Batches run in one piece" in said) == ("--data.batch_size" in said) == loaded
    assert ("halvings=1" in said) == (not loaded)
    assert ("gradient_checkpointing true" in said) == ("quantization nf4" in said) == (not spared)
    assert "A training step needs" not in said
