"""What a run shows while it goes on: a bar on a terminal, lines in a file that can be followed."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from typing import Any, TextIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

_WIDE = 120  # columns from which all measures fit next to the bar
_NARROW = ("loss", "accuracy")
_FOLLOWED = ("loss", "reward_accuracy")  # what a line says; the logger has the rest
_SILENCE = 600.0  # seconds of training after which a line is due, however long an epoch is


def bar() -> ProgressBar:
    """Make what suits standard output: a bar on a terminal, else a line for each epoch and validation."""
    return Bar() if sys.stdout.isatty() else Lines()


class Bar(RichProgressBar):
    """Lightning's, with names that fit next to the bar, and fewer of them on a narrow terminal."""

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        """Leave the bar itself and the speed out where they would squeeze the measures into many lines."""
        columns = super().configure_columns(trainer)
        return columns if _columns() >= _WIDE else [columns[0], *columns[2:4]]

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Shorten the names; where it is narrow, only loss and accuracy."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        found = {name.replace("reward_", ""): value for name, value in shown.items()}
        if _columns() >= _WIDE:
            return found
        return {name: value for name, value in found.items() if name.rpartition("/")[2] in _NARROW}


class Lines(ProgressBar):
    """A line for each epoch and validation, without anything that is drawn over: for a file, or a pipe.

    It takes the place of Lightning's bar. Each line has the step, what a bar would show, and the minutes that are left.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._begun = self._said = time.monotonic()
        self._first = 0
        self._due = False

    def disable(self) -> None:
        """Say nothing: of several processes only the first one speaks."""
        self._enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; a resumed run has made steps already."""
        self._begun = self._said = time.monotonic()
        self._first = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Say what a validation within the epoch found, or that it still trains."""
        if self._due or time.monotonic() - self._said > _SILENCE:
            self._say(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say it with the next batch; the epoch's end says it anyway."""
        self._due = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say the last validation, if no epoch's end has."""
        if self._due:
            self._say(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say the whole epoch."""
        self._say(trainer)

    def _say(self, trainer: pl.Trainer) -> None:
        self._due, self._said = False, time.monotonic()
        if not self._enabled:
            return
        measured = ", ".join(
            f"{name} {float(value):.4g}"
            for name, value in trainer.callback_metrics.items()
            if name.rpartition("/")[2] in _FOLLOWED
        )
        rank_zero_info(f"{self._place(trainer)}: {measured}{self._left(trainer)}")

    def _place(self, trainer: pl.Trainer) -> str:
        epochs = f" of {trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        steps = _steps(trainer)
        return f"epoch {trainer.current_epoch + 1}{epochs}, step {trainer.global_step}" + (
            f" of {steps}" if steps else ""
        )

    def _left(self, trainer: pl.Trainer) -> str:
        """Say how long the rest takes at this pace."""
        made, steps = trainer.global_step - self._first, _steps(trainer)
        if not made or not steps:
            return ""
        seconds = (time.monotonic() - self._begun) / made * max(0, steps - trainer.global_step)
        return f"; {seconds / 60:.1f} min left" if seconds >= 60 else f"; {seconds:.0f} s left"


class Stderr(logging.StreamHandler[TextIO]):
    """Writes to what standard error is now: while a bar is drawn that is Rich's, which writes above the bar.

    A handler that kept the stream of its first day would write into the bar, and the bar over its lines. Where standard
    error is a file, lines go there and not to the bar's terminal.
    """

    def __init__(self) -> None:
        super().__init__()
        self._given: TextIO | None = None

    @property
    def stream(self) -> TextIO:
        """Where the next line goes: the stream of now, or one that was set."""
        if self._given is not None:
            return self._given
        below: TextIO = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
        return sys.stderr if below.isatty() else below

    @stream.setter
    def stream(self, given: TextIO) -> None:
        self._given = None if given is sys.stderr else given


def set_up_logs() -> None:
    """Let log lines and bars live together, and draw no bar where nobody would see it move."""
    for name in (None, "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        plain = [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]
        for handler in plain:
            logger.removeHandler(handler)
        if plain or (name is None and not logger.handlers):
            logger.addHandler(Stderr())
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # it is imported when there are data
        disable_progress_bar()  # the hub's too
        if "datasets" in sys.modules:  # and does not look any more
            from datasets import disable_progress_bars

            disable_progress_bars()


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return _WIDE


def _steps(trainer: pl.Trainer) -> int:
    """Of the whole run; 0 where it has no end in steps."""
    steps = trainer.estimated_stepping_batches
    return 0 if math.isinf(steps) or steps < 0 else int(steps)
