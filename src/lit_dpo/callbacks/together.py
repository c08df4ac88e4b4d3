from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lit_dpo.policy.sharding import mesh_of
from lit_dpo.policy.symmetry import agreed

if TYPE_CHECKING:
    from lit_dpo.data.batch import CompletionBatch
    from lit_dpo.module import DPOModule


class PassesTogether(pl.Callback):
    """Has a rank that is done with a set to evaluate run passes of a sharded base until all ranks are done.

    See `lit_dpo.policy.symmetry`; over a whole base it does nothing.
    """

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: DPOModule,
        outputs: object,
        batch: CompletionBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """After the last batch of a set run what others still run; measures of the set are put together next."""
        self._after(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: DPOModule,
        outputs: object,
        batch: CompletionBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """As in a validation."""
        self._after(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: DPOModule,
        outputs: object,
        batch: CompletionBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """As in a validation."""
        self._after(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def _after(
        self, trainer: pl.Trainer, pl_module: DPOModule, batch: CompletionBatch, batch_idx: int, dataloader_idx: int
    ) -> None:
        if mesh_of(pl_module.model) is None or not _is_last(trainer, batch_idx, dataloader_idx):
            return
        with trainer.precision_plugin.val_step_context():
            while count := agreed(pl_module.model, 0):
                pl_module.passes.score_for_nothing([batch.uncounted()] * count)


def _is_last(trainer: pl.Trainer, batch_idx: int, dataloader_idx: int) -> bool:
    """Whether a batch is this rank's last one of its set; of a set without a length the loop has looked ahead."""
    loop: Any
    if trainer.sanity_checking:
        counts, loop = trainer.num_sanity_val_batches, trainer.fit_loop.epoch_loop.val_loop
    elif trainer.testing:
        counts, loop = trainer.num_test_batches, trainer.test_loop
    elif trainer.predicting:
        counts, loop = trainer.num_predict_batches, trainer.predict_loop
    else:
        counts = trainer.num_val_batches
        loop = trainer.fit_loop.epoch_loop.val_loop if trainer.state.fn == "fit" else trainer.validate_loop
    count = counts[dataloader_idx] if isinstance(counts, Sequence) else counts
    return bool(loop.batch_progress.is_last_batch if math.isinf(count) else batch_idx + 1 >= count)
