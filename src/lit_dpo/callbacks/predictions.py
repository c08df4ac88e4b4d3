from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.callbacks.export import run_directory
from lit_dpo.callbacks.health import say_it_is_the_same
from lit_dpo.writing import written_whole

if TYPE_CHECKING:
    from lit_dpo.data.batch import CompletionBatch
    from lit_dpo.module import DPOModule


class PredictionWriter(pl.Callback):
    """Writes what `predict` says of each pair, one JSON object a line, ordered by index.

    Fields: `index` (of the row in the data set, from 0), `chosen_reward`, `rejected_reward`, `margin`, `chosen_logps`,
    `rejected_logps` (sums, nats), `chosen_length`, `rejected_length` (tokens).

    Args:
        path: of the file; `predictions.jsonl` in the run's directory by default.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._rows: list[dict[str, float]] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Forget what an interrupted run left."""
        self._rows = []

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: DPOModule,
        outputs: object,
        batch: CompletionBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the numbers, not the tensors; those of a `predict_step` of one's own are its own affair."""
        if not isinstance(outputs, dict) or "index" not in outputs:
            return
        columns = {name: column.tolist() for name, column in outputs.items()}
        self._rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def on_predict_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Write the file, whole or not at all.

        Raises:
            TrainingError: if the disk refuses.
        """
        rows = self._rows
        if trainer.world_size > 1:
            gathered: list[list[dict[str, float]] | None] = [None] * trainer.world_size
            dist.all_gather_object(gathered, rows)
            rows = [row for part in gathered if part is not None for row in part]
        self._rows = []
        directory = run_directory(trainer)
        if not trainer.is_global_zero or not rows:
            return
        if not any(row["chosen_reward"] or row["rejected_reward"] for row in rows):
            say_it_is_the_same(trainer, pl_module)
        path = Path(self.path) if self.path else directory / "predictions.jsonl"
        with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: row["index"]))
        rank_zero_info(f"Rewards and margins of {len(rows)} pairs are in {path}")
