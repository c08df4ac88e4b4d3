"""The command: help, configuration, whole runs, and bad input that ends in a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ranks
from lit_dpo.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to stand in; what a failed run leaves behind is seen here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _arguments(tiny_model, pairs_file, *more):
    return [
        "fit",
        f"--model.policy.model={tiny_model}",
        "--model.policy.quantization=none",
        "--model.optimizer=torch.optim.AdamW",
        "--model.optimizer.lr=0.01",
        f"--data.train={pairs_file}",
        "--data.batch_size=4",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=3",
        "--trainer.enable_progress_bar=false",
        *more,
    ]


EPOCH = ("--trainer.max_steps=-1", "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1")


def _printed(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_help_needs_no_heavy_import():
    code = "import sys; from lit_dpo.cli import main; main(['--help']); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "lit-dpo fit --config configs/quickstart.yaml" in out
    assert not {"torch", "lightning", "transformers", "peft"} & set(out.splitlines()[-1].split())


def test_a_run_leaves_a_versioned_directory_and_never_overwrites_another(tiny_model, pairs_file, here):
    for number in range(2):
        main(_arguments(tiny_model, pairs_file))
        run = here / "runs" / f"version_{number}"
        assert (run / "adapter" / "adapter_model.safetensors").is_file()
        assert (run / "config.yaml").is_file()
        assert list(run.glob("events.out.tfevents.*"))
        assert list(run.glob("checkpoints/*.ckpt"))
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["version_0", "version_1"]


def test_what_was_measured_is_in_tensorboard_under_public_names(tiny_model, pairs_file, here):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main(_arguments(tiny_model, pairs_file, f"--data.val={pairs_file}", *EPOCH))
    events = EventAccumulator(str(here / "runs" / "version_0"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    quantities = "loss reward_accuracy reward_margin chosen_reward rejected_reward chosen_logps rejected_logps kl"
    assert {f"{stage}/{name}" for stage in ("train", "val") for name in quantities.split()} <= names
    assert len(events.Scalars("train/loss")) == 6
    assert events.Scalars("train/loss")[0].value == pytest.approx(0.6931, abs=1e-3)
    assert not {"epoch", "hp_metric"} & names, "TensorBoard would open on them"


def test_validate_test_and_predict_read_a_run_back(tiny_model, pairs_file, here, capsys):
    main(_arguments(tiny_model, pairs_file, f"--data.val={pairs_file}", f"--data.test={pairs_file}"))
    run = here / "runs" / "version_0"
    (checkpoint,) = run.glob("checkpoints/*.ckpt")
    common = ["--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)]
    capsys.readouterr()
    main(["validate", *common])
    main(["test", *common])
    out = capsys.readouterr().out
    assert "val/reward_accuracy" in out
    assert "test/reward_accuracy" in out
    main(["predict", *common])
    (predictions,) = (here / "runs").glob("*/predictions.jsonl")
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(rows) == 21
    assert any(row["margin"] != 0 for row in rows), "the checkpoint's adapter was loaded"


def test_typed_values_win_over_the_checkpoint_and_contradictions_stop(tiny_model, pairs_file, here, capsys):
    constant = "--model.lr_scheduler=constant"
    main(_arguments(tiny_model, pairs_file, constant))
    (checkpoint,) = here.glob("runs/version_0/checkpoints/*.ckpt")
    again = _arguments(tiny_model, pairs_file, constant, "--trainer.max_steps=5", "--ckpt_path", str(checkpoint))
    main(again)
    assert list(here.glob("runs/version_1/checkpoints/*step=5.ckpt"))
    with pytest.raises(SystemExit) as stopped:
        main([*again, "--model.loss=IPOLoss"])
    assert stopped.value.code == 1
    assert "loss.class_path: 'lit_dpo.losses.dpo.DPOLoss' in the checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*again, "--model.optimizer.lr=0.02"])
    assert "trained with lr=0.01 but the configuration says 0.02" in capsys.readouterr().err


@pytest.mark.parametrize("start", ["losses/cdpo.yaml", "losses/ipo.yaml", "losses/dpo.yaml"])
@pytest.mark.parametrize(
    ("swap", "expected"),
    [
        ("IPOLoss", {"class_path": "lit_dpo.IPOLoss", "init_args": {"beta": 0.1, "average": "mean"}}),
        ("CDPOLoss", {"class_path": "lit_dpo.losses.CDPOLoss", "init_args": {"beta": 0.1, "label_smoothing": 0.1}}),
        ("DPOLoss", {"class_path": "lit_dpo.losses.DPOLoss", "init_args": {"beta": 0.1}}),
        (str(CONFIGS / "losses/ipo.yaml"), yaml.safe_load((CONFIGS / "losses/ipo.yaml").read_text())),
        (str(CONFIGS / "losses/dpo.yaml"), yaml.safe_load((CONFIGS / "losses/dpo.yaml").read_text())),
    ],
)
def test_a_loss_is_swapped_after_a_config_by_name_or_fragment(capsys, here, start, swap, expected):
    """And nothing of the old one stays: a stale argument would be an error, a dropped one a silent change."""
    (here / "experiment.yaml").write_text(f"model:\n  policy: {{model: x}}\n  loss: {CONFIGS / start}\n")
    found = _printed(capsys, "fit", "--config", "experiment.yaml", f"--model.loss={swap}")
    loss = found["model"]["init_args"]["loss"]
    assert loss["init_args"] == expected["init_args"]
    assert loss["class_path"].rsplit(".", 1)[1] == expected["class_path"].rsplit(".", 1)[1]


def test_a_shared_argument_survives_a_swap_when_typed_after_it(capsys, here):
    found = _printed(capsys, "fit", "--model.policy.model=x", "--model.loss=IPOLoss", "--model.loss.beta=0.7")
    assert found["model"]["init_args"]["loss"]["init_args"]["beta"] == 0.7


def test_a_logger_by_another_class_has_no_directory_that_nobody_typed(tiny_model, pairs_file, here, capsys):
    """`CSVLogger` has no default for it: an error that names the option; with it, runs are numbered."""
    swapped = _arguments(tiny_model, pairs_file, "--trainer.logger=CSVLogger", "--trainer.log_every_n_steps=1")
    with pytest.raises(SystemExit) as stopped:
        main(swapped)
    assert stopped.value.code == 2
    assert "Expected `--trainer.logger.save_dir`" in capsys.readouterr().err
    assert not list(here.iterdir())
    for number in range(2):
        main([*swapped, "--trainer.logger.save_dir=csv"])
        run = here / "csv" / "lightning_logs" / f"version_{number}"
        assert {"config.yaml", "metrics.csv", "adapter"} <= {path.name for path in run.iterdir()}
    assert [path.name for path in here.iterdir()] == ["csv"]


def test_a_logger_with_three_names_gets_a_configuration_file_per_run(tiny_model, pairs_file, here):
    """`save_dir`, `name` and `version` are all that W&B's and MLflow's have in common."""
    arguments = _arguments(tiny_model, pairs_file, "--trainer.logger=remote.Remote", "--trainer.logger.save_dir=logs")
    (here / "remote.py").write_text(
        "from lightning.pytorch.loggers import Logger\n"
        "class Remote(Logger):\n"
        "    count = 0\n"
        "    def __init__(self, save_dir: str, project: str = 'lab'):\n"
        "        super().__init__()\n"
        "        Remote.count += 1\n"
        "        self._values = save_dir, project, f'run{Remote.count}'\n"
        "    save_dir = property(lambda self: self._values[0])\n"
        "    name = property(lambda self: self._values[1])\n"
        "    version = property(lambda self: self._values[2])\n"
        "    def log_metrics(self, metrics, step=None): pass\n"
        "    def log_hyperparams(self, params, *args, **kwargs): pass\n"
    )
    for _ in range(2):
        main(arguments)
    files = sorted(path.relative_to(here) for path in here.glob("logs/**/config.yaml"))
    assert [str(path) for path in files] == ["logs/lab/run1/config.yaml", "logs/lab/run2/config.yaml"]


def test_a_run_that_would_write_over_another_stops_before_weights_load(tiny_model, pairs_file, here, capsys):
    arguments = _arguments(tiny_model, pairs_file, "--trainer.logger.version=7")
    main(arguments)
    before = (here / "runs" / "version_7" / "config.yaml").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--seed_everything=1"])
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert "runs/version_7/config.yaml is another's" in error
    assert "parameters train" not in error
    assert (here / "runs" / "version_7" / "config.yaml").read_bytes() == before


def test_the_saved_configuration_is_the_run_itself(tiny_model, pairs_file, here, capsys):
    """Of a resumed run too: the run from its start. And a second run by it is the same, in a directory of its own."""
    typed = [*_arguments(tiny_model, pairs_file), "--trainer.log_every_n_steps=1", "--model.loss=SimPOLoss"]
    typed += ["--model.lr_scheduler=constant"]  # else more steps would be another schedule
    main(typed)
    (checkpoint,) = here.glob("runs/version_0/checkpoints/*.ckpt")
    main([*typed, "--trainer.max_steps=4", "--ckpt_path", str(checkpoint)])
    capsys.readouterr()
    first, resumed = (here / "runs" / f"version_{number}" / "config.yaml" for number in range(2))
    assert (
        _printed(capsys, "fit", "--config", str(first)) == _printed(capsys, *typed) == yaml.safe_load(first.read_text())
    )
    longer = [*typed, "--trainer.max_steps=4"]
    assert _printed(capsys, "fit", "--config", str(resumed)) == _printed(capsys, *longer)
    assert resumed.read_text().startswith(f"# resumed from {checkpoint}\n")
    assert not list(here.rglob(".config.yaml*"))
    main(["fit", "--config", str(first)])
    adapters = [here / "runs" / run / "adapter" / "adapter_model.safetensors" for run in ("version_0", "version_2")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    main(["validate", "--config", str(first), f"--data.val={pairs_file}", "--ckpt_path", str(checkpoint)])
    measured = yaml.safe_load((here / "runs" / "version_3" / "config.yaml").read_text())
    assert measured["ckpt_path"] == str(checkpoint)


def test_a_random_seed_is_saved_as_the_one_that_was_used(tiny_model, pairs_file, here):
    main(_arguments(tiny_model, pairs_file, "--seed_everything=true"))
    saved = yaml.safe_load((here / "runs" / "version_0" / "config.yaml").read_text())
    assert type(saved["seed_everything"]) is int


def test_a_downstream_package_adds_one_of_each_kind(tiny_model, pairs_file, here, monkeypatch):
    """As a user would: from the project's folder, by class path, nothing registered."""
    project = Path(__file__).parent / "downstream"
    command = _arguments(tiny_model, pairs_file)
    command[1:1] = ["--model=my_lab.WatchedDPO", "--model.length_penalty=0.5"]
    command += ["--model.policy=my_lab.FrozenA", "--model.policy.a_scale=2"]
    command += ["--model.loss=my_lab.GradedHingeLoss", "--model.loss.target=2", f"--data.val={pairs_file}"]
    command += ["--model.reference=my_lab.WeakerReference", "--data.format=my_lab.Graded", "--data.format.hardest=2"]
    command += [*EPOCH, f"--trainer.logger.save_dir={here / 'runs'}"]
    running = ranks.command(command, log=here / "log.txt", cwd=project)
    assert running.wait() == 0, running.output()[-3000:]
    config = yaml.safe_load((here / "runs" / "version_0" / "config.yaml").read_text())
    assert config["model"]["class_path"] == "my_lab.WatchedDPO"
    assert config["model"]["init_args"]["policy"]["class_path"] == "my_lab.FrozenA"
    assert config["model"]["init_args"]["policy"]["init_args"]["model"] == str(tiny_model)
    assert config["model"]["init_args"]["loss"]["init_args"] == {"beta": 0.1, "target": 2.0}
    assert config["model"]["init_args"]["reference"]["class_path"] == "my_lab.WeakerReference"
    assert config["data"]["init_args"]["format"] == {"class_path": "my_lab.Graded", "init_args": {"hardest": 2.0}}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(here / "runs" / "version_0"))
    events.Reload()
    assert {"val/length_bias", "train/length_bias"} <= set(events.Tags()["scalars"])


