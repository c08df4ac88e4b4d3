"""What the tests of ablations let runs do: write what they see, and wait; and count what the reference computes."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lit_dpo import BaseReference
from lit_dpo.callbacks.export import run_directory
from lit_dpo.logps.fields import Field
from lit_dpo.policy.adapters import adapter_parameters
from lit_dpo.references import Reference


class Watched(pl.Callback):
    """Writes the rows of each batch, and what the adapter was at the start, into the run's folder.

    Args:
        held: a file; where it is, a run of seed 2 stays in the first step of its second epoch, for a test to come in.
        fails: seed of a run that fails.
        dies: seed of a run whose process is killed, whenever it is tried.
    """

    def __init__(self, held: str = "", fails: int = -1, dies: int = -1) -> None:
        self.held, self.fails, self.dies = held, fails, dies

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        digest = hashlib.sha256()
        for parameter in adapter_parameters(pl_module.model).values():
            digest.update(parameter.detach().numpy().tobytes())
        _write(trainer, "start.txt", digest.hexdigest())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        _write(trainer, "order.txt", str(batch.indices.tolist()))
        seed = int(os.environ["PL_GLOBAL_SEED"])
        if seed == self.fails:
            raise ArithmeticError("planted")
        if seed == self.dies:
            os.kill(os.getpid(), 9)
        while seed == 2 and trainer.current_epoch == 1 and Path(self.held).is_file():
            time.sleep(0.01)


def _write(trainer: pl.Trainer, name: str, line: str) -> None:
    with (run_directory(trainer) / name).open("a") as stream:
        stream.write(f"{line}\n")


@dataclass(frozen=True)
class Counted(BaseReference):
    """Writes down how many completions it computes, whichever process asks."""

    counts: str = ""

    def logps(self, model: Any, batch: Any) -> Any:
        with Path(self.counts).open("a") as stream:
            stream.write(f"{len(batch.completion_lengths)}\n")
        return super().logps(model, batch)


@dataclass(frozen=True)
class Sums(BaseReference):
    """Has no log-probs per token."""

    @property
    def provides(self) -> frozenset[Field]:
        return frozenset({Field.REFERENCE})


@dataclass(frozen=True)
class Nameless(BaseReference):
    """Does not say what it depends on."""

    def cache_identity(self, policy: Any) -> dict[str, Any]:
        return Reference.cache_identity(self, policy)
