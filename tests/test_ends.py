"""How runs end: a worthless one says so and costs nothing that was saved; a stopped one can go on."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import signal
import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file, save_file

import ranks
import tiny
from lit_dpo.callbacks import AdapterExport, LastCheckpoint, TrainingHealth
from lit_dpo.cli import main
from lit_dpo.errors import TrainingError
from lit_dpo.losses import BCOLoss
from lit_dpo.metrics import RewardAccuracy
from training import Trace, adapter, data, module, trainer


@pytest.fixture
def broken(tiny_model, tmp_path):
    """A model whose embedding of one letter is NaN: the `Z` of one row."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    (letter,) = tiny.load_tokenizer(folder)("Z", add_special_tokens=False).input_ids
    weights["model.embed_tokens.weight"][letter] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def marked(pairs_file, tmp_path):
    """The pairs in two files; row 4 of the second one has the letter."""
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    rows[14]["chosen"] += " Z"
    files = []
    for name, part in (("one", rows[:10]), ("two", rows[10:])):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in part))
    return [str(file) for file in files]


def _source(files):
    from lit_dpo import PreferenceDataModule

    return PreferenceDataModule(train=files, batch_size=4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_row(broken, marked, tmp_path, accumulate):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(tmp_path, callbacks=[keep], enable_checkpointing=True, accumulate_grad_batches=accumulate)
    dpo = module(broken)
    dpo.fresh = False  # the comparison before the first step is another check
    with pytest.raises(
        TrainingError, match=r"The loss of step \d is not finite, from .*two\.jsonl, row 4 \(from 0\)\. "
    ):
        run.fit(dpo, _source(marked))
    assert all(torch.isfinite(p).all() for p in adapter(dpo).values()), "nothing was spoilt"
    for file in tmp_path.glob("*.ckpt"):
        state = torch.load(file, weights_only=True)["state_dict"]
        assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert not (tmp_path / "adapter").exists()


def test_a_policy_that_is_nan_at_the_start_is_stopped(broken, marked, tmp_path):
    with pytest.raises(TrainingError, match=r"not finite|the same before the first step"):
        trainer(tmp_path).fit(module(broken), _source(marked))


@pytest.mark.parametrize("loss", [None, BCOLoss()])
def test_such_steps_are_left_out_and_counted_where_that_is_asked_for(broken, marked, tmp_path, loss):
    """The same adapter as without that step: its optimizer, metrics and memory have not seen it."""
    seen = Trace()
    dpo = module(broken, optimizer=functools.partial(torch.optim.SGD, lr=0.1), **({"loss": loss} if loss else {}))
    dpo.fresh = False
    run = trainer(tmp_path, callbacks=[TrainingHealth(nonfinite="skip"), seen], log_every_n_steps=50)
    with tiny.records("lit_dpo") as said:
        run.fit(dpo, _source(marked))
    (line,) = [text for record in said if "left out" in (text := record.getMessage())]
    assert re.search(
        r"step \d is left out, 1 by now: its loss is not finite, from .*two\.jsonl, row 4 \(from 0\)", line
    )
    assert run.global_step == 6
    assert all(torch.isfinite(p).all() for p in adapter(dpo).values())
    assert sum(math.isnan(loss) for loss in seen.losses) == 1
    expected = sum(loss * len(rows) for loss, rows in zip(seen.losses, seen.rows, strict=True) if not math.isnan(loss))
    pairs = sum(len(rows) for loss, rows in zip(seen.losses, seen.rows, strict=True) if not math.isnan(loss))
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(expected / pairs, rel=1e-5)
    if loss:
        assert float(dpo.loss_state[1]) == pairs


def test_weights_that_are_not_finite_replace_nothing(tiny_model, pairs_file, tmp_path):
    """A rate that is far too high, on the last step: no gradient says so any more."""
    (tmp_path / "mine").mkdir()
    good = module(tiny_model)
    trainer(tmp_path, callbacks=[AdapterExport(str(tmp_path / "mine" / "adapter"))]).fit(good, data(pairs_file))
    before = (tmp_path / "mine" / "adapter" / "adapter_model.safetensors").read_bytes()
    sgd = functools.partial(torch.optim.SGD, lr=math.inf)
    keep = ModelCheckpoint(tmp_path / "kept", filename="last", every_n_train_steps=1)
    for callbacks in ([AdapterExport(str(tmp_path / "mine" / "adapter"))], [keep]):
        run = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=keep in callbacks, max_steps=1)
        with pytest.raises(TrainingError, match="Expected finite weights but"):
            run.fit(module(tiny_model, optimizer=sgd), data(pairs_file))
    assert (tmp_path / "mine" / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert not list(tmp_path.rglob("*.ckpt"))


def test_accuracy_of_nan_is_nan():
    accuracy = RewardAccuracy()
    accuracy.update(torch.tensor([1.0, math.nan]), torch.tensor([0.0, 0.0]))
    assert math.isnan(accuracy.compute())
    accuracy = RewardAccuracy()
    accuracy.update(torch.tensor([math.inf, 0.0]), torch.tensor([0.0, -math.inf]))
    assert float(accuracy.compute()) == 1.0


# ---- stopped from outside ----


class Slow(Callback):
    """Says when a step was made, and waits a little."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        print("step", trainer.global_step, flush=True)
        time.sleep(0.2)


def _command(tiny_model, pairs_file, *more):
    return [
        "fit",
        f"--model.policy.model={tiny_model}",
        "--model.policy.quantization=none",
        f"--data.train={pairs_file}",
        "--data.batch_size=4",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=training.Unestimated",
        *more,
    ]


def _exported(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def straight(tiny_model, pairs_file, tmp_path_factory):
    """The adapter of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(_command(tiny_model, pairs_file))
    return _exported(folder / "runs" / "version_0" / "adapter")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on_from_last(
    tiny_model, pairs_file, tmp_path, monkeypatch, straight, number
):
    """Sent to its loader's worker too, as batch systems do; the adapter is that of a run that was not stopped."""
    monkeypatch.chdir(tmp_path)
    command = _command(tiny_model, pairs_file)
    slow = ["--trainer.callbacks+=test_ends.Slow", "--data.num_workers=1"]
    running = ranks.command([*command, *slow], log=tmp_path / "log.txt", cwd=tmp_path)
    running.wait_for("step 3\n")
    os.killpg(running.pid, number)
    status, said = running.wait(), running.output()
    assert status == 128 + number, said[-2000:]
    run = tmp_path / "runs" / "version_0"
    assert "to go on, repeat it with --ckpt_path runs/version_0/last.ckpt" in said
    saved = torch.load(run / "last.ckpt", weights_only=True)
    assert 3 <= saved["global_step"] <= 5
    assert (run / "last" / "adapter_config.json").is_file()
    main([*command, "--ckpt_path", "last"])
    resumed = _exported(tmp_path / "runs" / "version_1" / "adapter")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


def test_last_without_a_run_is_said(tiny_model, pairs_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([*_command(tiny_model, pairs_file), "--ckpt_path=last"])
    assert stopped.value.code == 1
    assert "Expected a run with a `last.ckpt` in" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "times"), [({"every_n_steps": 2}, 3), ({"every_n_minutes": 1e-9}, 6), ({}, 0)])
def test_a_last_checkpoint_every_so_often(tiny_model, pairs_file, tmp_path, given, times):
    class Count(LastCheckpoint):
        saved = 0

        def _save(self, trainer):
            self.saved += 1
            return super()._save(trainer)

    last = Count(**given)
    trainer(tmp_path, callbacks=[last]).fit(module(tiny_model), data(pairs_file))
    assert last.saved == times + 1, "and at the end of the epoch"
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6
    with pytest.raises(ValueError, match="Expected `every_n_steps` > 0"):
        LastCheckpoint(every_n_steps=0)
