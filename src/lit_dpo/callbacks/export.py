from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.checkpoint import check_finite, check_writable, save_adapter
from lit_dpo.policy import adapter_parameters
from lit_dpo.writing import refusals


class AdapterExport(pl.Callback):
    """Writes the policy as a PEFT directory with its tokenizer at the end of `fit`.

    `AutoPeftModelForCausalLM.from_pretrained(directory)` and `pipeline("text-generation", model=directory)` load it.
    The former loads the commit of the base that it was trained on, the latter the main branch unless given `revision=`.

    Args:
        directory: where the last one goes; `adapter/` in the run's directory by default.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See that the directory can be written to."""
        if self.directory:
            check_writable(Path(self.directory))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the last one."""
        directory = run_directory(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            check_finite(adapter_parameters(pl_module.model))
            directory = Path(self.directory) if self.directory else _unused(directory / "adapter")
            save_adapter(pl_module.model, tokenizer_of(trainer), directory)
            rank_zero_info(f"The trained adapter and its tokenizer are in {directory}")


def tokenizer_of(trainer: Any) -> Any:
    """The data module's tokenizer, or the policy's where other data loaders are used."""
    data = trainer.datamodule
    return (
        data.loaded_tokenizer if hasattr(data, "loaded_tokenizer") else trainer.lightning_module.policy.load_tokenizer()
    )


def run_directory(trainer: Any) -> Path:
    """Where this run writes: the logger's directory, or the trainer's root. All ranks ask together: it broadcasts.

    A logger that keeps its files elsewhere (Weights & Biases, MLflow) has one directory for all runs. The run's own is
    made of its name and version: where `ModelCheckpoint` writes too.
    """
    logger = trainer.logger
    found = Path(trainer.log_dir or trainer.default_root_dir)
    if logger is None or isinstance(logger, TensorBoardLogger | CSVLogger):
        return found
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    own = found / str(logger.name) / version
    return Path(trainer.strategy.broadcast(str(own)))


def claim_versions(trainer: Any) -> None:
    """Have loggers that number their runs take a number by making its directory: runs may start together.

    Lightning's list the directories when the number is first asked for, and several runs then find the same one free.
    Only the first rank's number is used: it tells the others.
    """
    for logger in trainer.loggers if trainer.is_global_zero else ():
        root = str(getattr(logger, "root_dir", "://"))
        if isinstance(logger, TensorBoardLogger | CSVLogger) and "://" not in root:
            # the one place where both find a number, and no sooner than it is needed
            listed: Any = type(logger)._get_next_version
            logger._get_next_version = partial(_claimed, Path(root), partial(listed, logger))  # type: ignore[method-assign]


def _claimed(root: Path, next_free: Callable[[], int]) -> int:
    with refusals(root / "version"):
        root.mkdir(parents=True, exist_ok=True)
        number = next_free()
        while True:
            with suppress(FileExistsError):
                (root / f"version_{number}").mkdir()
                return number
            number += 1


def _unused(directory: Path) -> Path:
    """A run without a logger has no directory of its own; it still does not overwrite another's."""
    number, found = 1, directory
    while found.exists():
        found = directory.with_name(f"{directory.name}-{number}")
        number += 1
    return found
