from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

from lit_dpo.data.batch import CompletionBatch

if TYPE_CHECKING:
    from lit_dpo.module import DPOModule


class Throughput(pl.Callback):
    """Logs how fast a run is, and where the time goes: means since the last row of the log.

    `train/tokens_per_second` and `train/pairs_per_second` of this process, without validation; `train/data_wait`, the
    share of that time in which a step waited for its batch; `train/memory_gib`, the most that was in use: allocated on
    a GPU, resident elsewhere. Lightning's `ThroughputMonitor` waits for the device after every batch; this one reads
    the clock where a step has waited anyway.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Begin."""
        self._step, self._started = trainer.global_step, None
        self._ended = time.perf_counter()
        self._forget()

    def _forget(self) -> None:
        self._tokens = self._pairs = 0
        self._seconds = self._waited = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: DPOModule, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """Note how long the batch was waited for."""
        now = time.perf_counter()
        self._waited += now - self._ended
        self._seconds += now - self._ended
        self._ended = now

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DPOModule, outputs: object, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """Count, and log after an optimizer step."""
        now = time.perf_counter()
        self._seconds += now - self._ended
        self._ended = now
        if not isinstance(batch, CompletionBatch):  # of a step of one's own: nothing to count
            return
        self._tokens += batch.input_ids.numel()
        self._pairs += batch.size
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        values = {
            "tokens_per_second": self._tokens / self._seconds,
            "pairs_per_second": self._pairs / self._seconds,
            "data_wait": self._waited / self._seconds,
        }
        if (peak := peak_memory(pl_module.device)) is not None:
            values["memory_gib"] = peak
        if not trainer.barebones:
            pl_module.log_dict({f"train/{name}": value for name, value in values.items()})
        every = getattr(trainer, "log_every_n_steps", 0)
        if trainer.should_stop or (every and self._step % every == 0):  # Lightning writes the row now
            self._forget()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Leave out the time since the last batch."""
        self._ended = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Leave out what came between epochs."""
        self._ended = time.perf_counter()


class LearningRate(pl.Callback):
    """Logs the learning rate of the step that was made as `train/learning_rate`, whatever optimizer or schedule.

    Lightning's `LearningRateMonitor` names it after the optimizer's class, so that charts do not compare runs. Further
    parameter groups are `train/learning_rate_1` and so on.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Count from here."""
        self._step = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: DPOModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note it before a schedule changes it."""
        self._rates = [group["lr"] for group in optimizer.param_groups]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DPOModule, outputs: object, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """Log it after an optimizer step."""
        if trainer.global_step == self._step or trainer.barebones:
            return
        self._step = trainer.global_step
        for number, rate in enumerate(self._rates):
            name = "train/learning_rate" + (f"_{number}" if number else "")
            value = torch.tensor(float(rate))  # as loggers get it: rounded
            pl_module.log(name, value)
            if pl_module.standing is not None and pl_module.standing.row:  # of a run that goes on from this step
                pl_module.standing.row[name] = float(value)


def peak_memory(device: torch.device) -> float | None:
    """Most memory that this process has used, GiB: allocated on a GPU, resident elsewhere; None where none can say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
