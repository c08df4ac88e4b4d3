"""The pairs of a run, measured by its checkpoints: for runs that did not write down their dynamics."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader

from lit_dpo.callbacks.dynamics import Measured, measured, table
from lit_dpo.checkpoint import read_checkpoint
from lit_dpo.data.loader import PromptDataset
from lit_dpo.data.sampler import PromptSampler
from lit_dpo.tools.audit.dynamics import Dynamics

if TYPE_CHECKING:
    from lit_dpo.data.batch import CompletionBatch
    from lit_dpo.data.datamodule import PreferenceDataModule
    from lit_dpo.module import DPOModule
    from lit_dpo.tools.inspect import InspectCLI

# What of a run's trainer decides how numbers are computed, and where.
_KEPT = ("accelerator", "precision")


class _Noting(pl.Callback):
    """Keeps what each batch of a pass says."""

    def __init__(self, epoch: int, step: int) -> None:
        self.epoch, self.step, self.parts = epoch, step, list[Measured]()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.parts.append(measured(cast("DPOModule", pl_module), batch, self.epoch, self.step))


def recomputed(cli: InspectCLI, data: PreferenceDataModule, checkpoints: list[Path]) -> Dynamics:
    """Measure all training pairs with each checkpoint.

    Args:
        cli: has the run's module and its configuration.
        data: set up for `fit`.
        checkpoints: of the run.
    """
    options = {name: cli.config.trainer.get(name) for name in _KEPT}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    parts: list[Measured] = []
    for number, file in enumerate(checkpoints):
        noting = _Noting(number, int(read_checkpoint(file)["global_step"]))
        trainer = pl.Trainer(**{**options, **quiet}, devices=1, logger=False, callbacks=[noting], inference_mode=False)
        with warnings.catch_warnings():  # of the run's callbacks, which have nothing to do here
            warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")
            trainer.validate(cli.model, dataloaders=_loader(data), ckpt_path=str(file), verbose=False)
        parts += noting.parts
    about: dict[str, Any] = {"loss": type(cli.model.loss).__name__, "beta": cli.model.loss.beta}
    return Dynamics.of(table(Measured.joined(parts), about))


def _loader(data: PreferenceDataModule) -> DataLoader[CompletionBatch]:
    rows = data.tables["train"]
    size = data.eval_batch_size or 8
    lengths = np.asarray(rows.lengths)
    sampler = PromptSampler(lengths, size, shuffle=False)
    return DataLoader(PromptDataset(rows), sampler=sampler, batch_size=None)
