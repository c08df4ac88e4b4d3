"""Train on streams and mixtures: in a test's own process, or on two ranks with `of_rank`."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_dpo import CachedReference
from lit_dpo.errors import DataError
from training import Trace, adapter, data, module, trainer

STEP = 2  # after which a checkpoint is written


def train(
    model: str,
    train: Any,
    root: Path,
    devices: int = 1,
    cache: str = "",
    epochs: int = 1,
    ckpt_path: str | None = None,
    size: int = 6,
    keep: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """What came out of it: the rows of each step and rank, and the adapter, or the error."""
    given = {"reference": CachedReference(directory=cache)} if cache else {}
    dpo = module(model, optimizer=functools.partial(torch.optim.SGD, lr=0.1), **given)
    trace = Trace()
    kept = [ModelCheckpoint(root, filename="{step}", every_n_train_steps=STEP, save_top_k=-1)] if keep else []
    if "max_tokens" not in options:
        options["batch_size"] = size // devices
    strategy = "ddp" if devices > 1 else "auto"
    run = trainer(
        root,
        devices=devices,
        strategy=strategy,
        max_epochs=epochs,
        enable_checkpointing=keep,
        callbacks=[trace, *kept],
    )
    found: dict[str, Any] = {"error": ""}
    try:
        run.fit(dpo, data(train, **options), ckpt_path=ckpt_path)
    except DataError as error:
        found["error"] = str(error)
    found |= {"rows": _of_all_ranks(trace.rows, devices), "errors": _of_all_ranks(found["error"], devices)}
    return found if found["error"] else {**found, "adapter": adapter(dpo)}


def _of_all_ranks(mine: Any, devices: int) -> list[Any]:
    everybody = [mine]
    if devices > 1:
        everybody *= devices
        torch.distributed.all_gather_object(everybody, mine)
    return everybody


def of_rank(folder: Path) -> None:
    """What this rank makes of each case in the folder, one after another."""
    os.environ.pop("PL_GLOBAL_SEED", None)  # of a run before this: DDP would take it
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        found = train(root=folder / name, devices=2, **case)
        if torch.distributed.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")
