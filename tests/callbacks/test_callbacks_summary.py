"""The table at the end of `fit`, throughput, learning rate and histograms: what they say is what was measured."""

from __future__ import annotations

import csv
import time
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tiny
from lit_dpo.callbacks import LastCheckpoint, LearningRate, RewardHistograms, Throughput
from lit_dpo.cli import main
from training import data, module, trainer


@pytest.fixture(scope="module")
def run(tiny_model, pairs_file, tmp_path_factory):
    """Two epochs of six steps with all of them: what was said, rows, and TensorBoard's events."""
    root = tmp_path_factory.mktemp("run")
    best = ModelCheckpoint(root / "best", monitor="val/reward_accuracy", mode="max")
    last = LastCheckpoint(directory=str(root / "kept"))
    loggers = [TensorBoardLogger(root, name="board", version=""), CSVLogger(root, name="", version="csv")]
    with tiny.records("lightning.pytorch.utilities.rank_zero") as said:
        fitted = trainer(
            root, callbacks=[best, last, RewardHistograms(), Throughput(), LearningRate()], logger=loggers,
            max_epochs=2, enable_checkpointing=True,
        )  # fmt: skip
        dpo = module(tiny_model, lr=1e-2, lr_scheduler="linear")
        pairs = data(pairs_file, val=str(pairs_file))
        fitted.fit(dpo, pairs)
    (text,) = [found for one in said if " steps in " in (found := one.getMessage())]
    with (root / "csv" / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    margins = [batch["margin"] for batch in fitted.predict(dpo, data(pairs_file, predict=str(pairs_file)))]
    board = EventAccumulator(str(root / "board"), {"histograms": 0}).Reload()
    return SimpleNamespace(root=root, text=text, rows=rows, board=board, margins=margins, best=best)


def _column(run, name):
    return [float(row[name]) for row in run.rows if row[name]]


def test_the_table_says_first_and_last_of_each_measure_as_they_were_logged(run):
    head, titles, *lines = run.text.splitlines()
    assert head.startswith("12 steps in 0:00:")
    assert titles.split() == ["train", "first", "train", "last", "val", "first", "val", "last"]
    table = {line.split()[0]: line.split()[1:] for line in lines[:8]}
    assert list(table) == ["loss", "reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward", "kl",
                           "chosen_logps", "rejected_logps"]  # fmt: skip
    for name, found in table.items():
        train, val = _column(run, f"train/{name}"), _column(run, f"val/{name}")
        expected = [train[0], train[-1], val[0], val[-1]]
        assert [float(one) for one in found] == pytest.approx(expected, abs=6e-5)


def test_the_table_says_where_things_are_and_fits(run):
    *_, adapter, best, last, curves = run.text.splitlines()
    for line, place in (
        (adapter, run.root / "csv" / ".." / "board" / "adapter"),
        (best, run.best.best_model_path),
        (last, run.root / "kept" / "last.ckpt"),
    ):
        assert str(place).replace("csv/../", "") in line
    assert f"(val/reward_accuracy {float(run.best.best_model_score):.4g})" in best
    assert curves.split() == ["curves", "tensorboard", "--logdir", str(run.root / "board")]
    assert all(len(line) <= 80 for line in run.text.splitlines()[:10])
    assert run.text.isascii()


def test_the_learning_rate_is_the_one_that_made_the_step(run):
    assert _column(run, "train/learning_rate") == pytest.approx([1e-2 * (1 - step / 12) for step in range(12)])


def test_throughput_counts_what_was_trained_on_in_the_time_it_took(run):
    pairs, tokens = _column(run, "train/pairs_per_second"), _column(run, "train/tokens_per_second")
    assert len(pairs) == len(tokens) == 12
    seconds = [count / rate for count, rate in zip([4, 4, 4, 4, 4, 1] * 2, pairs, strict=True)]
    assert all(0 < one < 60 for one in seconds)
    whole = [round(rate * took) for rate, took in zip(tokens, seconds, strict=True)]
    assert sum(whole[:6]) == sum(whole[6:])  # an epoch has its tokens, in whatever order
    assert [rate * took for rate, took in zip(tokens, seconds, strict=True)] == pytest.approx(whole, abs=1e-3)
    assert all(0 <= share <= 1 for share in _column(run, "train/data_wait"))
    assert _column(run, "train/memory_gib")[-1] == max(_column(run, "train/memory_gib")) > 0.1


def test_histograms_hold_the_margins_of_all_held_out_pairs(run):
    drawn = run.board.Histograms("val/rewards/margin")
    assert [one.step for one in drawn] == [6, 12]
    found, expected = drawn[-1].histogram_value, [float(one) for batch in run.margins for one in batch]
    assert found.num == len(expected) == 21
    assert (found.min, found.max, found.sum) == pytest.approx((min(expected), max(expected), sum(expected)), rel=1e-4)
    for side in ("chosen", "rejected"):
        assert run.board.Histograms(f"val/rewards/{side}")[-1].histogram_value.num == 21


class _Slow(Throughput):
    """A step of which half is waiting for its batch."""

    def on_train_batch_start(self, *given):
        time.sleep(0.05)
        super().on_train_batch_start(*given)


def test_what_a_step_waits_for_is_data(tiny_model, pairs_file, tmp_path):
    slow = _Slow()
    run = trainer(tmp_path, callbacks=[slow], max_steps=2)
    run.fit(module(tiny_model), data(pairs_file))
    seconds = 4 / float(run.callback_metrics["train/pairs_per_second"])
    assert float(run.callback_metrics["train/data_wait"]) * seconds >= 0.05


def test_the_command_brings_rate_and_throughput_where_there_is_a_logger(tiny_model, pairs_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["fit", f"--model.policy.model={tiny_model}", "--model.policy.quantization=none", "--trainer.max_steps=1",
             f"--data.train={pairs_file}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
             "--trainer.log_every_n_steps=1"]  # fmt: skip
    main(given)
    tags = EventAccumulator("runs/version_0").Reload().Tags()["scalars"]
    assert {f"train/{name}" for name in ("learning_rate", "tokens_per_second", "memory_gib", "loss")} <= {*tags}
