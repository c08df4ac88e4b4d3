"""Stops a run at every step of two epochs, in every way there is, and goes on: weights, metrics and rows to the bit.

Run it for the whole table (`python tests/stops.py`); the suite runs a part of it (`test_stops.py`).
"""

from __future__ import annotations

import csv
import functools
import itertools
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer import Trainer

from lit_dpo import EMAReference
from lit_dpo.callbacks import LearningRate
from lit_dpo.losses import BCOLoss
from training import Trace, data, trainer
from training import light as module

WAYS = ("should_stop", "early_stopping", "max_time", "max_steps", "sigterm", "sigint", "killed", "killed at the end")
BATCHES = 6  # of an epoch: 21 pairs in batches of 4


class Killed(Exception):
    """As the process would be."""


class Stop(Callback):
    """Stops a run once it has taken some batches, in one of the ways."""

    def __init__(self, way: str, batches: int, root: Path) -> None:
        self.way, self.batches, self.seen, self.root = way, batches, 0, root

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.seen += 1
        if self.seen != self.batches:
            return
        if self.way == "should_stop":
            trainer.should_stop = True
        if self.way == "max_time":
            (timer,) = (one for one in trainer.callbacks if isinstance(one, Timer))
            while (left := timer.time_remaining()) and left > 0:
                time.sleep(left)
        if self.way == "killed":  # right after a checkpoint: nothing else is written
            trainer.save_checkpoint(self.root / "stopped.ckpt")
            raise Killed
        if self.way == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.way == "sigint":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.way == "killed at the end" and self.seen >= self.batches:  # the row of the epoch is not written
            trainer.save_checkpoint(self.root / "stopped.ckpt")
            raise Killed

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.way == "early_stopping" and not trainer.sanity_checking and self.seen >= self.batches:
            trainer.callback_metrics["stop"] = torch.tensor(1.0)


class Patience(EarlyStopping):
    """Without any, once `Stop` says so."""

    def __init__(self) -> None:
        super().__init__("stop", strict=False, stopping_threshold=0.5, mode="max", patience=100)


def run(
    model: Path,
    pairs: Path,
    root: Path,
    *,
    way: str = "",
    batches: int = 0,
    accumulate: int = 1,
    ckpt_path: Path | None = None,
    every: int = 4,
    workers: int | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, list[dict[str, str]]]:
    """One run, stopped or not: its trainer, its module, and the rows that it logged; a stream if `workers` says of how
    many processes.
    """
    stream = {} if workers is None else {"streaming": True, "shuffle_buffer": 10, "num_workers": workers}
    stop, trace = Stop(way, batches, root), Trace()
    callbacks: list[Any] = [LearningRate(), stop, trace]
    if way in ("sigterm", "sigint"):
        callbacks.append(OnExceptionCheckpoint(root, "stopped"))
    elif not way.startswith("killed"):
        callbacks.append(ModelCheckpoint(root, filename="{epoch}", save_on_train_epoch_end=True, save_top_k=-1))
    if way == "early_stopping":
        callbacks.insert(2, Patience())
    if way == "max_time":
        callbacks.append(Timer({"seconds": 1}))
    steps = -(-batches // accumulate)
    given: dict[str, Any] = {
        "max_epochs": 2,
        "max_steps": steps if way == "max_steps" else -1,
        "val_check_interval": 2,
        "limit_val_batches": 1,
        "accumulate_grad_batches": accumulate,
        "log_every_n_steps": every,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": True,
        "logger": CSVLogger(root, name="rows", flush_logs_every_n_steps=1),
        "callbacks": callbacks,
        **kwargs,
    }
    dpo = module(model, policy={"dropout": 0.1}, loss=BCOLoss(), reference=EMAReference(0.5, 1))
    made = trainer(root, **given)
    try:
        made.fit(dpo, data(pairs, val=str(pairs), **stream), ckpt_path=ckpt_path)
    except (SystemExit, Killed):
        assert way in ("sigterm", "sigint", "killed", "killed at the end")
    file = Path(made.log_dir) / "metrics.csv"
    return made, dpo, list(csv.DictReader(file.open())) if file.exists() else []


def logged(rows: list[dict[str, str]]) -> dict[tuple[str, str], dict[str, str]]:
    """Rows by their kind and step."""
    found = {}
    for row in rows:
        values = {name: value for name, value in row.items() if value and name not in ("epoch", "step")}
        found[next(iter(values)).split("/")[0], row["step"]] = values
    return found


def compare(whole: Any, resumed: Any, before: list[dict[str, str]] = ()) -> str:  # type: ignore[assignment]
    """What differs, or "equal"."""
    (one, mine, rows), (other, theirs, later) = whole, resumed
    if one.global_step != other.global_step:
        return f"{other.global_step} steps instead of {one.global_step}"
    for name, tensor in mine.state_dict().items():
        if not torch.equal(tensor, theirs.state_dict()[name]):
            return f"{name} is off by {float((tensor - theirs.state_dict()[name]).abs().max()):.2g}"
    expected, found = logged(rows), logged(before) | logged(later)
    if missing := expected.keys() - found.keys():
        return f"no rows {sorted(missing)}"
    wrong = [key for key, values in expected.items() if values != found[key]]
    return f"other numbers in the rows {sorted(wrong)}" if wrong else "equal"


@functools.cache
def straight(model: Path, pairs: Path, accumulate: int, workers: int | None = None) -> Any:
    """A run that is not stopped."""
    with tempfile.TemporaryDirectory() as folder:
        return run(model, pairs, Path(folder), accumulate=accumulate, workers=workers)


def table(
    model: Path,
    pairs: Path,
    ways: Any = WAYS,
    batches: Any = range(1, 2 * BATCHES),
    accumulations: Any = (1, 4),
    workers: int | None = None,
):
    """Outcomes by way, accumulation and batch."""
    for accumulate in accumulations:
        with tempfile.TemporaryDirectory() as folder:
            for way, at in itertools.product(ways, batches):
                root = Path(folder) / f"{way}-{at}"
                stopped = run(model, pairs, root, way=way, batches=at, accumulate=accumulate, workers=workers)
                checkpoint = max(root.glob("*.ckpt"), key=lambda file: file.stat().st_mtime, default=None)
                if checkpoint is None and stopped[0].global_step == 0:
                    yield way, accumulate, at, "equal: no step was made, and nothing was saved"
                    continue
                resumed = run(model, pairs, root / "on", accumulate=accumulate, ckpt_path=checkpoint, workers=workers)
                whole = straight(model, pairs, accumulate, workers)
                yield way, accumulate, at, compare(whole, resumed, stopped[2])


if __name__ == "__main__":
    model, pairs = map(Path, sys.argv[1:3])
    ways = sys.argv[3].split(",") if len(sys.argv) > 3 else WAYS
    workers = int(sys.argv[4]) if len(sys.argv) > 4 else None
    for way, accumulate, at, outcome in table(model, pairs, ways, workers=workers):
        print(f"{way:15} accumulate {accumulate} batch {at:2}: {outcome}", flush=True)
