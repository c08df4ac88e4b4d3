from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.callbacks.export import run_directory
from lit_dpo.callbacks.stop import is_stop

if TYPE_CHECKING:
    from lit_dpo.data.batch import CompletionBatch
    from lit_dpo.module import DPOModule


class LastCheckpoint(pl.Callback):
    """Keeps `last.ckpt` in the run's directory, from which the same command goes on with `--ckpt_path last`.

    It is written at the end of each epoch, and when the run is stopped by SIGTERM or Ctrl-C: after the last optimizer
    step that was made. The command has one by default; give it yourself to have it more often.

    Args:
        every_n_steps: optimizer steps from one to the next.
        every_n_minutes: minutes from one to the next.
        directory: of the file; the run's by default.
    """

    def __init__(
        self, every_n_steps: int | None = None, every_n_minutes: float | None = None, directory: str | None = None
    ) -> None:
        for name, given in (("every_n_steps", every_n_steps), ("every_n_minutes", every_n_minutes)):
            if given is not None and given <= 0:
                raise ValueError(f"Expected `{name}` > 0 but got {given}.")
        self.every_n_steps, self.every_n_minutes, self.directory = every_n_steps, every_n_minutes, directory
        self._step = -1
        self.path: Path | None = None
        """The file, once it is there."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Count from here."""
        self._step, self._saved = trainer.global_step, time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DPOModule, outputs: object, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """Write it if it is time."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        due = self.every_n_steps is not None and self._step % self.every_n_steps == 0
        if self.every_n_minutes is not None:
            late = time.monotonic() - self._saved > 60 * self.every_n_minutes
            due |= trainer.strategy.reduce_boolean_decision(late, all=False)  # all ranks write together
        if due:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Write it."""
        self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: DPOModule, exception: BaseException) -> None:
        """Write it if somebody stopped the run, all ranks of it together, and say how to go on."""
        if is_stop(trainer, exception) and trainer.state.fn == "fit" and pl_module.standing is not None:
            path = self._save(trainer)
            rank_zero_info(f"stopped after {trainer.global_step} steps: to go on, repeat it with --ckpt_path {path}")

    def save_now(self, trainer: pl.Trainer) -> Path:
        """Write it, on all ranks together, and return where."""
        return self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> Path:
        path = (Path(self.directory) if self.directory else run_directory(trainer)) / "last.ckpt"
        if not getattr(trainer, "fast_dev_run", False):
            trainer.save_checkpoint(path, weights_only=False)
            self._saved, self.path = time.monotonic(), path
        return path
