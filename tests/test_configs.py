"""Every shipped configuration file parses, and says what it is said to say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

import lit_dpo.losses as losses
from lit_dpo import DPOModule
from lit_dpo.cli import main
from swaps import LOSSES, ON_THE_COMMAND, command_parser, parser_of

CONFIGS = Path(__file__).parents[1] / "configs"
OPTIONS = {"losses": "model.loss", "references": "model.reference", "models": "model.policy", "data": "data",
           "trainers": "trainer"}  # fmt: skip


# The other losses are parsed as the command parses `model.loss`, by a parser that has nothing else.
ALONE = {
    CONFIGS / "losses" / f"{loss.__name__.removesuffix('Loss').lower()}.yaml"
    for loss in set(LOSSES) - set(ON_THE_COMMAND)
}


def _config(capsys, *arguments):
    return _printed(capsys, command_parser(), "fit", *arguments)


@pytest.fixture(scope="module")
def parser_of_losses():
    return parser_of(DPOModule, "loss")


def _printed(capsys, parser, *arguments):
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([*arguments, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_file_parses_and_nothing_in_it_is_swallowed(capsys, parser_of_losses, path):
    kind = path.parent.name
    if path.parent == CONFIGS:
        found = _config(capsys, "--config", str(path))
    elif path in ALONE:
        found = _printed(capsys, parser_of_losses, f"--of.loss={path}")["of"]["loss"]
        _contains(found, yaml.safe_load(path.read_text()))
    else:
        given = [] if kind == "models" else ["--model.policy.model=x"]
        found = _config(capsys, *given, f"--{OPTIONS[kind]}={path}")
        top, *rest = OPTIONS[kind].split(".")
        found = found[top]["init_args"][rest[0]] if rest else found[top]
        # a fragment of a policy leaves out the class
        _contains(found["init_args"] if kind == "models" else found, yaml.safe_load(path.read_text()))


def _contains(found, given):
    for key, value in given.items():
        if isinstance(value, dict):
            _contains(found[key], value)
        elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
            for there, said in zip(found[key], value, strict=True):
                _contains(there, said)
        else:
            assert found[key] == value, key


def test_every_loss_has_a_fragment_and_every_fragment_a_loss():
    files = {path.stem for path in (CONFIGS / "losses").glob("*.yaml")}
    classes = {name.removesuffix("Loss").lower() for name in losses.__all__ if name != "PreferenceLoss"}
    assert files == classes


@pytest.mark.parametrize("loss", LOSSES, ids=lambda one: one.__name__)
def test_what_print_config_writes_of_a_loss_by_short_name_parses_again(capsys, tmp_path, parser_of_losses, loss):
    found = _printed(capsys, parser_of_losses, f"--of.loss={loss.__name__}")
    (tmp_path / "written.yaml").write_text(yaml.safe_dump(found))
    assert _printed(capsys, parser_of_losses, "--config", str(tmp_path / "written.yaml")) == found
    assert found["of"]["loss"]["class_path"].endswith(f".{loss.__name__}")
    assert "Unable" not in str(found)


@pytest.mark.parametrize("loss", ON_THE_COMMAND, ids=lambda one: one.__name__)
def test_so_it_does_on_the_whole_command(capsys, tmp_path, loss):
    found = _config(capsys, "--model.policy.model=x", f"--model.loss={loss.__name__}")
    (tmp_path / "written.yaml").write_text(yaml.safe_dump(found))
    assert _config(capsys, "--config", str(tmp_path / "written.yaml"))["model"] == found["model"]
    assert "Unable" not in str(found)


def test_no_argument_has_another_meaning_in_another_loss():
    """It would be carried over when a loss is swapped by its short name."""
    seen: dict[str, str] = {}
    shared = {"beta", "label_smoothing", "nll_weight", "gamma", "loss"}  # the same knob wherever they are
    for name in losses.__all__:
        for field in dataclasses.fields(getattr(losses, name)):
            if field.init and field.name not in shared and (name, field.name) != ("FDPOLoss", "alpha"):
                assert field.name not in seen, f"{name} and {seen[field.name]} both have `{field.name}`"
                seen[field.name] = name


def test_opt_350m_is_the_tutorial(capsys):
    """opt-350m in 4-bit, LoRA 16/16/0.1 on q and v, batch 2 × 2, lr 2e-5, 3 epochs, β 0.1, 128 of 256 tokens."""
    found = _config(capsys, "--config", str(CONFIGS / "opt-350m.yaml"))
    policy, data = found["model"]["init_args"]["policy"]["init_args"], found["data"]["init_args"]
    assert (policy["model"], policy["quantization"]) == ("facebook/opt-350m", "nf4")
    assert (policy["r"], policy["alpha"], policy["dropout"]) == (16, 16, 0.1)
    assert policy["target_modules"] == ["q_proj", "v_proj"]
    assert found["model"]["init_args"]["loss"]["class_path"].endswith("DPOLoss")
    assert found["model"]["init_args"]["loss"]["init_args"] == {"beta": 0.1}
    assert found["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 2e-5
    assert (data["batch_size"], found["trainer"]["accumulate_grad_batches"]) == (2, 2)
    assert (data["max_prompt_length"], data["max_length"]) == (128, 256)
    assert found["trainer"]["max_epochs"] == 3


ANCHORED = """
x-rate: &rate 3e-3
x-parts:
  loss: &loss {class_path: IPOLoss, init_args: {beta: 0.3}}
  _other: [1, {class_path: nowhere}]
