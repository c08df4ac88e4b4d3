"""The table at the end of `fit`, throughput, learning rate and histograms: what they say is what was measured."""

from __future__ import annotations

import copy
import csv
import os
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tiny
from lit_dpo.callbacks import LastCheckpoint, LearningRate, PredictionWriter, RewardHistograms, Throughput
from lit_dpo.callbacks.completions import _ids
from lit_dpo.callbacks.dynamics import Measured, _sizes, measured
from lit_dpo.callbacks.environment import starts
from lit_dpo.callbacks.own_directory import OwnDirectory
from lit_dpo.callbacks.summary import _number
from lit_dpo.callbacks.texts import log_table, markdown_table
from lit_dpo.callbacks.together import _is_last
from lit_dpo.cli import main
from lit_dpo.logps import SequenceLogps
from training import data, trainer
from training import light as module


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


# ---- what is not measured is not shown ----


def test_throughput_counts_batches_of_completions_and_writes_after_a_step():
    counted, logged = Throughput(), []
    run = SimpleNamespace(global_step=4, barebones=False, log_every_n_steps=10, should_stop=False)
    dpo = SimpleNamespace(device=torch.device("cpu"), log_dict=logged.append)
    counted.on_train_start(run, dpo)
    counted.on_train_batch_start(run, dpo, tiny.batch(), 0)
    counted.on_train_batch_end(run, dpo, None, {"a batch": "of one's own"}, 0)
    assert counted._tokens == 0
    for number in range(2):  # accumulated: no step was made
        counted.on_train_batch_end(run, dpo, None, tiny.batch(), number)
    assert counted._tokens == 2 * tiny.batch().input_ids.numel()
    assert logged == []
    run.global_step = 5
    counted.on_train_batch_end(run, dpo, None, tiny.batch(), 2)
    assert logged[0].keys() >= {"train/tokens_per_second", "train/pairs_per_second", "train/data_wait"}
    run.global_step, run.barebones = 6, True
    counted.on_train_batch_end(run, dpo, None, tiny.batch(), 3)
    assert len(logged) == 1


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (float("nan"), "-"), (0.0, "0.0000"), (-0.5, "-0.5000"), (1e-3, "0.0010"),
                        (9.9e-4, "0.00099"), (1e4, "1e+04"), (9999.0, "9999.0000")]
)  # fmt: skip
def test_a_number_is_shown_or_a_dash(value, text):
    assert _number(value) == text


def test_histograms_need_a_logger_that_draws_and_are_drawn_by_one_rank():
    drawn: list[str] = []
    board = SimpleNamespace(experiment=SimpleNamespace(add_histogram=lambda name, *_: drawn.append(name)))
    dpo = SimpleNamespace(measured_batch=None)
    for first, loggers, said in ((True, [object()], 1), (True, [board], 0), (False, [object()], 0)):
        run = SimpleNamespace(is_global_zero=first, loggers=loggers)
        with tiny.records("lit_dpo.callbacks.histograms") as lines:
            RewardHistograms().on_fit_start(run, dpo)
        assert len(lines) == said
    for first, expected in ((True, 3), (False, 0)):
        run = SimpleNamespace(is_global_zero=first, loggers=[board], world_size=1, sanity_checking=False, global_step=1,
                              state=SimpleNamespace(fn="fit"))  # fmt: skip
        histograms = RewardHistograms()
        histograms.on_fit_start(run, dpo)
        histograms.on_validation_batch_end(run, dpo, None, None, 0)  # a step of one's own has measured nothing
        assert histograms._kept == []
        dpo.measured_batch = SimpleNamespace(chosen_rewards=torch.ones(3), rejected_rewards=torch.zeros(3))
        histograms.on_validation_batch_end(run, dpo, None, None, 1)
        histograms.on_validation_end(run, dpo)
        dpo.measured_batch = None
        assert len(drawn) == expected
        drawn.clear()


