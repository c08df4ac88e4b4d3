"""What remembering the reference saves: time of each epoch, and of a second run with another loss.

    python benchmarks/epochs.py --data pairs.json
    python benchmarks/epochs.py --made 600,300
    python benchmarks/epochs.py --device cuda --shape 1B --vocabulary 128256 --made 300,250 --batch-size 8

The same pairs and order, trained plainly and with a `CachedReference`, in turn, `--repeats` times over. Losses are
compared before any time is printed (in 16 bits to what rounding makes of other batch mates), and passes of the
reference are counted. CPU seconds on a CPU, wall seconds on a GPU, whose first run, that warms up, is dropped.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch

from lit_dpo import CachedReference, DPOModule, IPOLoss, LoRAPolicy, PreferenceDataModule
from lit_dpo.logps.score import completion_logps
from lit_dpo.losses import DPOLoss
from lit_dpo.references import base
from material import SHAPES, made_conversations, place_model, read_pairs, train_tokenizer


class Epochs(pl.Callback):
    """Seconds of each epoch, all losses, and passes of the reference over pairs."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.losses: list[Any] = []  # tensors until the end: reading one waits for the device

    def on_train_epoch_start(self, *_: Any) -> None:
        self.start = self.now()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"])

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds.append(self.now() - self.start)

    def on_train_end(self, *_: Any) -> None:
        self.losses = torch.stack(self.losses).tolist()

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def train(
    given: argparse.Namespace, folder: Path, reference: Any = None, loss: Any = None, epochs: int | None = None
) -> tuple[Epochs, int]:
    """One run; the times and losses of its epochs, and how many pairs the reference scored."""
    passes = [0]

    def counting(model: Any, batch: Any, **options: Any) -> Any:
        passes[0] += batch.size
        return completion_logps(model, batch, **options)

    torch.manual_seed(0)
    policy = LoRAPolicy(str(folder / "model"), quantization=given.quantization, target_modules=["q_proj", "v_proj"])
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0)
    module = DPOModule(policy, loss or DPOLoss(), reference, optimizer, lr_scheduler="constant")
    data = PreferenceDataModule(
        train=str(folder / "pairs.jsonl"),
        max_length=given.max_length,
        truncation="truncate_prompt",
        batch_size=given.batch_size,
    )
    seen = Epochs(given.device)
    trainer = pl.Trainer(
        accelerator=given.device,
        devices=1,
        precision="32-true" if given.device == "cpu" else "bf16-mixed",
        max_epochs=epochs or given.epochs,
        limit_train_batches=given.pairs // given.batch_size,
        callbacks=[seen],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    with mock.patch.object(base, "completion_logps", counting):
        trainer.fit(module, data)
    return seen, passes[0]


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="pairs: .json, .jsonl or .jsonl.gz")
    parser.add_argument("--made", help="instead of --data: mean tokens of prompt and completion, such as 600,300")
    parser.add_argument("--shape", choices=SHAPES, default="5M")
    parser.add_argument("--vocabulary", type=int, default=8192, help="rows of the head")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--store", type=Path, help="a folder where made weights stay, for the next program")
    return parser.parse_args(given)


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Train plainly and with what is remembered; print and return medians of seconds."""
    if given.device == "cpu":
        torch.set_num_threads(1)
    rows: dict[str, list[list[float]]] = {}
    apart = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = (read_pairs(given.data) if given.data else made_conversations(given.made, given.pairs))[: given.pairs]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        train_tokenizer(pairs, folder / "model")
        dtype, tolerance = ("float32", 1e-4) if given.device == "cpu" else ("bfloat16", 5e-2)
        sizes = (given.shape, given.vocabulary, dtype, max(2048, given.max_length), given.device)
        place_model(folder / "model", given.store, *sizes)
        if given.device == "cuda":
            train(given, folder, epochs=1)
        for repeat in range(given.repeats):
            cached = CachedReference(directory=str(folder / f"cache-{repeat}"))
            runs = {
                "plain": train(given, folder),
                "cached, first run": train(given, folder, cached),
                "cached, another loss": train(given, folder, cached, IPOLoss(beta=0.5)),
                "plain, another loss": train(given, folder, None, IPOLoss(beta=0.5)),
            }
            for one, other in (("plain", "cached, first run"), ("plain, another loss", "cached, another loss")):
                furthest = max(abs(a - b) for a, b in zip(runs[one][0].losses, runs[other][0].losses, strict=True))
                apart = max(apart, furthest)
                if not furthest <= tolerance:
                    raise SystemExit(f"losses of {one} and {other} differ by {furthest}, more than {tolerance}")
            for kind, (epochs, passes) in runs.items():
                rows.setdefault(kind, []).append([*epochs.seconds, passes])
    medians = {kind: [statistics.median(column) for column in zip(*runs, strict=True)] for kind, runs in rows.items()}
    return show(medians, given) | {"losses differ by": apart}


def show(medians: dict[str, list[float]], given: argparse.Namespace) -> dict[str, Any]:
    print(f"{given.data.name if given.data else given.made}, {given.shape}, {given.quantization}: seconds an epoch")
    for kind, (*seconds, passes) in medians.items():
        print(
            f"{kind:22}" + "".join(f"{one:8.2f}" for one in seconds) + f"   pairs through the reference: {passes:.0f}"
        )
    first, *later = medians["cached, first run"][:-1]
    print(f"first epoch / plain first epoch: {first / medians['plain'][0]:.2f}")
    print(f"first epoch / later epochs: {first / statistics.median(later):.2f}")
    second = statistics.median(medians["cached, another loss"][:-1])
    print(f"plain epoch / epoch of a second run: {statistics.median(medians['plain, another loss'][:-1]) / second:.2f}")
    return {
        "seconds": {kind: seconds for kind, (*seconds, _) in medians.items()},
        "pairs through the reference": {kind: passes for kind, (*_, passes) in medians.items()},
        "plain epoch": statistics.median(medians["plain"][:-1]),
        "first epoch, cached": first,
        "later epoch, cached": statistics.median(later),
    }


if __name__ == "__main__":
    compare(arguments())
