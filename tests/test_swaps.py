"""Configuration never changes a number that nobody typed.

A class that is chosen has its own defaults and what was typed for it, whatever class, default or file stood there
before, in every spelling.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import jsonargparse
import pytest
import torch
import yaml
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import lit_dpo.losses as losses
import lit_dpo.references as references
from lit_dpo import DPOModule, PreferenceDataModule
from lit_dpo.cli import main
from lit_dpo.data.formats import PreferenceFormat, Triples
from lit_dpo.lightning_cli import LitDPOCLI
from lit_dpo.losses import DPOLoss, PreferenceLoss
from lit_dpo.parser import Parser

CONFIGS = Path(__file__).parents[1] / "configs"
LOSSES = [getattr(losses, name) for name in losses.__all__ if name != "PreferenceLoss"]
OPTIMIZERS = [
    one for _, one in sorted(vars(torch.optim).items()) if isinstance(one, type) and one is not torch.optim.Optimizer
    and issubclass(one, torch.optim.Optimizer)
] + [bitsandbytes.optim.AdamW8bit, bitsandbytes.optim.Lion8bit]  # fmt: skip


# ---- classes of a user's own ----


@dataclass(frozen=True)
class Strong(PreferenceLoss):
    """A loss with another default, as a project of a user's has it."""

    beta: float = 5.0

    def __call__(self, pairs: Any) -> Any:
        return -self.beta * pairs.margin


@dataclass(frozen=True)
class StrongDPO(DPOLoss):
    """The same, as a subclass of the parameter's default class."""

    beta: float = 5.0
    steps: int = 3


@dataclass(frozen=True)
class Outer(PreferenceLoss):
    """A loss that holds another."""

    part: PreferenceLoss = StrongDPO()

    def __call__(self, pairs: Any) -> Any:
        return self.part(pairs)


@dataclass(frozen=True)
class Questions(Triples):
    """Other columns by default."""

    prompt: str = "question"


class Hot(DPOModule):
    """A module with an argument of its own, and another default."""

    def __init__(self, *args: Any, heat: float = 0.5, warmup_ratio: float = 0.25, **kwargs: Any) -> None:
        super().__init__(*args, warmup_ratio=warmup_ratio, **kwargs)
        self.heat = heat