def test_a_table_goes_to_whatever_a_logger_takes():
    """`log_text` is what Weights & Biases' has, `add_text` what the board's experiment has; others get none."""
    taken: list[object] = []
    rows = [("a", "|"), ("b", "c")]
    tables = SimpleNamespace(log_text=lambda **given: taken.append(given))
    board = SimpleNamespace(experiment=SimpleNamespace(add_text=lambda *given: taken.append(given)))
    for logger in (tables, board, object()):
        log_table(logger, "t", ("x", "y"), rows, 7)
    assert taken[0] == {"key": "t", "columns": ["x", "y"], "data": [["a", "|"], ["b", "c"]], "step": 7}
    assert taken[1] == ("t", markdown_table(("x", "y"), rows), 7)
    assert len(taken) == 2


def test_predictions_of_a_step_of_one_s_own_are_its_own_affair(tmp_path):
    writer = PredictionWriter(str(tmp_path / "rows.jsonl"))
    writer._rows = []
    for outputs in (
        torch.ones(2),
        {"margin": torch.ones(2)},
        {"index": torch.tensor([4]), "margin": torch.tensor([0.5])},
    ):
        writer.on_predict_batch_end(None, None, outputs, None, 0)
    assert writer._rows == [{"index": 4, "margin": 0.5}]


def test_a_copy_of_a_callback_holds_no_directory(tmp_path):
    held = OwnDirectory()
    held.held.append(os.open(tmp_path, os.O_RDONLY))
    assert copy.deepcopy(held).held == []
    held._let_go()
    assert held.held == []


def test_a_file_of_starts_that_is_something_else_is_named(tmp_path):
    assert starts(tmp_path) == []
    for text in ("[]", "{}", '{"starts": 5}'):
        (tmp_path / "environment.json").write_text(text)
        with pytest.raises(ValueError, match=r"expected the starts of a run in .*environment.json"):
            starts(tmp_path)
    (tmp_path / "environment.json").write_text('{"version": 1, "starts": [{"a": 1}, 2]}')
    assert starts(tmp_path) == [{"a": 1}]


@pytest.mark.parametrize(
    ("counts", "batch", "last"),
    [(3, 2, True), (3, 1, False), ([9, 3], 2, True), ([3, 9], 2, False), (float("inf"), 2, True)],
)
def test_the_last_batch_of_a_prediction_is_known(counts, batch, last):
    """Of a set without a length by what its loop has looked ahead."""
    run = SimpleNamespace(
        sanity_checking=False, testing=False, predicting=True, num_predict_batches=counts,
        predict_loop=SimpleNamespace(batch_progress=SimpleNamespace(is_last_batch=True)),
    )  # fmt: skip
    assert _is_last(run, batch, 1) == last


def test_dynamics_of_nothing_are_no_rows_and_a_flat_loss_has_no_gradient():
    assert [len(one) for one in Measured.joined([])] == [0, 0]
    nobody = measured(SimpleNamespace(measured_batch=object()), SimpleNamespace(size=0), 0, 0)
    assert [tuple(one.shape) for one in nobody] == [(0, 5), (0, 5)]
    sides = [SequenceLogps(torch.ones(3, requires_grad=True), torch.ones(3)) for _ in range(2)]
    assert [size.tolist() for size in _sizes(torch.zeros(3), sides)] == [[0.0] * 3] * 2


def test_a_prompt_of_text_is_what_a_user_says_where_data_are_conversations():
    template = "{% for one in messages %}{{ one['role'][0] + ':' + one['content'] }}{% endfor %}{{ '>' }}"
    tokenizer = tiny.tokenizer(chat_template=template)
    said = _ids(tokenizer, "Hi", True, {})
    assert tokenizer.decode(said).replace(" ", "") == "u:Hi>"
    assert said == _ids(tokenizer, [{"role": "user", "content": "Hi"}], False, {})
    assert tokenizer.decode(_ids(tokenizer, "Hi", False, {})).replace(" ", "") == "Hi"
