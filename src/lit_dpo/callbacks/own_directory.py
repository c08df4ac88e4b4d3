from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lit_dpo.callbacks.export import callbacks_of
from lit_dpo.callbacks.last import LastCheckpoint
from lit_dpo.errors import TrainingError
from lit_dpo.writing import hold, release

if TYPE_CHECKING:
    from lit_dpo.module import DPOModule


class OwnDirectory(pl.Callback):
    """Keeps a run's directory for itself while it trains: of two runs in one, the second stops before weights load.

    Loggers that number their runs give each its own; this is for a `version` or a directory that somebody has named.
    The system lets go of it when the process ends, however it does.

    Raises:
        TrainingError: naming the directory that another process trains in.
    """

    def __init__(self) -> None:
        self.held: list[int] = []

    def setup(self, trainer: pl.Trainer, pl_module: DPOModule, stage: str) -> None:
        """Take the directory, if `DPOModule.prepare_data`, which comes before loggers write, is overridden."""
        if stage == "fit" and trainer.is_global_zero and not self.held:
            self.take(trainer)

    def take(self, trainer: pl.Trainer) -> None:
        """Take the directories of loggers that keep their files there, and of `last.ckpt`; one rank does.

        Raises:
            TrainingError: naming the one that another process trains in.
        """
        self._let_go()
        if getattr(trainer, "fast_dev_run", False):
            return
        own = [one.log_dir for one in trainer.loggers if isinstance(one, TensorBoardLogger | CSVLogger)]
        for keeper in (one for one in callbacks_of(trainer) if isinstance(one, LastCheckpoint)):
            own += [keeper.directory] if keeper.directory else [] if trainer.loggers else [trainer.default_root_dir]
        for folder in sorted({str(one) for one in own if "://" not in str(one)}):
            held = hold(Path(folder))
            if held is None:
                raise TrainingError(
                    f"Expected a directory for this run alone but another process trains in {folder}: let the logger "
                    "number it (leave its `version` out), or name another."
                )
            self.held.append(held)

    def teardown(self, trainer: pl.Trainer, pl_module: DPOModule, stage: str) -> None:
        """Let go of it."""
        self._let_go()

    def on_exception(self, trainer: pl.Trainer, pl_module: DPOModule, exception: BaseException) -> None:
        """Let go of it: there is no `teardown` then."""
        self._let_go()

    def _let_go(self) -> None:
        while self.held:
            release(self.held.pop())

    def __getstate__(self) -> dict[str, object]:
        """Let copies hold nothing."""
        return {"held": []}