class Warm(DPOModule):
    """Another, whose argument has the same name."""

    def __init__(self, *args: Any, heat: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heat = heat


class Small(DPOModule):
    """One that fixes its loss."""

    def __init__(self, policy: Any, reference: references.Reference | None = None) -> None:
        super().__init__(policy, reference=reference)


class Streams(PreferenceDataModule):
    """A data module with a default of its own."""

    def __init__(self, *args: Any, max_length: int = 77, shards: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, max_length=max_length, **kwargs)


for _own in (Strong, StrongDPO, Outer, Questions, Hot, Warm, Small, Streams):  # named by this path on a command line
    _own.__module__ = "test_swaps"


# ---- parsers: of one parameter, which is quick, and of the whole command ----


def _parser(of: type, *kept: str) -> Parser:
    """The command's parser, with these parameters of one of its classes only."""
    parser = Parser()
    parser.is_command = True
    parser.add_argument("--config", action=ActionConfigFile)
    skip = set(inspect.signature(of).parameters) - set(kept)
    parser.add_class_arguments(of, "of", skip=skip, fail_untyped=False, sub_configs=True)
    return parser


@pytest.fixture(scope="module")
def command():
    """Parses arguments of `fit` as the command does; returns the plain dictionary that `--print_config` would print."""

    class Parses(LitDPOCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise StopIteration(parser)

    with pytest.raises(StopIteration) as stopped:
        Parses([])
    parser = stopped.value.value

    def parse(*arguments: str) -> dict[str, Any]:
        return _plain(parser.parse_args(["fit", *arguments])["fit"])

    return parse


def _plain(value: Any) -> Any:
    """As in YAML, without marks of the parser's own."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if not key.startswith("__")}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _path(of: type) -> str:
    return f"{of.__module__}.{of.__qualname__}"


def _class(spec: dict[str, Any]) -> Any:
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


# ---- losses ----


@pytest.fixture(scope="module")
def loss_of():
    parser = _parser(DPOModule, "loss")
    return lambda *arguments: _plain(parser.parse_args(list(arguments)).of.loss)


def _own_defaults(of: type) -> dict[str, Any]:
    """A dataclass's, as YAML has them: a default instance is its class and fields."""
    given = {}
    for field in dataclasses.fields(of):
        if field.init:
            value = field.default
            given[field.name] = _own_defaults(type(value)) if dataclasses.is_dataclass(value) else value
    return given


def _arguments_of(spec: dict[str, Any]) -> dict[str, Any]:
    """The same of a parsed configuration."""
    return {
        key: _arguments_of(value) if isinstance(value, dict) and "class_path" in value else value
        for key, value in spec.get("init_args", {}).items()
    }


@pytest.mark.parametrize("loss", [*LOSSES, Strong, StrongDPO, Outer], ids=lambda one: one.__name__)
def test_a_loss_that_is_named_has_the_defaults_of_its_class(loss_of, loss):
    for name in (loss.__name__, _path(loss)):
        found = loss_of(f"--of.loss={name}")
        assert _class(found) is loss
        assert _arguments_of(found) == _own_defaults(loss)


def _befores(loss: type, here: Path) -> list[list[str]]:
    """How a loss, with something typed for it, may stand there: by a file, with its fragment if it has one, or not."""
    name, fragment = _path(loss), CONFIGS / "losses" / f"{loss.__name__.removesuffix('Loss').lower()}.yaml"
    typed = {"beta": 0.77} if any(field.name == "beta" and field.init for field in dataclasses.fields(loss)) else {}
    spec = str(fragment) if fragment.is_file() else {"class_path": name, "init_args": typed}
    file = here / f"{loss.__name__}.yaml"
    file.write_text(yaml.safe_dump({"of": {"loss": spec}}))
    arguments = [f"--of.loss={name}", *(f"--of.loss.{key}={value}" for key, value in typed.items())]
    return [["--config", str(file)], arguments]


def _afters(loss: type, here: Path) -> list[list[str]]:
    """How another may be named after it, with nothing typed for it."""
    name, short = _path(loss), loss.__name__
    spec = {"class_path": name}
    files = {
        "after.fragment": spec,
        "after": {"of": {"loss": spec}},
        "after.name": {"of": {"loss": short}},
        "after.empty": {"of": {"loss": {**spec, "init_args": {}}}},
    }
    for file, content in files.items():
        (here / f"{short}.{file}.yaml").write_text(yaml.safe_dump(content))
    return [
        [f"--of.loss={short}"],
        [f"--of.loss={name}"],
        ["--of.loss", json.dumps(spec)],
        [f"--of.loss={here}/{short}.after.fragment.yaml"],
        ["--of", json.dumps({"loss": spec})],
        *(["--config", f"{here}/{short}.{file}.yaml"] for file in list(files)[1:]),
    ]


def test_every_loss_after_every_other_has_its_own_defaults(loss_of, tmp_path):
    """All ordered pairs, each loss with two ways to have stood there; the ways to name the next one in turn."""
    mine = [*LOSSES, Strong, StrongDPO, Outer]
    befores = {one: _befores(one, tmp_path) for one in mine}
    afters = {one: itertools.cycle(_afters(one, tmp_path)) for one in mine}
    alone = {one: loss_of(f"--of.loss={_path(one)}")["init_args"] for one in mine}
    count = 0
    for before, after in itertools.permutations(mine, 2):
        for first in befores[before]:
            arguments = [*first, *next(afters[after])]
            found = loss_of(*arguments)
            assert _class(found) is after, arguments
            assert found["init_args"] == alone[after], arguments
            count += 1
    assert count == 2 * 36 * 35


@pytest.mark.parametrize("kind", range(8))
def test_what_is_typed_for_a_loss_holds_in_every_spelling(loss_of, tmp_path, kind):
    (tmp_path / "dpo.yaml").write_text("of:\n  loss: {class_path: DPOLoss, init_args: {beta: 0.3}}\n")
    (tmp_path / "fragment.yaml").write_text("class_path: SimPOLoss\ninit_args: {gamma: 3}\n")
    (tmp_path / "simpo.yaml").write_text("of:\n  loss: {class_path: SimPOLoss, init_args: {gamma: 3}}\n")
    (tmp_path / "later.yaml").write_text("of:\n  loss: {init_args: {gamma: 3}}\n")
    (tmp_path / "link.yaml").write_text("of:\n  loss: fragment.yaml\n")
    after = [
        ["--of.loss=SimPOLoss", "--of.loss.gamma=3"],
        ["--of.loss=lit_dpo.losses.SimPOLoss", "--of.loss.init_args.gamma=3"],
        ["--of.loss", '{"class_path": "SimPOLoss", "init_args": {"gamma": 3}}'],
        [f"--of.loss={tmp_path}/fragment.yaml"],
        [f"--config={tmp_path}/simpo.yaml"],
        ["--of.loss=SimPOLoss", f"--config={tmp_path}/later.yaml"],
        [f"--config={tmp_path}/link.yaml"],
        ["--of", '{"loss": {"class_path": "SimPOLoss", "init_args": {"gamma": 3}}}'],
    ][kind]
    for before in ([], [f"--config={tmp_path}/dpo.yaml"], ["--of.loss=IPOLoss", "--of.loss.beta=0.9"]):
        found = loss_of(*before, *after)
        assert found["init_args"] == {"beta": 2.0, "gamma": 3.0, "label_smoothing": 0.0, "link": "sigmoid"}
        assert loss_of(*before, *after, "--of.loss.beta=7")["init_args"]["beta"] == 7
        # named again, by whatever path, it is the same class
        for again in ("SimPOLoss", "lit_dpo.losses.SimPOLoss", "lit_dpo.losses.simpo.SimPOLoss"):
            assert loss_of(*before, *after, f"--of.loss={again}")["init_args"]["gamma"] == 3


def test_a_value_typed_before_the_class_is_not_that_classs(loss_of, caplog):
    caplog.set_level("INFO")
    assert loss_of("--of.loss.beta=0.3", "--of.loss=SimPOLoss")["init_args"]["beta"] == 2.0
    assert caplog.messages == ["SimPOLoss has its own defaults: dropped beta=0.3, given for DPOLoss"]


def test_files_in_their_order(loss_of, tmp_path):
    """The later one wins, and holds what is typed for its class; a third can go on with it."""
    (tmp_path / "a.yaml").write_text("of:\n  loss: {class_path: IPOLoss, init_args: {beta: 0.3, average: sum}}\n")
    (tmp_path / "b.yaml").write_text("of:\n  loss: {class_path: SimPOLoss, init_args: {gamma: 3}}\n")
    (tmp_path / "c.yaml").write_text("of:\n  loss: {init_args: {link: hinge}}\n")
    a, b, c = (f"--config={tmp_path}/{name}.yaml" for name in "abc")
    assert loss_of(a, b)["init_args"]["beta"] == 2.0
    assert loss_of(b, a)["init_args"] == {"beta": 0.3, "average": "sum"}
    assert loss_of(a, b, c)["init_args"] == {"beta": 2.0, "gamma": 3.0, "label_smoothing": 0.0, "link": "hinge"}


# ---- losses in losses ----


def test_nested_losses_have_their_own_defaults(loss_of, tmp_path):
    (tmp_path / "ld.yaml").write_text(
        "of:\n  loss:\n    class_path: LDDPOLoss\n    init_args:\n"
        "      loss: {class_path: IPOLoss, init_args: {beta: 0.9}}\n      surplus_weight: 0.25\n"
    )
    (tmp_path / "mix.yaml").write_text(
        "of:\n  loss:\n    class_path: MixtureLoss\n    init_args:\n      weights: [1, 2]\n"
        "      losses: [{class_path: DPOLoss, init_args: {beta: 0.9}}, SFTLoss]\n"
    )
    ld, mix = f"--config={tmp_path}/ld.yaml", f"--config={tmp_path}/mix.yaml"
    # the inner one alone is swapped: what was typed for the outer one stays
    found = loss_of(ld, "--of.loss.loss=SimPOLoss")["init_args"]
    assert found["loss"]["init_args"]["beta"] == 2.0
    assert found["surplus_weight"] == 0.25
    # outer loss to outer loss, both with an inner one
    assert loss_of(ld, "--of.loss=test_swaps.Outer")["init_args"]["part"]["init_args"] == {"beta": 5.0, "steps": 3}
    assert loss_of(mix, "--of.loss=LDDPOLoss")["init_args"]["loss"]["init_args"] == {"beta": 0.1}
    assert loss_of("--of.loss=test_swaps.Outer", "--of.loss.part=DPOLoss")["init_args"]["part"]["init_args"] == {
        "beta": 0.1
    }
    # in a list, at the same place
    two = ["SimPOLoss", "lit_dpo.losses.CalDPOLoss"]
    for spelling in (json.dumps(two), json.dumps([{"class_path": one} for one in two])):
        found = loss_of(mix, f"--of.loss.losses={spelling}")["init_args"]
        assert [one["init_args"]["beta"] for one in found["losses"]] == [2.0, 0.002]
        assert found["weights"] == [1, 2]
    found = loss_of(mix, "--of.loss.losses+=SimPOLoss")["init_args"]["losses"]
    assert [one["init_args"].get("beta") for one in found] == [0.9, None, 2.0]
    (tmp_path / "other.yaml").write_text(f"of:\n  loss:\n    init_args:\n      losses: {json.dumps(two)}\n")
    found = loss_of(mix, f"--config={tmp_path}/other.yaml")["init_args"]["losses"]
    assert [one["init_args"]["beta"] for one in found] == [2.0, 0.002]


# ---- optimizers ----


def _signature(of: type, *skipped: str) -> dict[str, Any]:
    parameters = inspect.signature(of).parameters.values()
    return {
        one.name: _plain(one.default)
        for one in parameters
        if one.default is not inspect.Parameter.empty and one.name not in skipped
    }


def test_every_optimizer_after_every_other_has_its_own_defaults(tmp_path):
    """`AdamW` is that of the parameter's default, from which learning rate and weight decay are documented."""
    parser = _parser(DPOModule, "optimizer")
    expected = {one: _signature(one) for one in OPTIMIZERS}
    expected[torch.optim.AdamW] |= {"lr": 1e-5, "weight_decay": 0.0}
    assert {torch.optim.Adafactor, torch.optim.Muon, torch.optim.SGD} < set(OPTIMIZERS)
    for before in OPTIMIZERS:
        content = {"class_path": _path(before), "init_args": {"lr": 0.123}}
        (tmp_path / f"{before.__name__}.yaml").write_text(yaml.safe_dump({"of": {"optimizer": content}}))
    for before, after in itertools.permutations(OPTIMIZERS, 2):
        for first in (
            [f"--config={tmp_path}/{before.__name__}.yaml"],
            [f"--of.optimizer={_path(before)}", "--of.optimizer.lr=0.123"],
        ):
            found = _plain(parser.parse_args([*first, f"--of.optimizer={_path(after)}"]).of.optimizer)
            assert _class(found) is after
            assert found["init_args"] == expected[after], (before, after)
    typed = parser.parse_args(["--of.optimizer.lr=3", "--of.optimizer=torch.optim.Muon", "--of.optimizer.lr=0.5"])
    assert typed.of.optimizer.init_args.lr == 0.5


# ---- references, formats, loggers, callbacks ----


def test_every_reference_after_every_other_has_its_own_defaults(tmp_path):
    parser = _parser(DPOModule, "reference")
    every = [getattr(references, name) for name in references.__all__ if name.endswith("Reference")]
    every = [one for one in every if one is not references.Reference and not inspect.isabstract(one)]
    required = {"ModelReference": {"model": "some/model"}}
    for before, after in itertools.permutations(every, 2):
        typed = dict.fromkeys(_own_defaults(before).keys() & {"quantization"}, "int8")
        typed |= required.get(before.__name__, {})
        (tmp_path / "before.yaml").write_text(
            yaml.safe_dump({"of": {"reference": {"class_path": _path(before), "init_args": typed}}})
        )
        given = [f"--of.reference.{key}={value}" for key, value in required.get(after.__name__, {}).items()]
        found = _plain(
            parser.parse_args([f"--config={tmp_path}/before.yaml", f"--of.reference={after.__name__}", *given])
        )
        alone = _plain(parser.parse_args([f"--of.reference={after.__name__}", *given]))
        assert found["of"]["reference"] == alone["of"]["reference"]
    nested = ["--of.reference=CachedReference", "--of.reference.reference=ModelReference"]
    nested += ["--of.reference.reference.model=a", "--of.reference.reference.quantization=int8"]
    found = parser.parse_args([*nested, "--of.reference.reference=BaseReference"]).of.reference.init_args
    assert _class(found.reference) is references.BaseReference
    assert "init_args" not in found.reference


def test_a_format_a_logger_and_callbacks_too(command, tmp_path):
    policy = "--model.policy.model=x"
    found = command(policy, "--data.format.chosen=good", "--data.format=test_swaps.Questions")
    expected = {**_own_defaults(Triples), "prompt": "question"}
    assert found["data"]["init_args"]["format"]["init_args"] == expected
    assert issubclass(Questions, PreferenceFormat)

    found = command(policy, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=here")["trainer"]["logger"]
    assert found["init_args"] == {"save_dir": "here", **_signature(CSVLogger)}
    (tmp_path / "csv.yaml").write_text(
        "trainer:\n  logger: {class_path: CSVLogger, init_args: {save_dir: there, flush_logs_every_n_steps: 3}}\n"
    )
    found = command(policy, f"--config={tmp_path}/csv.yaml", "--trainer.logger=TensorBoardLogger")["trainer"]["logger"]
    assert found == command(policy)["trainer"]["logger"]
    assert (found["init_args"]["save_dir"], found["init_args"]["name"]) == ("runs", "")
    assert issubclass(_class(found), TensorBoardLogger)

    (tmp_path / "callbacks.yaml").write_text(
        "trainer:\n  callbacks:\n    - {class_path: EarlyStopping, init_args: {monitor: x, patience: 9, mode: max}}\n"
    )
    file = f"--config={tmp_path}/callbacks.yaml"
    expected = _signature(ModelCheckpoint)
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
    found = command(quickstart, "--model=test_swaps.Hot", "--model.heat=2")["model"]["init_args"]
    assert found == {**base, "heat": 2.0}  # a warm-up of 0.1 was typed in the file
    assert not caplog.messages
    found = command("--model.policy.model=x", "--model.loss=IPOLoss", "--model=test_swaps.Hot")["model"]["init_args"]
    assert found["warmup_ratio"] == 0.25  # 0 was typed by nobody
    assert found["loss"]["init_args"] == {"beta": 0.1, "average": "mean"}
    typed = command("--model.policy.model=x", "--model.warmup_ratio=0.0", "--model=test_swaps.Hot")
    assert typed["model"]["init_args"]["warmup_ratio"] == 0.0
    assert not caplog.messages


@pytest.mark.parametrize("spelling", ["arguments", "json", "file"])
def test_from_one_subclass_to_another_what_their_base_has_is_taken_over(command, tmp_path, caplog, spelling):
    caplog.set_level("INFO")
    init_args = {"policy": {"model": "x", "r": 4}, "loss": "SimPOLoss", "heat": 9.0, "warmup_ratio": 0.5}
    (tmp_path / "hot.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": "test_swaps.Hot", "init_args": init_args}})
    )
    (tmp_path / "warm.yaml").write_text("model: {class_path: test_swaps.Warm}\n")
    after = {
        "arguments": "--model=test_swaps.Warm",
        "json": '--model={"class_path": "test_swaps.Warm"}',
        "file": f"--config={tmp_path}/warm.yaml",
    }[spelling]
    found = command(f"--config={tmp_path}/hot.yaml", after)["model"]["init_args"]
    assert found["heat"] == 0.1  # of the same name, and another thing
    assert (found["warmup_ratio"], found["policy"]["r"]) == (0.5, 4)
    assert found["loss"]["init_args"]["beta"] == 2.0
    assert caplog.messages == ["Warm has its own defaults: dropped heat=9.0, given for Hot"]


