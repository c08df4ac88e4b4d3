from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

from lit_dpo.callbacks.last import LastCheckpoint
from lit_dpo.callbacks.out_of_memory import OutOfMemory
from lit_dpo.errors import Explanation, LitDPOError, first_line
from lit_dpo.memory.room import is_out_of_memory

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lit_dpo.data.batch import CompletionBatch
    from lit_dpo.module import DPOModule

log = logging.getLogger(__name__)
_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*?)(?:\. |$)")


class FaultNotes(pl.Callback):
    """Says in a sentence what ended a run from outside, and from which checkpoint it can go on.

    Memory that ran out, a process that read data and was killed, a rank that is gone: the error itself is whatever
    Lightning or torch raised, with the sentence as its note; the command prints the sentence alone. Where it is safe
    (one process, between two optimizer steps), and a `LastCheckpoint` is there, `last.ckpt` is written first.
    """

    def __init__(self) -> None:
        self._stepping = False

    def setup(self, trainer: pl.Trainer, pl_module: DPOModule, stage: str) -> None:
        """Nothing is under way."""
        self._stepping = False

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: DPOModule, optimizer: Optimizer) -> None:
        """From here on some weights may have moved, and others not."""
        self._stepping = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DPOModule, outputs: object, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """Note that the step is whole."""
        self._stepping = False

    def on_exception(self, trainer: pl.Trainer, pl_module: DPOModule, exception: BaseException) -> None:
        """Add the sentence to the error."""
        if isinstance(exception, LitDPOError) or (what := _what(trainer, pl_module, exception)) is None:
            return
        what = f"{what} ({type(exception).__name__}: {first_line(exception)})"
        if trainer.state.fn == "fit":
            what = f"{what} {self._how_to_go_on(trainer, pl_module)}"
        exception.add_note(Explanation(what))

    def _how_to_go_on(self, trainer: pl.Trainer, pl_module: DPOModule) -> str:
        there = pl_module.standing
        whole = there is not None and there.step == trainer.global_step and not self._stepping
        if trainer.world_size == 1 and whole:  # several ranks would have to write together
            try:
                for keeper in _keepers(trainer):
                    keeper.save_now(trainer)
            except Exception as error:  # what is there from before stays
                log.warning("No checkpoint of this moment could be written: %s", first_line(error))
        if (found := _newest(trainer)) is None:
            return "There is no checkpoint of this run yet: `LastCheckpoint` can write one every so many steps."
        return f"To go on, repeat the command with --ckpt_path {found}"


def _what(trainer: pl.Trainer, pl_module: DPOModule, error: BaseException) -> str | None:
    """Say what happened, if it came from outside."""
    if is_out_of_memory(error):
        explains = [one for one in getattr(trainer, "callbacks", ()) if isinstance(one, OutOfMemory)]
        return explains[0].explain(trainer, pl_module) if explains else "Out of memory."
    if isinstance(error, RuntimeError) and (found := _WORKER.search(str(error))):
        return (
            f"A process that reads data ahead (`--data.num_workers`) is gone, process {found.group(1)}: it "
            f"{found.group(2)}. Most likely the system had no memory left and killed it: lower `--data.num_workers`."
        )
    if trainer.world_size > 1 and isinstance(error, RuntimeError) and _is_of_ranks(error):
        return (
            f"Rank {trainer.global_rank} stops, since another one of the {trainer.world_size} ranks does not answer: "
            "its own output says why; if that says nothing it was killed, most likely because no memory was left."
        )
    return None


def _is_of_ranks(error: RuntimeError) -> bool:
    """Whether ranks could not reach each other."""
    return isinstance(error, torch.distributed.DistError) or any(
        one in str(error) for one in ("gloo", "NCCL", "TCPStore")
    )


def _keepers(trainer: pl.Trainer) -> list[LastCheckpoint]:
    return [one for one in getattr(trainer, "callbacks", ()) if isinstance(one, LastCheckpoint)]


def _newest(trainer: pl.Trainer) -> Path | str | None:
    """Find the last checkpoint of this run, or the one that it came from."""
    own = [keeper.path for keeper in _keepers(trainer) if keeper.path is not None]
    others = [
        getattr(one, "last_model_path", "") or getattr(one, "best_model_path", "")
        for one in trainer.checkpoint_callbacks
    ]
    return next(iter([*own, *(one for one in others if one)]), None) or trainer.ckpt_path
