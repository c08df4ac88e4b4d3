"""Ranks that are told to stop do so after the same batch."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_dpo.callbacks.interrupts import HeldInterrupt

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lit_dpo.data.batch import CompletionBatch
    from lit_dpo.module import DPOModule


def is_stop(trainer: pl.Trainer, exception: BaseException) -> bool:
    """Say whether somebody stopped a run in a way that lets all of its ranks write what they write together.

    A rank that is stopped by itself, by a signal that comes twice or when there is no batch to wait for, finds the
    others in another exchange than its own, or does not find them.
    """
    told = isinstance(exception, SIGTERMException | KeyboardInterrupt)
    return told and (
        trainer.world_size == 1
        or any(isinstance(one, StopTogether) and one.agreed for one in getattr(trainer, "callbacks", ()))
    )


class StopTogether(pl.Callback):
    """Lets a signal wait for the end of a batch, and all ranks act on it there, whichever of them it reached.

    Lightning's handlers talk to the other ranks wherever a rank is when the signal comes: for SIGTERM they broadcast,
    for SLURM's requeue signal they save a checkpoint. A rank that is one exchange ahead takes that for another one, and
    all of them wait for ever. So the signal is noted, the ranks agree once a batch, and then stop, or requeue. A signal
    that comes a second time, while a batch does not end, ends the process.

    With one process only the requeue signal waits for the end of any batch, and Ctrl-C for that of one in which an
    optimizer moves weights. It is the last callback of all: what others count in a batch is counted before it stops.
    """

    _interrupt = HeldInterrupt()  # one for the process, as its signals are

    def __init__(self) -> None:
        self._noted: list[int] = []
        self._before: dict[int, Any] = {}
        self.agreed = False
        """Whether all ranks of a run stop here, after the same batch."""

    def setup(self, trainer: pl.Trainer, pl_module: DPOModule, stage: str) -> None:
        """Nobody has told this run to stop."""
        self.agreed = False

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Take the signals: Lightning has its handlers by now."""
        self._take(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Take them, if there was nothing before."""
        self._take(trainer)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: DPOModule, optimizer: Optimizer) -> None:
        """Have Ctrl-C wait until the step is made and noted, by all who note it."""
        self._interrupt.hold()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DPOModule, outputs: object, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """Act on what has reached any rank.

        Raises:
            SIGTERMException, KeyboardInterrupt: on all ranks.
        """
        if self._before:
            self._act(trainer, pl_module)
        self._interrupt.let_go()

    def _act(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        number = max(self._noted, default=0)
        if trainer.world_size > 1:  # the largest: SIGUSR1 before SIGINT, and SIGTERM before both
            asked = torch.tensor(number, device=pl_module.device)
            number = int(trainer.strategy.reduce(asked, reduce_op="max"))
        if not number:
            return
        self._noted = [other for other in self._noted if other != number]
        self.agreed = number in (signal.SIGTERM, signal.SIGINT)
        if number == signal.SIGTERM:
            raise SIGTERMException
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        self._before[number](number, None)

    def on_exception(self, trainer: pl.Trainer, pl_module: DPOModule, exception: BaseException) -> None:
        """Let go, so that the next run of this trainer takes them anew."""
        self._interrupt.let_go(forget=True)
        self._before.clear()

    def teardown(self, trainer: pl.Trainer, pl_module: DPOModule, stage: str) -> None:
        """Let go; Lightning puts back what was there before the run."""
        self._before.clear()

    def _take(self, trainer: pl.Trainer) -> None:
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self._noted.clear()
        taken = [signal.SIGTERM, signal.SIGINT] if trainer.world_size > 1 else []
        if SLURMEnvironment.detect():
            environment = getattr(trainer.strategy, "cluster_environment", None)  # one process has none
            taken.append(getattr(environment, "requeue_signal", None) or signal.SIGUSR1)
        for one in taken:
            if callable(before := signal.getsignal(one)):  # else nobody asked for it
                self._before[one] = before
                signal.signal(one, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if number not in self._noted:
            self._noted.append(number)
        elif number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
            os.kill(os.getpid(), number)