def test_what_a_subclass_does_not_take_is_dropped_aloud(command, tmp_path, caplog):
    caplog.set_level("INFO")
    arguments = ["--model.policy.model=x", "--model.loss.beta=3", "--model=test_swaps.Small"]
    assert set(command(*arguments)["model"]["init_args"]) == {"policy", "reference"}
    assert caplog.messages == ["Small has its own defaults: dropped loss, given for DPOModule"]


def test_the_data_class_likewise(command, caplog):
    caplog.set_level("INFO")
    start = ["--model.policy.model=x", "--data.train=a.jsonl", "--data.format.prompt=question"]
    found = command(*start, "--data=test_swaps.Streams", "--data.shards=4")["data"]["init_args"]
    assert (found["train"], found["shards"], found["max_length"]) == ("a.jsonl", 4, 77)
    assert found["format"]["init_args"]["prompt"] == "question"
    found = command(*start, "--data.max_length=1024", "--data=test_swaps.Streams")["data"]["init_args"]
    assert found["max_length"] == 1024
    assert not caplog.messages


# ---- the whole command ----


@pytest.mark.parametrize("number", range(len(LOSSES)))
def test_the_whole_command_swaps_every_loss(command, number):
    before, after = LOSSES[number - 1], LOSSES[number]
    fragment = CONFIGS / "losses" / f"{before.__name__.removesuffix('Loss').lower()}.yaml"
    found = command("--model.policy.model=x", f"--model.loss={fragment}", f"--model.loss={after.__name__}")
    assert _arguments_of(found["model"]["init_args"]["loss"]) == _own_defaults(after)


class Witness(Callback):
    """Writes down with what a run trained."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (group, *_), optimizer = trainer.optimizers[0].param_groups, type(trainer.optimizers[0])
        moved = [bool(p.any()) for name, p in pl_module.model.named_parameters() if "lora_B" in name]
        found = {"loss": repr(pl_module.loss), "optimizer": optimizer.__name__, "moved": all(moved)}
        found["group"] = {key: value for key, value in group.items() if isinstance(value, int | float | tuple)}
        Path("witness.json").write_text(json.dumps(found))


Witness.__module__ = "test_swaps"


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
          "--trainer.callbacks+=test_swaps.Witness"])  # fmt: skip
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
        ("--model.optimizer=torch.optim.SGD", "--model.optimizer.betas=[0,1]"): ("torch.optim.SGD", "betas"),
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
    parser = _parser(DPOModule, "loss")
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
