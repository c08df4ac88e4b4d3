from __future__ import annotations

import math
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.callbacks.alone import alone
from lit_dpo.callbacks.export import AdapterExport, callbacks_of, run_directory
from lit_dpo.callbacks.last import LastCheckpoint
from lit_dpo.callbacks.throughput import peak_memory

if TYPE_CHECKING:
    from lit_dpo.data.batch import CompletionBatch
    from lit_dpo.module import DPOModule


_ROWS = ("loss", "reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward", "kl", "chosen_logps",
         "rejected_logps")  # fmt: skip


class RunSummary(pl.Callback):
    """Says at the end of `fit` how it went: measures, first and last, what it cost, and where things are.

    Plain text, at most 80 columns but for paths that are longer. The first row of `train` is of the first step, the
    last one of the steps since the last row of the log; `val` is of the first and the last whole validation.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Forget the run before."""
        self._began = time.monotonic()
        self._measured: dict[str, tuple[dict[str, float], dict[str, float]]] = {}
        self._tokens, self._trained, self._first = 0, 0.0, trainer.global_step

    def on_train_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Count from here; a checkpoint's steps are known by now."""
        self._first = trainer.global_step
        self._batch = time.monotonic()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: DPOModule, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._batch = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DPOModule, outputs: object, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """Count what was trained on, and in which time."""
        self._trained += time.monotonic() - self._batch
        self._tokens += getattr(getattr(batch, "input_ids", None), "numel", int)()
        if "train" not in self._measured:
            self._note("train", trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Note a whole validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._note("val", trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Say how it went."""
        directory = run_directory(trainer)  # all ranks ask
        with alone("The summary of the run"):
            if "train" in self._measured:
                self._note("train", trainer)
            steps, took = trainer.global_step - self._first, timedelta(seconds=round(time.monotonic() - self._began))
            head = [f"{steps} steps in {took}"]
            if self._trained > 0 and self._tokens:
                head.append(f"{self._tokens / self._trained:,.0f} tokens per second")
            if (peak := peak_memory(pl_module.device)) is not None:
                head.append(f"peak memory {peak:.2f} GiB")
            rank_zero_info("\n".join([", ".join(head), *_table(self._measured), *_places(trainer, directory)]))

    def _note(self, stage: str, trainer: pl.Trainer) -> None:
        prefix, found = f"{stage}/", trainer.callback_metrics
        now = {name[len(prefix) :]: float(value) for name, value in found.items() if name.startswith(prefix)}
        if now:
            self._measured[stage] = (self._measured[stage][0] if stage in self._measured else now, now)


def _table(measured: dict[str, tuple[dict[str, float], dict[str, float]]]) -> list[str]:
    """Lines of a table: a row for each measure, first and last of each stage."""
    names = [name for name in _ROWS if any(name in last for _, last in measured.values())]
    if not names:
        return []
    width = max(map(len, names))
    sides = [(f"{stage} {word}", values) for stage, pair in measured.items()
             for word, values in zip(("first", "last"), pair, strict=True)]  # fmt: skip
    lines = ["  " + " " * width + "".join(f"{title:>13}" for title, _ in sides)]
    for name in names:
        lines.append(f"  {name:<{width}}" + "".join(f"{_number(values.get(name)):>13}" for _, values in sides))
    return lines


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def _places(trainer: pl.Trainer, directory: Path) -> list[str]:
    """Lines that say where things are: only what is there."""
    found: list[tuple[str, Any]] = []
    callbacks = callbacks_of(trainer)
    found += [("adapter", one.written) for one in callbacks if isinstance(one, AdapterExport)]
    for one in (one for one in callbacks if isinstance(one, ModelCheckpoint)):
        score = one.best_model_score
        best = f" ({one.monitor} {float(score):.4g})" if one.monitor and score is not None else ""
        found.append(
            (
                "best checkpoint" if one.monitor else "checkpoint",
                one.best_model_path and f"{_short(one.best_model_path)}{best}",
            )
        )
    found += [("last checkpoint", one.path) for one in callbacks if isinstance(one, LastCheckpoint)]
    config = directory / "config.yaml"
    found.append(("configuration", config if config.is_file() else None))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            found.append(("curves", f"tensorboard --logdir {_short(Path(logger.root_dir))}"))
    there = [(name, str(_short(place))) for name, place in found if place]
    width = max((len(name) for name, _ in there), default=0)
    return [f"  {name:<{width}}  {place}" for name, place in there]


def _short(place: Any) -> str:
    """Write a path as seen from here, if that is shorter."""
    text = str(place)
    if not os.path.isabs(text):
        return text
    try:
        return min(os.path.relpath(text), text, key=len)
    except ValueError:  # on another drive
        return text
