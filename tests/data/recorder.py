"""A module that remembers which rows it was given, and a quiet trainer."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer

from lit_dpo.data.batch import CompletionBatch


class Recorder(LightningModule):
    """Remembers which rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[int]] = []
        self.validated: list[int] = []

    def training_step(self, batch: CompletionBatch, _: int) -> torch.Tensor:
        self.seen.append(batch.indices.tolist())
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: CompletionBatch, _: int) -> None:
        self.validated += batch.indices.tolist()

    def predict_step(self, batch: CompletionBatch, _: int) -> list[int]:
        return batch.indices.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def trainer(*callbacks, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    options = {"accelerator": "cpu", "max_epochs": 2, "enable_checkpointing": bool(callbacks), **quiet, **options}
    return Trainer(callbacks=list(callbacks), **options)
