"""What TensorBoard shows of runs, asked of its own server; and what is left out of a run in Python."""

from __future__ import annotations

import json
import logging
import re
import urllib.request
import warnings
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelSummary
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lit_dpo import IPOLoss, quiet
from lit_dpo.callbacks import LearningRate, RunLogger, Throughput
from lit_dpo.callbacks.tensorboard import short
from training import data, module, trainer

COMPARED = ["val/reward_accuracy", "val/loss", "val/reward_margin", "val/kl"]


@pytest.fixture(scope="module")
def board(tiny_model, pairs_file, tmp_path_factory):
    """The address of a server that shows two runs: one as the command logs, one with Lightning's logger as it comes."""
    from tensorboard import program

    root = tmp_path_factory.mktemp("board")
    for lr, logger in ((1e-2, RunLogger), (1e-3, TensorBoardLogger)):
        given = {"default_hp_metric": False} if logger is RunLogger else {}
        run = trainer(
            root,
            logger=[logger(root / logger.__name__, name="", **given), CSVLogger(root / "csv", name="")],
            callbacks=[LearningRate(), LearningRateMonitor(), Throughput()],
            max_steps=3,
            max_epochs=-1,
            val_check_interval=2,
            num_sanity_val_steps=0,
        )
        run.fit(module(tiny_model, lr=lr, loss=IPOLoss(beta=0.3)), data(pairs_file, val=str(pairs_file)))
    server = program.TensorBoard()
    given = ["--logdir", str(root), "--host", "127.0.0.1", "--port", "0", "--load_fast=false"]
    server.configure(argv=[None, *given, "--reload_interval=0"])  # read once: its thread would log in other tests
    server.assets_zip_provider = None
    return server.launch(), root


def ask(board, path: str, body: Any = None) -> Any:
    request = urllib.request.Request(board[0] + "data/plugin/" + path, json.dumps(body).encode() if body else None)
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def _tags(board) -> dict[str, set[str]]:
    return {run.partition("/")[0]: set(tags) for run, tags in ask(board, "scalars/tags").items()}


def test_it_opens_on_training_and_validation(board):
    """The first two groups by the alphabet are open, and nothing stands outside of a group."""
    tags = _tags(board)["RunLogger"]
    assert sorted({tag.partition("/")[0] for tag in tags})[:2] == ["train", "val"]
    assert {"train/lr-AdamW", "train/learning_rate", "when/epoch"} <= tags
    assert all("/" in tag for tag in tags)
    assert "hp_metric" not in tags
    assert set(COMPARED) <= tags


def test_custom_scalars_show_what_matters_in_a_few_charts(board):
    charts = {
        chart["title"]: [re.compile(tag) for tag in chart["multiline"]["tag"]]
        for category in ask(board, "custom_scalars/layout")["category"]
        for chart in category["chart"]
    }
    for tags in _tags(board).values():
        shown = {
            title: {tag for tag in tags if any(one.match(tag) for one in those)} for title, those in charts.items()
        }
        assert [title for title, found in shown.items() if not found] == ["parts of the loss"]  # IPO has none
        assert shown["rewards of chosen and rejected"] == {"val/chosen_reward", "val/rejected_reward"}
        assert shown["loss"] == {"train/loss", "val/loss"}
        assert {"train/learning_rate"} <= shown["learning rate"]


def test_runs_are_compared_by_short_names_and_by_what_was_measured_last(board):
    """Also where Lightning's logger has written its own list, with long names."""
    found = ask(board, "hparams/experiment", {"experimentName": "", "hparamsLimit": 0})
    names = [one["name"] for one in found["hparamInfos"]]
    assert names[:4] == ["beta", "loss", "lr", "r"]
    assert not [name for name in names if "class_path" in name or "init_args" in name or "/" in name]
    assert [one["name"]["tag"] for one in found["metricInfos"]] == COMPARED
    asked = {"experimentName": "", "startIndex": 0, "sliceSize": 9, "allowedStatuses": ["STATUS_SUCCESS"],
             "colParams": [{"metric": {"tag": tag, "group": ""}} for tag in COMPARED]}  # fmt: skip
    groups = ask(board, "hparams/session_groups", asked)["sessionGroups"]
    assert {one["hparams"]["lr"] for one in groups} == {1e-2, 1e-3}
    assert {(one["hparams"]["loss"], one["hparams"]["beta"], one["hparams"]["r"]) for one in groups} == {
        ("IPOLoss", 0.3, 4)
    }
    for one in groups:
        (run,) = (session["name"] for session in one["sessions"])
        for value in one["metricValues"]:
            last = ask(board, f"scalars/scalars?run={run}&tag={value['name']['tag']}")[-1]
            assert last[1:] == [value["trainingStep"], value["value"]]


def test_other_loggers_get_the_same_short_names(board):
    text = (board[1] / "csv" / "version_0" / "hparams.yaml").read_text()
    assert re.search(r"^lr: 0\.01$", text, re.MULTILINE)
    assert re.search(r"^beta: 0\.3$", text, re.MULTILINE)


def test_a_short_name_is_that_of_one_argument_alone():
    dpo, sft = ({"class_path": f"lit_dpo.{name}", "init_args": {"beta": beta}} for name, beta in (("A", 1), ("B", 2)))
    loss = {"class_path": "lit_dpo.Mixture", "init_args": {"losses": [dpo, sft], "weights": [1.0, 2.0]}}
    found = short({"loss": loss, "reference": {"class_path": "x.R", "init_args": {"r": 1}}, "r": 8, "_class_path": "m"})
    assert found == {
        "loss": "Mixture", "losses.0": "A", "losses.0.beta": 1, "losses.1": "B", "losses.1.beta": 2,
        "weights": "[1.0, 2.0]", "reference": "R", "reference.r": 1, "r": 8,
    }  # fmt: skip


# ---- quiet ----


class _Speaks(Callback):
    """Warns and logs in the middle of a run as others do, and as a user does."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        speak()
        if self.fails:
            raise RuntimeError("in the middle")


def speak() -> None:
    warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use another", FutureWarning, stacklevel=1)
    warnings.warn("mine", UserWarning, stacklevel=1)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").warning("You have a card that has Tensor Cores")


@pytest.mark.parametrize("fails", [False, True])
def test_only_a_run_is_quiet_and_only_of_what_nobody_can_change(tiny_model, pairs_file, tmp_path, caplog, fails):
    quiet._OURS.end()  # of a command that another test ran in this process
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = trainer(tmp_path, callbacks=[_Speaks(fails)], max_steps=1)
        try:
            fit.fit(module(tiny_model), data(pairs_file))
        except RuntimeError:
            assert fails
        said = [str(one.message) for one in caught]
        assert "mine" in said
        assert not [one for one in said if "LeafSpec" in one or "is_gradient_checkpointing" in one]
        assert "Tensor Cores" not in caplog.text
        assert not [one for one in warnings.filters if "LeafSpec" in str(one[1])]
        speak()
    assert "LeafSpec" in str(caught[-2].message)
    assert "Tensor Cores" in caplog.text


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_summary_that_counts_packed_weights_as_parameters_is_left_out(
    tiny_model, pairs_file, tmp_path, capsys, quantization
):
    run = trainer(tmp_path, callbacks=[ModelSummary()], max_steps=1)
    run.fit(module(tiny_model, policy={"quantization": quantization}), data(pairs_file))
    assert bool([one for one in run.callbacks if isinstance(one, ModelSummary)]) == (quantization == "none")