model:
  policy: {model: x}
  loss: *loss
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: *rate}}
"""


def test_a_key_that_holds_anchors_is_one_that_starts_with_x(capsys, tmp_path):
    """And any other that is unknown stays an error, which says so."""
    (tmp_path / "good.yaml").write_text(ANCHORED)
    found = _config(capsys, "--config", str(tmp_path / "good.yaml"))
    assert found["model"]["init_args"]["loss"]["init_args"]["beta"] == 0.3
    assert found["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 3e-3
    assert not [key for key in found if key.startswith("x-")]
    for wrong in ("common", "_parts", "xparts"):
        (tmp_path / "bad.yaml").write_text(ANCHORED.replace("x-parts", wrong))
        parse = main if wrong == "common" else command_parser().parse_args
        with pytest.raises(SystemExit) as stopped:
            parse(["fit", "--config", str(tmp_path / "bad.yaml")])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert f"bad.yaml: there is no key `{wrong}" in error
        assert "`x-`" in error


def test_a_fragments_paths_are_relative_to_the_file_that_names_them(capsys, tmp_path, monkeypatch):
    (tmp_path / "parts" / "losses").mkdir(parents=True)
    (tmp_path / "parts" / "losses" / "inner.yaml").write_text("class_path: IPOLoss\ninit_args: {beta: 0.3}\n")
    (tmp_path / "parts" / "outer.yaml").write_text("class_path: LDDPOLoss\ninit_args: {loss: losses/inner.yaml}\n")
    (tmp_path / "experiment.yaml").write_text("model:\n  policy: {model: x}\n  loss: parts/outer.yaml\n")
    given = [
        ["--config", "experiment.yaml"],
        ["--model.policy.model=x", "--model.loss=parts/outer.yaml"],
        ["--config", "experiment.yaml", "--model.loss=SimPOLoss", "--model.loss=parts/outer.yaml"],
        ["--config", "experiment.yaml", "--model.loss.loss=SimPOLoss", "--model.loss.loss=parts/losses/inner.yaml"],
    ]
    monkeypatch.chdir(tmp_path)
    for arguments in given:
        loss = _config(capsys, *arguments)["model"]["init_args"]["loss"]
        assert loss["init_args"]["loss"]["init_args"] == {"beta": 0.3, "average": "mean"}
