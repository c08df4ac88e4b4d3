"""What ranks do in the tests of many processes: each function runs on every one of them, or on one process alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lit_dpo.data.formats import Rankings, Triples
from lit_dpo.losses import PreferenceLoss
from training import adapter, data, module, trainer

COLUMNS = Triples(score_margin="gap", probability="agreement", weight="weight")


def pairs_with_columns(path: Path, count: int) -> Path:
    rows = [
        {
            "prompt": f"How many are {n}?",
            "chosen": " Exactly " + "one, " * (n % 4) + f"{n}.",
            "rejected": " No" + " idea" * (n % 3) + "!" * (n // 3),
            "gap": 0.5 + n % 3,
            "agreement": 0.6 + 0.05 * (n % 5),
            "weight": 0.5 + n % 2,
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rankings(path: Path, count: int) -> Path:
    """Two to five completions each, so that prompts have one to ten comparisons."""
    rows = []
    for n in range(count):
        completions = [f" answer {(n * k) % 7}" + "!" * k for k in range(2 + n % 4)]
        rows.append({"prompt": f"question {n}", "completions": completions, "scores": [*range(len(completions))]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class OneAfterAnother(Callback):
    """Each epoch trains another loss from the same adapters, and writes down what came of it."""

    def __init__(self, losses: Sequence[PreferenceLoss]) -> None:
        self.losses, self.found = losses, []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.fresh = False
        torch.manual_seed(1)
        self.start = {name: 0.3 * torch.randn(p.shape) for name, p in adapter(pl_module).items()}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.loss = loss = self.losses[trainer.current_epoch]
        pl_module.loss_state = loss.initial_state()
        with torch.no_grad():
            for name, p in pl_module.model.named_parameters():
                if name in self.start:
                    p.copy_(self.start[name])
        self.found.append({"steps": []})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.found[-1]["steps"].append(self._measures(trainer, "train/"))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        moved = {name: p - self.start[name] for name, p in adapter(pl_module).items()}
        self.found[-1] |= {"moved": moved, "state": pl_module.loss_state, "val": self._measures(trainer, "val/")}

    def _measures(self, trainer: pl.Trainer, prefix: str) -> dict[str, float]:
        return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}


def run_each(
    model: str, file: str, losses: Sequence[PreferenceLoss], root: Path, ranks: int, tokens: int, *, ranked: bool
) -> list[dict[str, Any]]:
    """An epoch of each loss, in batches of six over all ranks; of rankings with a validation after it."""
    dpo = module(
        model, optimizer=functools.partial(torch.optim.SGD, lr=0.01 if ranked else 0.1), microbatch_tokens=tokens
    )
    noting = OneAfterAnother(losses)
    run = trainer(
        root,
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=len(losses),
        callbacks=[noting],
        num_sanity_val_steps=0,
    )
    given = {"val": file, "format": Rankings()} if ranked else {"format": COLUMNS}
    run.fit(dpo, data(file, batch_size=6 // ranks, **given))
    assert run.world_size == ranks
    return noting.found