def test_validating_without_validation_data_is_an_error(tiny_model, pairs_file, here, capsys):
    arguments = _arguments(tiny_model, pairs_file)
    with pytest.raises(SystemExit) as stopped:
        main(["validate", *(one for one in arguments[1:] if "max_steps" not in one)])
    assert stopped.value.code == 1
    assert "--data.val" in capsys.readouterr().err
    assert not list(here.iterdir())


def test_a_refused_value_is_said_in_few_lines(tiny_model, pairs_file, here, capsys):
    with pytest.raises(SystemExit):
        main(_arguments(tiny_model, pairs_file, "--model.loss.beta=-1"))
    error = capsys.readouterr().err
    assert "Expected `beta` > 0 but got -1" in error
    assert len(error) < 800


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


GOOD = '{"prompt": "Q?", "chosen": " yes", "rejected": " no"}\n'

BAD = {
    "a missing file": (["--data.train=nowhere.jsonl"], "nowhere.jsonl", ""),
    "a missing column": (["--data.train=bad.jsonl"], "`ask`", GOOD.replace("prompt", "ask")),
    "an empty file": (["--data.train=bad.jsonl"], "bad.jsonl", ""),
    "a row without an answer": (
        ["--data.train=bad.jsonl"],
        "bad.jsonl, row 1 (from 0)",
        GOOD + GOOD.replace(" yes", ""),
    ),
    "a prompt longer than the limit": (
        ["--data.train=bad.jsonl", "--data.max_length=20", "--data.truncation=error"],
        "20",
        GOOD + json.dumps({"prompt": "long " * 30, "chosen": " yes", "rejected": " no"}) + "\n",
    ),
    "no pair that fits": (["--data.train=bad.jsonl", "--data.max_length=3"], "max_length", GOOD),
    "a broken line": (["--data.train=bad.jsonl"], "bad.jsonl", GOOD + "{broken\n"),
    "no data": (["--data.train=null"], "--data.train", ""),
    "a model that is not there": (["--model.policy.model=./nowhere"], "nowhere", ""),
    "a model directory without weights": (["--model.policy.model=no_weights"], "safetensors", ""),
    "an unknown target module": (['--model.policy.target_modules=["q_prj"]'], "q_proj", ""),
    "an argument of another loss": (["--model.loss.gamma=1"], "gamma", ""),
    "a loss that is not there": (["--model.loss=HingeLos"], "HingeLos", ""),
    "a value outside its domain": (["--model.loss.beta=-1"], "`beta` > 0", ""),
    "no length": (["--trainer.max_steps=-1"], "how long shall it train", ""),
    "a limit that leaves no room": (["--data.max_length=1"], "`max_length` >= 2", ""),
    "limits that do not go together": (["--data.truncation=truncate_both"], "max_prompt_length", ""),
    "a broken expression": (["--model.policy.target_modules=(["], "regular expression", ""),
    "an attention that is not installed": (["--model.policy.attention=flash_attention_2"], "flash_attn", ""),
    "the directory next to a checkpoint": (["--ckpt_path=no_weights"], "no_weights.ckpt", ""),
    "a network without a plan": (["--plan_network=100"], "`--plan_network` says something to `--plan`", ""),
    "a file that is no checkpoint": (["--ckpt_path=bad.jsonl"], "is not one", GOOD),
    "a checkpoint by a name": (["--ckpt_path=best"], "name one of", ""),
    "a checkpoint that is not there": (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_a_sentence(tiny_model, pairs_file, here, capsys, monkeypatch, case):
    """A clear message, an exit code that is not 0, no traceback, no weights read, nothing left behind."""
    import transformers

    arguments, expected, content = BAD[case]
    _write(here / "bad.jsonl", content)
    (here / "no_weights").mkdir()
    _write(here / "no_weights" / "config.json", (tiny_model / "config.json").read_text())

    def refuse(*_, **__):
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(SystemExit) as stopped:
        main(_arguments(tiny_model, pairs_file, *arguments))
    assert stopped.value.code not in (0, None)
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
    assert sorted(path.name for path in here.iterdir()) == ["bad.jsonl", "no_weights"]
