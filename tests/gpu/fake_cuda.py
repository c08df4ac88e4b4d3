"""A CUDA device without one: real shapes, types and devices, and no numbers (`FakeTensorMode`), in no-grad passes.

It needs a CUDA build of torch, not a driver: `pip install torch` on Linux brings one. What is seen is what `pretend.py`
cannot say: that the branches for `cuda` are taken, and that `varlen_attn` itself accepts what it is given. A tensor on
the CPU among others, and a wait for the device, is an error of torch's. Prints JSON: `python fake_cuda.py FOLDER`.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import tiny
from lit_dpo import AdapterReference, BaseReference, CachedReference, EMAReference, LoRAPolicy, ModelReference
from lit_dpo.data.batch import CompletionBatch, collate
from lit_dpo.logps import attention
from lit_dpo.logps.score import completion_logps
from lit_dpo.module import DPOModule
from lit_dpo.references.base import attached, keep_attached

CUDA = torch.device("cuda", 0)
PAIRS = ((9, 14, 6), (3, 5, 11, 4), (20, 1, 1))
PADDED = ("falcon", "bloom")
EXPERTS = ("mixtral", "mixtral-router-logits", "afmoe")  # torch 2.11's fake `_grouped_mm` takes bfloat16 alone


class FakeCuda:
    """What is made for real, and what it becomes on the device; `on` is where that runs."""

    def __init__(self) -> None:
        self.on = FakeTensorMode(allow_non_fake_inputs=True)
        self.calls: list[torch.dtype] = []

    def model(self, name: str, prepare: Callable[[Any], Any] | None = None, dtype: torch.dtype = torch.bfloat16) -> Any:
        """A policy whose weights are on the device, its adapters in float32."""
        model = tiny.lora(tiny.model(name)).eval()
        if prepare is not None:
            prepare(model)
        if name not in PADDED:
            attention.use_pair_attention(model.get_base_model())
        self.move(model, dtype)
        return model

    def move(self, model: Any, dtype: torch.dtype) -> None:
        """One by one, since `.to` cannot swap them."""
        adapters = {id(one) for name, one in model.named_parameters() if "lora_" in name}
        with self.on, torch.no_grad():
            for module in model.modules():
                for name, one in module._parameters.items():
                    if one is not None:
                        fake = self.tensor(one.detach(), one.dtype if id(one) in adapters else dtype)
                        module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
                for name, one in module._buffers.items():
                    if one is not None:
                        module._buffers[name] = self.tensor(one)

    def tensor(self, one: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.on.from_tensor(one).to(CUDA, dtype if one.is_floating_point() else None)

    def batch(self, real: CompletionBatch) -> CompletionBatch:
        """Tokens and weights without numbers; lengths, which stay on the CPU, with theirs."""
        fakes = {name: self.on.from_tensor(getattr(real, name)) for name in ("input_ids", "position_ids")}
        columns = {name: self.on.from_tensor(column) for name, column in real.columns.items()}
        with self.on:
            return real._replace(**fakes, columns=columns).to(CUDA)

    def scored(self, model: Any, batch: CompletionBatch) -> list[str]:
        """The types of the kernel's calls."""
        self.calls.clear()
        with self.on:
            found = completion_logps(model, batch)
            _all_there(found)
        assert {one.dtype for one in tree_leaves(found) if one is not None} == {torch.float32}
        return [str(one) for one in self.calls]


def _all_there(found: Any) -> None:
    devices = {one.device for one in tree_leaves(found) if isinstance(one, torch.Tensor)}
    assert devices == {CUDA}, devices


def walks(fake: FakeCuda, folder: Path) -> dict[str, Callable[[], Any]]:
    """By name: every architecture, references, rows, divergences, losses and metrics."""
    real = collate(tiny.pairs(*PAIRS), columns={"weight": [1.0, 2.0, 3.0, 0.5, 1.0]})
    batch = fake.batch(real)
    policy = LoRAPolicy(str(folder / "model"), quantization="none", r=2)
    found: dict[str, Callable[[], Any]] = {
        f"{name} {str(dtype).removeprefix('torch.')}": lambda name=name, dtype=dtype: fake.scored(
            fake.model(name, dtype=dtype), batch
        )
        for name in (*tiny.FLAT, *PADDED)
        for dtype in (torch.bfloat16, torch.float32)
        if dtype == torch.bfloat16 or name not in EXPERTS
    }

    def under(reference: Any) -> None:
        model = fake.model("llama", lambda one: reference.attach(one, policy))
        with fake.on:
            _all_there(reference.logps(model, batch))

    def another() -> None:
        model, other = fake.model("llama"), tiny.model("mistral-window")
        attention.use_pair_attention(other)
        fake.move(other, torch.bfloat16)
        keep_attached(model, "reference", other)
        with fake.on:
            _all_there(ModelReference("any").logps(model, batch))

    def stored() -> None:
        reference = CachedReference(directory=str(folder / "cache"))
        model = fake.model("llama", lambda one: reference.attach(one, policy))
        values = [np.zeros(1 + length, np.float32) for length in real.completion_lengths.tolist()]
        # a pass would have to wait for its numbers
        attached(model, "cache")._store(model).put(
            {key.tobytes(): one for key, one in zip(real.keys.numpy(), values, strict=True)}
        )
        keys = real.keys.numpy()  # inside, a tensor with numbers has none either
        with fake.on:
            _all_there(reference.logps(model, batch._replace(keys=SimpleNamespace(numpy=lambda: keys))))

    def divergence() -> None:
        model = fake.model("llama")
        with fake.on:
            _all_there(tiny.with_kl(model, batch, BaseReference().activated, collision=True))

    def module() -> None:
        dpo = DPOModule(policy)
        dpo.model, dpo.couples_pairs = fake.model("llama"), True
        with fake.on:
            for metric in dpo.train_metrics.values():
                metric.total, metric.count = fake.tensor(metric.total), fake.tensor(metric.count)
            pairs = dpo.pair_logps(batch)
            losses = dpo.losses_of(pairs)
            chosen, rejected = dpo.loss.rewards(pairs)
            dpo.train_metrics.update(
                pairs=pairs, losses=losses, parts={}, chosen_rewards=chosen, rejected_rewards=rejected
            )
            of_models = (*pairs[:6], *pairs.completions[:2])  # counts and places stay on the CPU
            _all_there((of_models, losses, chosen, rejected, dpo.train_metrics.compute()))

    return found | {
        "rows": lambda: [fake.scored(fake.model("llama"), fake.batch(row)) for row in real.cut(30)],
        "some completions": lambda: fake.scored(fake.model("llama"), fake.batch(real.of_completions([0, 3, 4]))),
        "base reference": lambda: under(BaseReference()),
        "adapter reference": lambda: under(AdapterReference(str(folder / "adapter"))),
        "moving reference": lambda: under(EMAReference()),
        "another model": another,
        "stored reference": stored,
        "divergence": divergence,
        "module": module,
    }


def main(folder: Path) -> None:
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    tiny.directory(folder / "model")
    tiny.lora(tiny.model()).save_pretrained(folder / "adapter")
    fake, varlen, found = FakeCuda(), attention._varlen, dict[str, Any]()

    def counted(*given: Any) -> Any:
        fake.calls.append(given[0].dtype)
        return varlen(*given)

    attention._varlen = counted
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    for name, walk in walks(fake, folder).items():
        try:
            with torch.no_grad():
                found[name] = {"found": walk()}
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:1000], "trace": traceback.format_exc()[-5000:]}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
