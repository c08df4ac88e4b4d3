"""A base in shards on two ranks next to one process: losses, adapters, and the memory of a rank.

    python benchmarks/sharding.py                # prints the table of docs/memory.md
    python benchmarks/sharding.py --shape tiny   # in less time

All train on the same 21 pairs of unequal lengths, in micro-batches of which one rank has more than the other, under a
reference cache that has half of the completions, and measure 17 held-out pairs. Differences are from one process, after
one epoch of AdamW. Memory is that of the frozen weights, the head's too, which is whole.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from material import save_model, train_tokenizer

SIDES = {"one process": (1, "none"), "2 ranks, `policy.shard: all`": (2, "all")}
QUANTIZATIONS: tuple[Any, ...] = ("none", "nf4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="30M")
    parser.add_argument("--work", help="what one rank does")
    given = parser.parse_args()
    if given.work:
        work(json.loads(given.work))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _material(folder, given.shape)
        _start(folder, "fill", 1, "none")
        found = {side: _start(folder, side, *options) for side, options in SIDES.items()}
        _print(found)


def _material(folder: Path, shape: str) -> None:
    """Pairs, a tokenizer and a model."""
    chosen = random.Random(0)
    words = ["river", "stone", "green", "seven", "carry", "above", "little", "music"]

    def text(most: int) -> str:
        return " ".join(chosen.choices(words, k=chosen.randint(1, most)))

    rows = [{"prompt": text(40), "chosen": text(30), "rejected": text(30)} for _ in range(38)]
    for file, part in (("rows", rows[:21]), ("half", rows[:10]), ("held-out", rows[21:])):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    model = folder / "model"
    model.mkdir()
    save_model(model, shape, 8192, "float32", 1024)
    pairs = [{side: [{"content": row[side]}] for side in row} for row in rows]
    train_tokenizer(pairs, model)


def _start(folder: Path, side: str, world: int, shard: str) -> dict[str, Any]:
    """Run all ranks of a side, and return what the first one found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = folder / f"{side.replace(' ', '-').replace('`', '')}"
    for quantization in QUANTIZATIONS if side != "fill" else ():
        shutil.copytree(folder / "fill" / quantization / "cache", out / quantization / "cache")
    spec = json.dumps({"folder": str(folder), "out": str(out), "fill": side == "fill", "world": world, "shard": shard})
    processes = []
    for rank in range(world):
        of_rank = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "RANK": rank}
        of_rank |= {"LOCAL_RANK": rank, "NODE_RANK": 0} if world > 1 else {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in of_rank.items()}}
        call = [sys.executable, __file__, "--work", spec]
        processes.append(subprocess.Popen(call, env=environment, stdout=subprocess.DEVNULL))
    if sum(process.wait() != 0 for process in processes):  # all are waited for
        raise SystemExit(f"{side} failed")
    found: dict[str, Any] = json.loads((out / "found.json").read_text())
    return found


def work(spec: dict[str, Any]) -> None:
    """Train on this rank, in both quantisations."""
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DDPStrategy

    from lit_dpo import DPOModule, LoRAPolicy, PreferenceDataModule
    from lit_dpo.references import CachedReference

    torch.set_num_threads(1)
    folder, out, found = Path(spec["folder"]), Path(spec["out"]), {}
    for quantization in QUANTIZATIONS:
        torch.manual_seed(0)
        policy = LoRAPolicy(str(folder / "model"), quantization=quantization, r=8, shard=spec["shard"])
        reference = CachedReference(directory=str(out / quantization / "cache"))
        module = DPOModule(policy, reference=reference, microbatch_tokens=150, optimizer=_optimizer)
        several = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": spec["world"]}
        trainer = Trainer(
            default_root_dir=out / quantization,
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            **(several if spec["world"] > 1 else {}),
        )
        data = PreferenceDataModule(
            train=str(folder / ("half.jsonl" if spec["fill"] else "rows.jsonl")),
            val=str(folder / "held-out.jsonl"),
            batch_size=8 // spec["world"],
            eval_batch_size=4 // spec["world"],
        )
        trainer.fit(module, datamodule=data)
        frozen = [p for p in module.model.parameters() if not p.requires_grad]
        found[quantization] = {
            "adapter": {
                n: p.detach().flatten().tolist() for n, p in module.model.named_parameters() if p.requires_grad
            },
            "measured": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "held": sum(p.numel() * p.element_size() for p in (_here(p) for p in frozen)),
        }
    if os.environ.get("RANK", "0") == "0":
        (out / "found.json").write_text(json.dumps(found))


def _optimizer(parameters: Any) -> Any:
    from torch.optim import AdamW

    return AdamW(parameters, lr=1e-3, weight_decay=0.0)


def _here(parameter: Any) -> Any:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _print(found: dict[str, Any]) -> None:
    print("| | largest difference of a measure | of an adapter weight, of the largest | frozen weights per rank |")
    print("|---|---|---|---|")
    for quantization in QUANTIZATIONS:
        alone = found["one process"][quantization]
        for side, both in found.items():
            this = both[quantization]
            measured = max(abs(value - alone["measured"][name]) for name, value in this["measured"].items())
            pairs = [
                (a, b) for n in alone["adapter"] for a, b in zip(alone["adapter"][n], this["adapter"][n], strict=True)
            ]
            apart, size = max(abs(a - b) for a, b in pairs), max(abs(a) for a, _ in pairs)
            kind = "float32" if quantization == "none" else "NF4"
            print(f"| {kind}, {side} | {measured:.1g} | {apart:.1g} of {size:.2g} | {this['held'] / 1e6:.1f} MB |")


if __name__ == "__main__":
    main()
