"""Train over all pairs and validate: in a test's own process, or on two ranks with `of_rank`."""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from lit_dpo import CachedReference, losses
from lit_dpo.callbacks import TrainingDynamics
from lit_dpo.data.formats import Rankings
from lit_dpo.references import store
from training import adapter, data, module, trainer


def train(
    model: str,
    pairs: str,
    root: Path,
    devices: int = 1,
    accumulate: int = 1,
    cache: str = "",
    loss: str = "DPOLoss",
    ranked: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """What came out of it, on this rank."""
    given = {"loss": getattr(losses, loss)(), **options}
    given |= {"reference": CachedReference(directory=cache)} if cache else {}
    # rankings also in parts of a prompt
    rows = {"microbatch_tokens": 30 if ranked else 200} if devices > 1 else {}
    dpo = module(model, optimizer=functools.partial(torch.optim.SGD, lr=1.0), **given, **rows)
    strategy = "ddp" if devices > 1 else "auto"
    steps = {"max_epochs": 2 if cache else 1, "accumulate_grad_batches": accumulate, "log_every_n_steps": 50}
    noting = [TrainingDynamics()]
    run = trainer(root, devices=devices, strategy=strategy, callbacks=noting, num_sanity_val_steps=0, **steps)
    size = 22 if accumulate == 1 else 6  # of all ranks together; the tail of 21 pairs is shared unevenly
    how = {"format": Rankings()} if ranked else {}
    run.fit(dpo, data(pairs, val={"one": pairs, "two": pairs}, batch_size=size // devices, eval_batch_size=3, **how))
    assert run.world_size == devices
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    noted = pq.read_table(root / "dynamics.parquet").to_pydict() if run.is_global_zero else {}
    return {"metrics": metrics, "adapter": adapter(dpo), "state": dpo.loss_state, "noted": noted}


def of_rank(folder: Path) -> None:
    """What this rank makes of each case in the folder, one after another."""
    os.environ.pop("PL_GLOBAL_SEED", None)  # of a run before this: DDP would take it
    store._REREAD_SHARE = math.inf  # a missing pair is always looked for among the other rank's, on a busy machine too
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        found = train(root=folder, devices=2, **case)
        if torch.distributed.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")
