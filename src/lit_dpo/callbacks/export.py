from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.callbacks.alone import alone
from lit_dpo.checkpoint import check_finite, check_writable, describe, save_adapter
from lit_dpo.compat import is_numbered, number
from lit_dpo.policy.adapters import adapter_parameters
from lit_dpo.writing import clear_away, refusals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_dpo.module import DPOModule


class AdapterExport(pl.Callback):
    """Writes the policy as a PEFT directory with its tokenizer at the end of `fit`.

    `AutoPeftModelForCausalLM.from_pretrained(directory)` and `pipeline("text-generation", model=directory)` load it.
    The former loads the commit of the base that it was trained on, the latter the main branch unless given `revision=`.
    `lit_dpo.json` in it says what it was trained on and with, what was measured, and no row's text.

    Args:
        directory: where the last one goes; `adapter/` in the run's directory by default.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory
        self.written: Path | None = None
        """Where the last one went."""
        self._said: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: DPOModule, stage: str) -> None:
        """See that the directory can be written to, and know what the adapter will belong to."""
        if self.directory:
            check_writable(Path(self.directory))
        if stage == "fit":  # now: where a base or a reference is may be gone when the run ends
            self._said = describe(pl_module, trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Write the last one."""
        directory = run_directory(trainer)
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            check_finite(adapter_parameters(pl_module.model))
            directory = Path(self.directory) if self.directory else _unused(directory / "adapter")
            said = self._said
            with alone("AdapterExport"):
                said = {**(said or {}), **_facts(trainer)} if said else None
            try:
                save_adapter(pl_module.model, tokenizer_of(trainer), directory, said=said)
                self.written = directory
            finally:
                with suppress(OSError):
                    directory.rmdir()  # if nothing came into it
            rank_zero_info(f"The trained adapter and its tokenizer are in {directory}")


def _facts(trainer: pl.Trainer) -> dict[str, Any]:
    """How long it trained, what was measured last, and how many rows of which sources there were."""
    measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "measures": {name: value for name, value in measured.items() if math.isfinite(value)},
        "data": data_facts(data_of(trainer)),
        "conversations": _of_messages(data_of(trainer)),
    }


def _of_messages(data: Any) -> bool | None:
    """Whether training prompts are messages, which a chat template renders; None where nobody knows, as of a stream."""
    if getattr(data, "tables", {}).get("train") is None:
        return None
    return any(not isinstance(said.prompt, str) for *_, said in data.prompts("train", 1))


def data_facts(data: Any) -> dict[str, dict[str, Any]]:
    """Say of each split that a data module has read: sources, rows, what is used of them. Names and counts alone."""
    return {
        split: {
            "sources": [
                Path(source.name).name if Path(source.name).exists() else source.name for source in one.sources
            ],
            "rows": sum(len(source.rows) for source in one.sources),
            "prompts": one.size,
            "comparisons": one.comparisons_count,
            "dropped": one.dropped.total(),
        }
        for split, one in getattr(data, "tables", {}).items()
        if one is not None
    }


def tokenizer_of(trainer: pl.Trainer) -> PreTrainedTokenizerBase:
    """Return the data module's tokenizer, or the policy's where other data loaders are used."""
    data, module = data_of(trainer), cast("DPOModule", trainer.lightning_module)
    found: PreTrainedTokenizerBase = getattr(data, "loaded_tokenizer", None) or module.policy.load_tokenizer()
    return found


def data_of(trainer: pl.Trainer) -> Any:
    """Return the data module of a run, or None where it has only loaders; Lightning sets it without declaring it."""
    return getattr(trainer, "datamodule", None)


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the callbacks of a trainer, which Lightning sets without declaring them."""
    found: list[pl.Callback] = getattr(trainer, "callbacks", [])
    return found


def run_directory(trainer: pl.Trainer) -> Path:
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


def unnumbered(trainer: pl.Trainer) -> list[Any]:
    """List the loggers that number their runs and have not yet: a number that the user gave stays as it is.

    To be asked before the run: Lightning wants to know the directory before there is data.
    """
    kinds = TensorBoardLogger | CSVLogger
    found = [logger for logger in trainer.loggers if isinstance(logger, kinds) and "://" not in logger.root_dir]
    return [logger for logger in found if not is_numbered(logger)]


def claim_versions(loggers: list[Any]) -> None:
    """Give a run its number by making its directory, on the first rank, whose number is the one that all use.

    Lightning's loggers list what is there and take the next number, and runs that start together take the same one.

    Raises:
        TrainingError: if no directory can be made there.
    """
    for logger in loggers:
        root, version = Path(logger.root_dir), logger.version
        with refusals(root / "version"):
            root.mkdir(parents=True, exist_ok=True)
            while not _made(root / f"version_{version}"):
                version += 1
        number(logger, version)


def clear_runs(trainer: pl.Trainer) -> None:
    """Remove what killed processes left half-written in the folders of runs next to this one, and in its own.

    Nobody writes into the folder of a run that was killed any more: the one that goes on has another number.
    """
    for root in {Path(found) for logger in trainer.loggers if (found := getattr(logger, "root_dir", None))}:
        with suppress(OSError):
            for run in (root, *(one for one in root.iterdir() if one.is_dir())):
                for folder in (run, run / "checkpoints"):
                    clear_away(folder)


def _made(directory: Path) -> bool:
    """Whether it was made, by us: False if it was there."""
    try:
        directory.mkdir()
    except FileExistsError:
        return False
    return True


def _unused(directory: Path) -> Path:
    """Find a name that no other run has: one without a logger has no directory of its own."""
    number, found = 1, directory
    with refusals(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        while not _made(found):
            found = directory.with_name(f"{directory.name}-{number}")
            number += 1
    return found
