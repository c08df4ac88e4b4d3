"""A step of a sharded run on a rank: the bytes that it gathers and reduces, as the process group is asked for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.utils._python_dispatch import TorchDispatchMode

from lit_dpo.memory import stored_bytes
from training import data, module, trainer


class Collectives(TorchDispatchMode):
    """Notes what each collective operation sends or fills, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[int] = []
        self.reduced: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_allgather_base_":
            self.gathered.append(args[0].numel() * args[0].element_size())
        elif name == "allreduce_":
            self.reduced.append(sum(one.numel() * one.element_size() for one in args[0]))
        return func(*args, **(kwargs or {}))


class OfOneStep(Callback):
    """Counts those of the second step: the first one has DDP sort its buckets."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.microbatches = len(pl_module.passes.cut(batch))
            self.counted = Collectives()
            self.counted.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.counted.__exit__(None, None, None)


def step(model: str, pairs: str, root: Path, microbatch_tokens: int, policy: dict[str, Any]) -> dict[str, Any]:
    """What this rank stores, and what it gathers and reduces in a step."""
    dpo, counting = module(Path(model), policy=policy, microbatch_tokens=microbatch_tokens), OfOneStep()
    strategy = DDPStrategy(process_group_backend="gloo")
    run = trainer(root, devices=2, strategy=strategy, callbacks=[counting], max_steps=2, num_sanity_val_steps=0)
    run.fit(dpo, data(pairs))
    frozen, trained = stored_bytes(dpo.model)
    return {
        "frozen": frozen,
        "trained": trained,
        "gathered": counting.counted.gathered,
        "reduced": counting.counted.reduced,
        "microbatches": counting.microbatches,
    }
