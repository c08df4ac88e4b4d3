"""What the tests of swapped classes share: classes of a user's own, parsers, and what defaults are."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.callbacks import Callback

import lit_dpo.losses as losses
import lit_dpo.references as references
from lit_dpo import DPOModule, PreferenceDataModule
from lit_dpo.data.formats import Triples
from lit_dpo.lightning_cli import LitDPOCLI
from lit_dpo.losses import DPOLoss, PreferenceLoss
from lit_dpo.parser import Parser

CONFIGS = Path(__file__).parents[1] / "configs"
LOSSES = [getattr(losses, name) for name in losses.__all__ if name != "PreferenceLoss"]
# Those that the whole command parses too, which takes it half a second: losses that hold others, and two that do not.
ON_THE_COMMAND = [
    loss
    for loss in LOSSES
    if loss in (LOSSES[0], LOSSES[-1]) or any("PreferenceLoss" in str(one.type) for one in dataclasses.fields(loss))
]


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


class Witness(Callback):
    """Writes down with what a run trained."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (group, *_), optimizer = trainer.optimizers[0].param_groups, type(trainer.optimizers[0])
        moved = [bool(p.any()) for name, p in pl_module.model.named_parameters() if "lora_B" in name]
        found = {"loss": repr(pl_module.loss), "optimizer": optimizer.__name__, "moved": all(moved)}
        found["group"] = {key: value for key, value in group.items() if isinstance(value, int | float | tuple)}
        Path("witness.json").write_text(json.dumps(found))


# ---- parsers and defaults ----


def parser_of(of: type, *kept: str) -> Parser:
    """The command's parser, with these parameters of one of its classes only."""
    parser = Parser()
    parser.is_command = True
    parser.add_argument("--config", action=ActionConfigFile)
    skip = set(inspect.signature(of).parameters) - set(kept)
    parser.add_class_arguments(of, "of", skip=skip, fail_untyped=False, sub_configs=True)
    return parser


@functools.cache
def command_parser() -> Any:
    """The command's parser, whole, as `main` makes one each time."""

    class Parses(LitDPOCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise StopIteration(parser)

    try:
        Parses(["fit"])
    except StopIteration as stopped:
        return stopped.value


def plain(value: Any) -> Any:
    """As in YAML, without marks of the parser's own."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if not key.startswith("__")}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def path_of(of: type) -> str:
    return f"{of.__module__}.{of.__qualname__}"


def class_of(spec: dict[str, Any]) -> Any:
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def own_defaults(of: type) -> dict[str, Any]:
    """A dataclass's, as YAML has them: a default instance is its class and fields."""
    given = {}
    for field in dataclasses.fields(of):
        if field.init:
            made = field.default_factory is not dataclasses.MISSING
            value = field.default_factory() if made else field.default
            given[field.name] = own_defaults(type(value)) if dataclasses.is_dataclass(value) else value
    return given


def arguments_of(spec: dict[str, Any]) -> dict[str, Any]:
    """The same of a parsed configuration."""
    return {
        key: arguments_of(value) if isinstance(value, dict) and "class_path" in value else value
        for key, value in spec.get("init_args", {}).items()
    }


def signature_defaults(of: type, *skipped: str) -> dict[str, Any]:
    parameters = inspect.signature(of).parameters.values()
    return {
        one.name: plain(one.default)
        for one in parameters
        if one.default is not inspect.Parameter.empty and one.name not in skipped
    }
