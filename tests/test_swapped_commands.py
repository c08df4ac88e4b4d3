"""Classes that are swapped on the whole command: what was typed for a class holds for it, and for no other."""

from __future__ import annotations

import json
from typing import Any

import jsonargparse
import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lit_dpo import DPOModule
from lit_dpo.cli import main
from lit_dpo.data.formats import Triples
from lit_dpo.losses import PreferenceLoss
from swaps import (
    CONFIGS,
    LOSSES,
    ON_THE_COMMAND,
    arguments_of,
    class_of,
    command_parser,
    own_defaults,
    parser_of,
    plain,
    signature_defaults,
)


@pytest.fixture(scope="module")
def command():
    """Parses arguments of `fit` as the command does; returns the plain dictionary that `--print_config` would print."""

    def parse(*arguments: str) -> dict[str, Any]:
        return plain(command_parser().parse_args(["fit", *arguments])["fit"])

    return parse


def test_a_format_a_logger_and_callbacks_too(command, tmp_path):
    policy = "--model.policy.model=x"
    found = command(policy, "--data.format.chosen=good", "--data.format=swaps.Questions")
    expected = {**own_defaults(Triples), "prompt": "question"}
    assert found["data"]["init_args"]["format"]["init_args"] == expected

    found = command(policy, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=here")["trainer"]["logger"]
    assert found["init_args"] == {"save_dir": "here", **signature_defaults(CSVLogger)}
    (tmp_path / "csv.yaml").write_text(
        "trainer:\n  logger: {class_path: CSVLogger, init_args: {save_dir: there, flush_logs_every_n_steps: 3}}\n"
    )
    found = command(policy, f"--config={tmp_path}/csv.yaml", "--trainer.logger=TensorBoardLogger")["trainer"]["logger"]
    assert found["init_args"] == command(policy)["trainer"]["logger"]["init_args"]
    assert class_of(found) is TensorBoardLogger
    assert (found["init_args"]["save_dir"], found["init_args"]["name"]) == ("runs", "")

    (tmp_path / "callbacks.yaml").write_text(
        "trainer:\n  callbacks:\n    - {class_path: EarlyStopping, init_args: {monitor: x, patience: 9, mode: max}}\n"
    )
    file = f"--config={tmp_path}/callbacks.yaml"
    expected = signature_defaults(ModelCheckpoint)
    for spelling in ('["ModelCheckpoint"]', '[{"class_path": "ModelCheckpoint"}]'):
        (found,) = command(policy, file, f"--trainer.callbacks={spelling}")["trainer"]["callbacks"]
        assert found["init_args"] == expected
    for spelling in ("ModelCheckpoint", '{"class_path": "ModelCheckpoint"}'):
        found = command(policy, file, f"--trainer.callbacks={spelling}")["trainer"]["callbacks"]
        assert found["init_args"] == expected
    found = command(policy, file, "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.mode=max")
    first, second = found["trainer"]["callbacks"]
    assert first["init_args"]["patience"] == 9
    assert second["init_args"] == {**expected, "mode": "max"}


# ---- the model and the data class ----


def test_a_subclass_of_the_model_takes_over_what_was_typed_and_no_default(command, tmp_path, caplog):
    """As in the README: `--config quickstart.yaml --model my_lab.Calm --model.calm 0.01`."""
    caplog.set_level("INFO")
    quickstart = f"--config={CONFIGS / 'quickstart.yaml'}"
    base = command(quickstart)["model"]["init_args"]
    found = command(quickstart, "--model=swaps.Hot", "--model.heat=2")["model"]["init_args"]
    assert found == {**base, "heat": 2.0}  # a warm-up of 0.1 was typed in the file
    assert not caplog.messages
    found = command("--model.policy.model=x", "--model.loss=IPOLoss", "--model=swaps.Hot")["model"]["init_args"]
    assert found["warmup_ratio"] == 0.25  # 0 was typed by nobody
    assert found["loss"]["init_args"] == {"beta": 0.1, "average": "mean"}
    typed = command("--model.policy.model=x", "--model.warmup_ratio=0.0", "--model=swaps.Hot")
    assert typed["model"]["init_args"]["warmup_ratio"] == 0.0
    assert not caplog.messages


@pytest.mark.parametrize("spelling", ["arguments", "json", "file"])
def test_from_one_subclass_to_another_what_their_base_has_is_taken_over(command, tmp_path, caplog, spelling):
    caplog.set_level("INFO")
    init_args = {"policy": {"model": "x", "r": 4}, "loss": "SimPOLoss", "heat": 9.0, "warmup_ratio": 0.5}
    (tmp_path / "hot.yaml").write_text(yaml.safe_dump({"model": {"class_path": "swaps.Hot", "init_args": init_args}}))
    (tmp_path / "warm.yaml").write_text("model: {class_path: swaps.Warm}\n")
    after = {
        "arguments": "--model=swaps.Warm",
        "json": '--model={"class_path": "swaps.Warm"}',
        "file": f"--config={tmp_path}/warm.yaml",
    }[spelling]
    found = command(f"--config={tmp_path}/hot.yaml", after)["model"]["init_args"]
    assert found["heat"] == 0.1  # of the same name, and another thing
    assert (found["warmup_ratio"], found["policy"]["init_args"]["r"]) == (0.5, 4)
    assert found["loss"]["init_args"]["beta"] == 2.0
    assert caplog.messages == ["Warm has its own defaults: dropped heat=9.0, given for Hot"]


def test_what_a_subclass_does_not_take_is_dropped_aloud(command, tmp_path, caplog):
    caplog.set_level("INFO")
    arguments = ["--model.policy.model=x", "--model.loss.beta=3", "--model=swaps.Small"]
    assert set(command(*arguments)["model"]["init_args"]) == {"policy", "reference"}
    assert caplog.messages == ["Small has its own defaults: dropped loss, given for DPOModule"]


def test_the_data_class_likewise(command, caplog):
    caplog.set_level("INFO")
    start = ["--model.policy.model=x", "--data.train=a.jsonl", "--data.format.prompt=question"]
    found = command(*start, "--data=swaps.Streams", "--data.shards=4")["data"]["init_args"]
    assert (found["train"], found["shards"], found["max_length"]) == ("a.jsonl", 4, 77)
    assert found["format"]["init_args"]["prompt"] == "question"
    found = command(*start, "--data.max_length=1024", "--data=swaps.Streams")["data"]["init_args"]
    assert found["max_length"] == 1024
    assert not caplog.messages


# ---- the whole command ----


@pytest.mark.parametrize("after", ON_THE_COMMAND, ids=lambda one: one.__name__)
def test_the_whole_command_swaps_losses(command, after):
    """As the parser of a loss does it for all pairs, in `test_swaps.py`."""
    before = LOSSES[LOSSES.index(after) - 1]
    fragment = CONFIGS / "losses" / f"{before.__name__.removesuffix('Loss').lower()}.yaml"
    found = command("--model.policy.model=x", f"--model.loss={fragment}", f"--model.loss={after.__name__}")
    assert arguments_of(found["model"]["init_args"]["loss"]) == own_defaults(after)


@pytest.mark.parametrize(
    ("optimizer", "defaults"),
    [
        ("torch.optim.Adafactor", {"initial_lr": 1e-2, "beta2_decay": -0.8, "weight_decay": 0.0, "d": 1.0}),
        ("torch.optim.Muon", {"initial_lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "ns_steps": 5}),
        ("bitsandbytes.optim.Lion", {"initial_lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0}),
    ],
)
def test_a_run_trains_with_the_defaults_of_the_loss_and_optimizer_that_were_named(
    tiny_model, pairs_file, tmp_path, monkeypatch, optimizer, defaults
):
    """The file's AdamW and DPO leave nothing behind: SimPO trains at β 2, Adafactor makes its first step."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment.yaml").write_text(
        f"model:\n  policy: {{model: {tiny_model}, quantization: none}}\n  loss: {CONFIGS}/losses/dpo.yaml\n"
        "  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 3e-4, betas: [0.8, 0.9], eps: 1e-6}}\n"
        f"data: {{train: {pairs_file}, batch_size: 4}}\n"
        "trainer: {max_steps: 2, accelerator: cpu, enable_progress_bar: false, enable_checkpointing: false}\n"
    )
    main(["fit", "--config=experiment.yaml", "--model.loss=SimPOLoss", f"--model.optimizer={optimizer}",
          "--trainer.callbacks+=swaps.Witness"])  # fmt: skip
    found = json.loads((tmp_path / "witness.json").read_text())
    assert found["loss"] == "SimPOLoss(beta=2.0, gamma=1.0, label_smoothing=0.0, link='sigmoid')"
    assert found["optimizer"] == optimizer.rpartition(".")[2]
    assert found["moved"]
    assert {key: found["group"][key] for key in defaults} == defaults


@pytest.mark.parametrize(("arguments", "beta"), [([], 0.7), (["--model.loss=SimPOLoss"], 2.0)])
def test_the_environment_is_a_spelling_too(monkeypatch, capsys, arguments, beta):
    spec = {"policy": {"model": "x"}, "loss": {"class_path": "IPOLoss", "init_args": {"beta": 0.7}}}
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    monkeypatch.setenv("PL_FIT__MODEL", json.dumps({"class_path": "DPOModule", "init_args": spec}))
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *arguments, "--print_config"])
    assert stopped.value.code == 0
    found = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert found["loss"]["init_args"]["beta"] == beta


def test_an_argument_of_another_class_is_an_error_that_names_the_class(command, capsys):
    cases = {
        ("--model.loss=SimPOLoss", "--model.loss=IPOLoss", "--model.loss.gamma=1"): ("IPOLoss", "gamma"),
        ("--model.optimizer=torch.optim.SGD", "--model.optimizer.betas=[0,1]"): ("SGD has no argument", "betas"),
        ('--model.loss={"class_path": "IPOLoss", "init_args": {"gamma": 1}}',): ("IPOLoss", "gamma"),
    }
    for arguments, expected in cases.items():
        with pytest.raises(SystemExit) as stopped:
            command("--model.policy.model=x", *arguments)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert all(one in error for one in expected)


def test_jsonargparse_has_the_function_that_is_replaced_and_calls_it(monkeypatch):
    """It is the one place where it compares class paths; elsewhere it stays as it is."""
    name = "discard_init_args_on_class_path_change"
    theirs = getattr(jsonargparse._typehints, name)
    parser = parser_of(DPOModule, "loss")
    seen = []
    monkeypatch.setattr(jsonargparse._typehints, name, lambda *args: seen.append(args) or theirs(*args))
    plain = jsonargparse.ArgumentParser()
    plain.add_argument("--loss", type=PreferenceLoss, default={"class_path": "lit_dpo.losses.DPOLoss"})
    plain.parse_args(["--loss=IPOLoss", "--loss=SimPOLoss"])
    assert seen
    parser.parse_args(["--of.loss=SimPOLoss"])
    assert getattr(jsonargparse._typehints, name) is not theirs
    monkeypatch.undo()
    assert getattr(jsonargparse._typehints, name) is theirs
