"""The LightningCLI behind `lit-dpo`. Imported only when a command runs: Lightning's CLI takes seconds to load."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.callbacks.export import run_directory
from lit_dpo.callbacks.last import LastCheckpoint
from lit_dpo.callbacks.throughput import LearningRate, Throughput
from lit_dpo.errors import LitDPOError, ResumeError, TrainingError
from lit_dpo.module import DPOModule
from lit_dpo.parser import Parser, refuse
from lit_dpo.policy.devices import default_precision
from lit_dpo.progress import bar, set_up_logs
from lit_dpo.quiet import hush
from lit_dpo.writing import written_whole

if TYPE_CHECKING:
    from jsonargparse import Namespace

_DEFAULTS = {
    "--model": "lit_dpo.DPOModule",
    "--data": "lit_dpo.PreferenceDataModule",
    "--model.policy": "lit_dpo.LoRAPolicy",
    "--model.loss": "lit_dpo.DPOLoss",
    "--model.reference": "lit_dpo.BaseReference",
    "--data.format": "lit_dpo.data.formats.Auto",
    "--trainer.logger": "lightning.pytorch.loggers.TensorBoardLogger",
}
"""Of what `--….help` is, where no class is named."""

_SKEW = 60  # seconds that clocks of machines with one disk may differ

_LOGGER = {
    "class_path": "lit_dpo.callbacks.tensorboard.RunLogger",
    # `default_hp_metric` would log -1 before anything was measured
    "init_args": {"save_dir": "runs", "name": "", "default_hp_metric": False},
}


class _SaveConfig(SaveConfigCallback):
    """Keeps the configuration in the run's own directory, so that the file gives the same run again.

    Lightning's goes to `trainer.log_dir`, which with most loggers is the same for all runs.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the file, whole or not at all, and never over another run's.

        Raises:
            TrainingError: if there is one.
        """
        if self.already_saved:
            return
        self.already_saved = True
        path = run_directory(trainer) / self.config_filename
        if trainer.strategy.broadcast(path.exists()):
            raise TrainingError(
                f"Expected a new directory for this run but {path} is another's: let the logger number it."
            )
        if trainer.is_global_zero:
            with written_whole(path) as temporary:
                temporary.write_text(self._text(stage), encoding="utf-8")

    def _text(self, stage: str) -> str:
        config, resumed = self.config.clone(), None
        if stage == "fit":  # the whole run, from its start; the other commands measure a checkpoint and must name it
            resumed, config.ckpt_path = config.ckpt_path, None
        text = str(self.parser.dump(config, skip_none=False))
        return f"# resumed from {resumed}\n{text}" if resumed else text


class LitDPOCLI(LightningCLI):
    """`DPOModule` and `PreferenceDataModule`, or any subclass of them by class path, under Lightning's CLI.

    Args:
        args: the command line, without the program's name.
        run: whether it begins with one of the trainer's methods, which is then run.
    """

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        set_up_logs()
        logging.getLogger("lit_dpo").setLevel(logging.INFO)
        hush()
        named = next(iter(sys.argv[1:] if args is None else args), "")
        if skipped := self.subcommands().get(named):  # the parser of one alone: each has three hundred settings
            self.subcommands = lambda: {named: skipped}  # type: ignore[method-assign]
        super().__init__(
            DPOModule,
            pl.LightningDataModule,
            save_config_callback=_SaveConfig,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            args=args,
            run=run,
            parser_kwargs={"prog": "lit-dpo" if run else "lit-dpo inspect"},
            parser_class=Parser,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Defaults: our module and data, and run directories with versions."""
        assert isinstance(parser, Parser)
        parser.is_command = True
        parser.usage = "%(prog)s [--config FILE] [--key value ...]"  # not a page of three hundred options
        parser.defaults_below = lambda typed: _precision(typed) | _logger(typed)
        parser.set_defaults(
            {
                "model": {"class_path": "lit_dpo.module.DPOModule"},
                "data": {"class_path": "lit_dpo.data.datamodule.PreferenceDataModule"},
                "trainer.logger": _LOGGER,
                # it counts packed 4-bit weights as parameters; the module says in one line what trains
                "trainer.enable_model_summary": False,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; `--data.help` without a class is about the class that it would be."""
        typed = sys.argv[1:] if args is None else args
        if isinstance(typed, list) and (asked := _help_asked(typed)) is not None:
            args = asked
        super().parse_arguments(parser, args)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--plan",
                type=str,
                nargs="?",
                const="here",
                default=argparse.SUPPRESS,  # no setting of a run, so in none of its files
                help="Say what the run needs, memory and hours, instead of running it; no weights are read. For "
                "`here`, or a GPU by name, such as H100 or RTX-4090.",
            )
            parser.add_argument(
                "--plan_network",
                type=float,
                default=argparse.SUPPRESS,
                help="With `--plan GPU` and several nodes: 10^9 bits a second of each GPU's own port to other nodes "
                "(400 if not said; a node's one port, divided by its GPUs).",
            )
        return parser

    def fit(self, **arguments: Any) -> None:
        """Train, or say what that would need."""
        config = self.config["fit"]
        network = {"network": config["plan_network"]} if "plan_network" in config else {}
        if (device := config.get("plan")) is None:
            if network:
                raise TrainingError("`--plan_network` says something to `--plan`, which was not given. Leave it out.")
            self.trainer.fit(**arguments)
            return
        from lit_dpo.plan import plan

        print(plan(self.model, self.datamodule, self.trainer, device, **network))

    def _parse_ckpt_path(self) -> None:
        """Only see that the file is there: upstream parses its hyper-parameters over what was typed.

        What was typed holds; where it contradicts the checkpoint, loading it stops (`lit_dpo.checkpoint.compare`).
        """
        config = self.config[self.config["subcommand"]]
        given = config.get("ckpt_path")
        if not given or "://" in given:
            return
        if given == "best":  # every run has a directory of its own, where there is nothing yet
            raise ResumeError(f"Expected a file at `--ckpt_path` but got {given!r}: name one of runs/*/checkpoints/.")
        if given == "last":
            config["ckpt_path"] = given = str(_last(_root(config["trainer"])))
            rank_zero_info(f"--ckpt_path last is {given}")
        path = Path(given)
        if path.is_dir():
            raise ResumeError(
                f"Expected a file at `--ckpt_path` but {path} is a directory. To resume, give {path}.ckpt; to start a "
                "new run from that adapter, give it to `policy.adapter_path`."
            )
        if not path.is_file():
            raise ResumeError(f"Expected a checkpoint at `--ckpt_path` but there is no {path.absolute()}.")
        if not zipfile.is_zipfile(path):
            raise ResumeError(f"Expected a checkpoint at `--ckpt_path` but {path} is not one.")

    def instantiate_classes(self) -> None:
        """Build everything; a value that a class refuses is a mistake in the arguments, not a crash."""
        trainer = self.config[self.subcommand]["trainer"]
        if self.subcommand == "fit" and trainer.max_epochs is None and trainer.max_steps == -1 and not trainer.max_time:
            raise TrainingError("Expected `--trainer.max_epochs` or `--trainer.max_steps`: how long shall it train?")
        try:
            super().instantiate_classes()
        except LitDPOError:
            raise
        except (ValueError, MisconfigurationException, ModuleNotFoundError) as error:
            refuse(str(error))

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add a bar or its lines, a last checkpoint, rate and throughput, unless there are others or none is wanted."""
        config = self.config_init[self.config_init["subcommand"]]["trainer"]
        callbacks = config.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if config.get("logger") is False:
            self.save_config_callback = None  # there is no run directory to keep it in
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks = [*callbacks, bar()]
        if config.get("enable_checkpointing") is not False and not any(
            isinstance(c, LastCheckpoint) for c in callbacks
        ):
            callbacks = [*callbacks, LastCheckpoint()]
        if config.get("logger") is not False and not config.get("barebones"):
            own = (kind for kind in (LearningRate, Throughput) if not any(isinstance(c, kind) for c in callbacks))
            callbacks = [*(kind() for kind in own), *callbacks]  # a checkpoint of a step has their part of its row
        return super().instantiate_trainer(**{**kwargs, **self._elsewhere(config), "callbacks": callbacks})

    def _elsewhere(self, config: Any) -> dict[str, Any]:
        """Give what makes the trainer of a plan for machines that are not here."""
        if self.config[self.subcommand].get("plan", "here") == "here":
            return {}
        from lit_dpo.plan import elsewhere

        return elsewhere.settings(config)


def _help_asked(typed: list[str]) -> list[str] | None:
    """Give `--data.help`, where no class follows, the one that was typed before, or the default."""
    for place, option in enumerate(typed):
        of = option.removesuffix(".help")
        if of in _DEFAULTS and of != option and not [one for one in typed[place + 1 : place + 2] if one[:1] != "-"]:
            named = [one.removeprefix(f"{of}=") for one in typed if one.startswith(f"{of}=")]
            return [*typed[:place], option, *(named[-1:] or [_DEFAULTS[of]]), *typed[place + 1 :]]
    return None


def _precision(typed: Any) -> dict[str, Any]:
    """Choose the trainer's precision where nobody did, and say so in a line; `null` is Lightning's 32-true."""
    trainer = typed.get("trainer") or {}
    if "precision" in trainer or trainer.get("plugins"):  # one of these may be a precision
        return {}
    chosen = default_precision(*(str(trainer.get(name, "auto")) for name in ("accelerator", "strategy")))
    if chosen is None:
        return {}
    rank_zero_info(f"precision {chosen}, by the GPU: `--trainer.precision` chooses another one")
    return {"trainer.precision": chosen}


def _logger(typed: Any) -> dict[str, Any]:
    """Give Lightning's own TensorBoard logger, where somebody names it, the place that ours has."""
    path = getattr((typed.get("trainer") or {}).get("logger"), "class_path", "")
    return {"trainer.logger": {**_LOGGER, "class_path": path}} if path.endswith(".TensorBoardLogger") else {}


def _root(trainer: Namespace) -> Path:
    """Where the runs of a configuration are."""
    logger = trainer.get("logger")
    saved = logger.init_args.get("save_dir") if hasattr(logger, "init_args") else None
    return Path(saved or trainer.get("default_root_dir") or ".")


def _last(root: Path) -> Path:
    """Find the newest `last.ckpt` of any run, by the files' times; where a clock was changed these may be wrong.

    Raises:
        ResumeError: if there is none, or the newest of several is dated in the future.
    """
    found = [*root.glob("last.ckpt"), *root.glob("*/last.ckpt"), *root.glob("*/*/last.ckpt")]
    if not found:
        raise ResumeError(f"Expected a run with a `last.ckpt` in {root.absolute()} but there is none.")
    times = {file: file.stat().st_mtime for file in found}
    newest = max(found, key=times.__getitem__)
    if len(found) > 1 and times[newest] > time.time() + _SKEW:
        others = ", ".join(str(file) for file in sorted(found)[:5])
        raise ResumeError(
            f"Expected to find the last of {len(found)} runs by the times of their files but {newest} is dated in the "
            f"future, as after a change of the clock: name one with `--ckpt_path`, of {others}."
        )
    last = max((file for file in found if file.parent.parent == newest.parent.parent), key=_number)
    if _number(last) > _number(newest) >= 0:  # an older run may have been resumed; or a clock was changed
        rank_zero_info(f"by the files' times {newest} is newer than {last}, of a run with a higher number")
    return newest


def _number(file: Path) -> int:
    """Return the number of the run that a file is of, or -1."""
    digits = file.parent.name.removeprefix("version_")
    return int(digits) if digits.isdecimal() and digits != file.parent.name else -1
