from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_dpo.callbacks.alone import alone
from lit_dpo.checkpoint import gather

if TYPE_CHECKING:
    from lit_dpo.data.batch import CompletionBatch
    from lit_dpo.module import DPOModule


log = logging.getLogger(__name__)
warn = rank_zero_only(log.warning)

_SIDES = ("chosen", "rejected", "margin")


class RewardHistograms(pl.Callback):
    """Draws the rewards of all held-out pairs at each validation: `val/rewards/chosen`, `/rejected` and `/margin`.

    For loggers whose `experiment` takes histograms, as TensorBoard's does; where there is none it says so. The rewards
    are those that validation measures anyway, in one copy at its end.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """See that somebody takes them."""
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._there = any(hasattr(getattr(one, "experiment", None), "add_histogram") for one in trainer.loggers)
        if trainer.is_global_zero and not self._there:
            warn("RewardHistograms: none of the loggers takes histograms; `TensorBoardLogger` does")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: DPOModule,
        outputs: object,
        batch: CompletionBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's rewards where they are."""
        if trainer.state.fn == "fit" and pl_module.measured_batch is not None:
            self._kept.append((pl_module.measured_batch.chosen_rewards, pl_module.measured_batch.rejected_rewards))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Draw those of all ranks."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self._kept:  # each rank has some, or none has
            self._kept = []
            return
        mine = torch.stack([torch.cat(side) for side in zip(*self._kept, strict=True)]).double().cpu()
        self._kept = []
        together = torch.cat([one["rewards"] for one in gather({"rewards": mine}, trainer.world_size)], 1)
        if not trainer.is_global_zero:
            return
        drawn = dict(zip(_SIDES, (*together, together[0] - together[1]), strict=True))
        for logger in trainer.loggers:
            draw = getattr(getattr(logger, "experiment", None), "add_histogram", None)
            for name, values in drawn.items():
                with alone("RewardHistograms"):
                    if draw is not None:
                        draw(f"val/rewards/{name}", values[values.isfinite()], trainer.global_step)
