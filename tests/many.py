"""What ranks do in the tests of many processes: each function runs on every one of them, or on one process alone."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow.parquet as pq
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from lit_dpo import EMAReference
from lit_dpo.callbacks import PredictionWriter, TrainingDynamics
from lit_dpo.data.formats import Rankings, Triples
from lit_dpo.logps import CompletionLogps, PairLogps, SequenceLogps, coupling
from lit_dpo.losses import BCOLoss, PreferenceLoss
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
    """An epoch of each loss, in batches of six over all ranks; of rankings with a validation of two prompts."""
    dpo = module(
        model, optimizer=functools.partial(torch.optim.SGD, lr=0.01 if ranked else 0.1), microbatch_tokens=tokens
    )
    noting = OneAfterAnother(losses)
    run = trainer(
        root,
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=len(losses),
        callbacks=[noting, PredictionWriter(str(root / "predictions.jsonl"))],
        num_sanity_val_steps=0,
    )
    few = str(Path(file).with_name("few.jsonl"))
    given = {"val": few, "predict": few, "format": Rankings()} if ranked else {"format": COLUMNS}
    rows = data(file, batch_size=6 // ranks, **given)
    run.fit(dpo, rows)
    assert run.world_size == ranks
    if ranked:
        run.predict(dpo, rows)
        if run.is_global_zero:
            lines = (root / "predictions.jsonl").read_text().splitlines()
            noting.found[-1]["predicted"] = [json.loads(line) for line in lines]
    return noting.found


def exchange(cpu: bool) -> tuple[Any, Any]:
    """Records of unequal sizes, as they are on a CPU, or as what is on a device goes: joined, and this rank's part."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    if not cpu:
        coupling._leave = functools.partial(_as_on_a_device, coupling._OnDevice)
    pairs = record(rank, 1 + 2 * rank)
    joined = coupling.meet(pairs).around(pairs)
    return joined, coupling.meet(pairs).own(joined.policy_chosen.total, pairs)


def _as_on_a_device(stands: Any, tensor: torch.Tensor, mine: list[torch.Tensor]) -> Any:
    if tensor.dtype == torch.int64 and tensor.ndim == 2:  # places of comparisons stay on the CPU
        return tensor
    mine.append(tensor)
    return stands(tuple(tensor.shape), tensor.dtype)


def record(seed: int, prompts: int) -> PairLogps:
    """Of prompts with two or three completions of which each is compared with the next one, and a column in halves."""
    random = torch.Generator().manual_seed(seed)
    counts = 2 + torch.randint(2, (prompts,), generator=random)
    lengths = 1 + torch.randint(3, (int(counts.sum()),), generator=random)
    per_token = torch.randn(int(lengths.sum()), generator=random)
    logps = SequenceLogps(torch.randn(len(lengths), generator=random), lengths, per_token)
    compared = torch.cat([torch.stack([torch.arange(n - 1), torch.arange(1, n)], 1) for n in counts.tolist()])
    lists = CompletionLogps(logps, logps._replace(per_token=None), lengths, counts, compared, counts - 1)
    return lists.pairs({"agreement": torch.rand(len(compared), generator=random).half()}, torch.zeros(2))


class Killed(Exception):
    """As the process would be."""


class Stop(Callback):
    """Writes a checkpoint after the third step, and nothing else after that if it kills."""

    def __init__(self, path: Path, *, kill: bool) -> None:
        self.path, self.kill = path, kill

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3 and batch_idx % 2:
            trainer.save_checkpoint(self.path)
            if self.kill:
                raise Killed


def go_on(
    model: str, pairs: str, root: Path, ranks: int, *, kill: int = 0, ckpt: str | None = None, dropout: float = 0.0
) -> dict[str, Any]:
    """Two epochs of two steps of two batches of six, with all that a run carries on; or a part of them."""
    dpo = module(
        model,
        loss=BCOLoss(),
        reference=EMAReference(alpha=0.5, every=1),
        lr_scheduler="linear",
        policy={"dropout": dropout},
    )
    run = trainer(
        root,
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=2,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        limit_val_batches=1,
        logger=CSVLogger(root, name="", version=0),
        callbacks=[TrainingDynamics(), *([] if ckpt else [Stop(root / "third.ckpt", kill=kill)])],
        num_sanity_val_steps=0,
    )
    with suppress(Killed):
        run.fit(dpo, data(pairs, val=pairs, batch_size=6 // ranks), ckpt_path=ckpt)
    found = {"adapter": adapter(dpo), "state": dpo.loss_state, "steps": run.global_step}
    if not kill and run.is_global_zero:
        rows = list(csv.DictReader((root / "version_0" / "metrics.csv").open()))
        found["rows"] = {
            (row["step"], name): float(value)
            for row in rows
            for name, value in row.items()
            if value and name not in ("step", "epoch")
        }
        noted = pq.read_table(next(root.rglob("dynamics.parquet")))
        found["noted"] = {name: torch.tensor(values, dtype=torch.float64) for name, values in noted.to_pydict().items()}
    return found


def tail(model: str, file: str, root: Path) -> tuple[int, dict[str, float]]:
    """Steps and measures of epochs whose last step is one rank's alone, with no row in between."""
    run = trainer(root, devices=2, strategy="ddp", max_epochs=2, log_every_n_steps=50)
    run.fit(module(model), data(file, batch_size=2))
    return run.global_step, {name: float(value) for name, value in run.callback_metrics.items()}
