"""The LightningCLI behind `lit-dpo`. Imported only when a command runs: Lightning's CLI takes seconds to load."""

from __future__ import annotations

import logging
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.errors import LitDPOError, ResumeError, TrainingError
from lit_dpo.module import DPOModule

_LOGGER = {
    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
    # `default_hp_metric` would log -1 before anything was measured
    "init_args": {"save_dir": "runs", "name": "", "default_hp_metric": False},
}


class _Parser(LightningArgumentParser):
    """Ends with the sentence that matters, not with a page of usage above and the whole configuration below it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse is only trying something
            super().error(message, ex)
        _refuse(message + (": `--print_config` shows what is." if message.endswith("is not accepted") else ""))


_NOISE = ("Given value", "Expected a <class 'NoneType'>", "Union subtypes", "Subtypes:", "Errors:")


def _refuse(message: str) -> NoReturn:
    wanted = [line.strip().removeprefix("- ") for line in message.splitlines() if not any(n in line for n in _NOISE)]
    sys.stderr.write("lit-dpo: error: " + "\n".join(line for line in wanted if line) + "\n")
    raise SystemExit(2)


class _ProgressBar(RichProgressBar):
    """Lightning's, with names that fit beside the bar."""

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return {name.replace("reward_", ""): value for name, value in shown.items()}


class LitDPOCLI(LightningCLI):
    """`DPOModule` and `PreferenceDataModule`, or any subclass of them by class path, under Lightning's CLI.

    Args:
        args: the command line, without the program's name.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        logging.getLogger("lit_dpo").setLevel(logging.INFO)
        _hush()
        super().__init__(
            DPOModule,
            PreferenceDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            args=args,
            parser_kwargs={"prog": "lit-dpo"},
            parser_class=_Parser,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Defaults: our module and data, and run directories with versions."""
        parser.set_defaults(
            {
                "model": {"class_path": "lit_dpo.module.DPOModule"},
                "data": {"class_path": "lit_dpo.data.datamodule.PreferenceDataModule"},
                "trainer.logger": _LOGGER,
                # it counts packed 4-bit weights as parameters; the module says in one line what trains
                "trainer.enable_model_summary": False,
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Only see that the file is there: upstream parses its hyper-parameters over what was typed.

        What was typed holds; where it contradicts the checkpoint, loading it stops (`lit_dpo.checkpoint.compare`).
        """
        given = self.config[self.config["subcommand"]].get("ckpt_path")
        if not given or "://" in given:
            return
        path = Path(given)
        if given in ("last", "best"):  # every run has a directory of its own, where there is nothing yet
            raise ResumeError(f"Expected a file at `--ckpt_path` but got {given!r}: name one of runs/*/checkpoints/.")
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
            _refuse(str(error))

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """A Rich progress bar unless there is another or none is wanted."""
        config = self.config_init[self.config_init["subcommand"]]["trainer"]
        callbacks = config.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if config.get("logger") is False:
            self.save_config_callback = None  # there is no run directory to keep it in
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            kwargs["callbacks"] = [*callbacks, _ProgressBar()]
        return super().instantiate_trainer(**kwargs)


def _hush() -> None:
    """Leave out what a user can do nothing about, so that what matters is seen."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip: For seamless" not in record.getMessage())
    # a kernel for inference, from a hub; on some CPUs it is asked for at import
    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    kernels.addFilter(lambda record: "gemm_4bit_forward" not in record.getMessage())
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Total length of `list` across ranks is zero.*")
    warnings.filterwarnings("ignore", message=".*The dirpath has changed from.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message=".*fan_in_fan_out is set to False.*")
