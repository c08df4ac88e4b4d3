"""Train over all pairs and validate: in a test's own process, or on two ranks with `of_rank`."""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow.parquet as pq
import torch
from lightning.pytorch.callbacks import Callback
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from lit_dpo import CachedReference, losses
from lit_dpo.callbacks import TrainingDynamics
from lit_dpo.data.formats import Rankings
from lit_dpo.references import store
from training import adapter, data, module, trainer


class Compressed(Callback):
    """Gradients are halves while ranks exchange them; Lightning itself asks for that on GPUs alone."""

    def __init__(self) -> None:
        self.largest: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        def hook(state, bucket):  # torch reads annotations, as they are written
            self.largest.append(float(bucket.buffer().abs().max()))
            return fp16_compress_hook(state, bucket)

        trainer.strategy.model.register_comm_hook(None, hook)


def train(
    model: str,
    pairs: str,
    root: Path,
    devices: int = 1,
    accumulate: int = 1,
    cache: str = "",
    loss: str = "DPOLoss",
    ranked: bool = False,
    max_tokens: int | None = None,
    compressed: float = 0.0,
    **options: Any,
) -> dict[str, Any]:
    """What came out of it, on this rank."""
    given = {"loss": getattr(losses, loss)(), **options}
    if compressed:
        given["loss"] = losses.MixtureLoss([given["loss"]], weights=[compressed])
    given |= {"reference": CachedReference(directory=cache)} if cache else {}
    # rankings also in parts of a prompt
    rows = {"microbatch_tokens": 45 if ranked else 200} if devices > 1 else {}
    dpo = module(model, optimizer=functools.partial(torch.optim.SGD, lr=1 / (compressed or 1)), **given, **rows)
    strategy = "ddp" if devices > 1 else "auto"
    steps = {"max_epochs": 2 if cache else 1, "accumulate_grad_batches": accumulate, "log_every_n_steps": 50}
    noting: list[Any] = [TrainingDynamics()]
    if compressed and devices > 1:
        noting.append(Compressed())
    if max_tokens:  # the batches of both ranks are a step
        steps["accumulate_grad_batches"] = 2 // devices
    run = trainer(root, devices=devices, strategy=strategy, callbacks=noting, num_sanity_val_steps=0, **steps)
    size = 22 if accumulate == 1 else 6  # of all ranks together; the tail of 21 pairs is shared unevenly
    how: dict[str, Any] = {"format": Rankings()} if ranked else {}
    sizes = (
        {"max_tokens": max_tokens} if max_tokens else {"batch_size": size // devices, "eval_batch_size": 6 // devices}
    )
    few = str(Path(pairs).with_name(f"few-{Path(pairs).name}"))
    run.fit(dpo, data(pairs, val={"one": few, "two": few}, **{"batch_size": None, **sizes}, **how))
    assert run.world_size == devices
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    noted = pq.read_table(root / "dynamics.parquet").to_pydict() if run.is_global_zero else {}
    found = {"metrics": metrics, "adapter": adapter(dpo), "state": dpo.loss_state, "noted": noted}
    return found | {"largest": noting[1].largest if len(noting) > 1 else []}


def of_rank(folder: Path) -> None:
    """What this rank makes of each case in the folder, one after another."""
    os.environ.pop("PL_GLOBAL_SEED", None)  # of a run before this: DDP would take it
    store._REREAD_SHARE = math.inf  # a missing pair is always looked for among the other rank's, on a busy machine too
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        found = train(root=folder, devices=2, **case)
        if torch.distributed.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")
