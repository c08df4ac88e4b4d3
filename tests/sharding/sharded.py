"""What the tests of a sharded base run on one rank and on two: whole runs, and what came of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from lit_dpo.callbacks import SampleCompletions
from lit_dpo.data.formats import Rankings
from lit_dpo.logps.attention import has_pair_attention
from lit_dpo.losses import BetaDPOLoss, PlackettLuceLoss, TDPOLoss
from lit_dpo.policy.adapters import is_adapters
from lit_dpo.references import CachedReference, EMAReference, ModelReference
from training import adapter, data, module, trainer

ADAPTERS = ("fill", "first", "second", "both")
"""Of these the adapters are asked for alone; the other cases validate and test, too."""


class Held(Callback):
    """Sees how many bytes of the decoder's weights are on this rank while it trains."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count them; the head, and an embedding that is the head, are whole."""
        base = pl_module.model.get_base_model()
        head = {id(p) for p in base.get_output_embeddings().parameters()}
        mine = [p for name, p in base.named_parameters() if not is_adapters(name) and id(p) not in head]
        local = [p.to_local() if hasattr(p, "to_local") else p for p in mine]
        self.bytes = sum(p.numel() * p.element_size() for p in local)


def runs(folder: Path, files: dict[str, Path], models: dict[str, Path], cases: list[str], shard: str = "all") -> Any:
    """Train by the options of some cases, one after another; what came of each, by its name."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    found = {}
    for case in cases:
        if world > 1:
            os.environ["WORLD_SIZE"] = str(world)  # Lightning takes it away at the end of a run
        found[case] = run(folder / f"{case}-{shard}-{world}", files, models, case, shard, world)
    return found


def run(folder: Path, files: dict[str, Path], models: dict[str, Path], case: str, shard: str, world: int) -> Any:
    """Train by a case's options, and return adapters and measures."""
    options: dict[str, Any] = {"policy": {}}
    given: dict[str, Any] = {"callbacks": [held := Held()]}
    model = models["tied" if case == "kl" else "untied"]
    if case in ("fill", "nf4"):  # "fill" leaves half of the completions in the cache of "nf4"
        options["policy"] = {"quantization": "nf4", "gradient_checkpointing": True}
        options["reference"] = CachedReference(directory=str(folder / "cache"))
        if case == "nf4":
            given |= {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "estimate": True}
    elif case == "kl":  # hidden states of the reference, which is an average; a head that is the embedding; texts
        options |= {"loss": TDPOLoss(), "reference": EMAReference(every=1)}
        given["callbacks"] += [SampleCompletions(prompts=3, max_new_tokens=4, every_n_steps=2)]
    elif case == "coupled":  # two passes; another model
        options |= {"loss": BetaDPOLoss(), "reference": ModelReference(str(models["tied"]), quantization="none")}
    elif case == "lists":  # in the last batch one rank has a prompt that runs in parts, the other has nothing
        options |= {"loss": PlackettLuceLoss()}  # and an adapter is continued, next to a frozen copy of it
        options["policy"] = {"adapter_path": str(folder.parent / "first-none-1" / "adapter")}
    elif case == "first":  # an epoch, with a checkpoint at its end
        given |= {"enable_checkpointing": True}
    elif case in ("second", "both"):  # the next one, on other ranks than the first; and both at once
        given |= {"max_epochs": 2}
    if alone := case in ADAPTERS:
        given |= {"limit_val_batches": 0}
    if world > 1:
        nodes = 2 if shard == "node" else 1
        rank = int(os.environ["RANK"])
        os.environ |= {"NODE_RANK": str(rank // (world // nodes)), "LOCAL_RANK": str(rank % (world // nodes))}
        strategy = DDPStrategy(process_group_backend="gloo")
        given |= {"strategy": strategy, "devices": world // nodes, "num_nodes": nodes}
    options["policy"] |= {"shard": shard}
    trained = module(model, microbatch_tokens=60 if case in ("nf4", "lists") else 120, **options)
    fitting = trainer(folder, num_sanity_val_steps=1, **given)
    train = files[{"fill": "half", "nf4": "all", "lists": "lists"}.get(case, "rows")]
    held_out = {"val": str(files["held out"]), "test": str(files["held out"]), "eval_batch_size": 4 // world}
    size = {"batch_size": 4 // world, "format": Rankings()} if case == "lists" else {"batch_size": 8 // world}
    pairs = data(train, **size, **({"val": str(train), "test": str(train)} if case == "lists" else held_out))
    other = [*folder.parent.glob(f"first-*-{3 - world}/checkpoints/*.ckpt")] if case == "second" else [None]
    fitting.fit(trained, datamodule=pairs, ckpt_path=other[0])
    measured = {name: float(value) for name, value in fitting.callback_metrics.items()}
    if not alone:
        measured |= {
            name: float(value) for name, value in fitting.test(trained, datamodule=pairs, verbose=False)[0].items()
        }
    texts = folder / "completions.jsonl"
    return {
        "adapter": {name: p.float().numpy() for name, p in adapter(trained).items()},
        "measured": measured,
        "held": held.bytes,
        "flat": has_pair_attention(trained.model.get_base_model()),
        "texts": texts.read_text() if texts.exists() else "",
    }
