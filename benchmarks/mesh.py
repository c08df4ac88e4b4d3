"""What 8 to 512 GPUs hold and send for one step of DPO, by the arithmetic of `lit-dpo fit --plan`: no weights, no GPU.

python benchmarks/mesh.py            # the table of docs/scale.md
python benchmarks/mesh.py --limits   # and from how many tokens a gather hides behind its pass

Two models of Llama's shape, in nodes of 8 H100. A micro-batch of 4,096 tokens with gradient checkpointing, the base as
the reference, AdamW, LoRA of rank 16 on all linear layers. All of it is arithmetic; no network was measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers

from lit_dpo import LoRAPolicy
from lit_dpo.memory import Lengths, StepEstimate
from lit_dpo.plan.arithmetic import count
from lit_dpo.plan.cards import CARDS, GIB
from lit_dpo.plan.mesh import Links, Mesh, Parts, Share, Traffic
from lit_dpo.plan.skeleton import Skeleton, skeleton

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": False}
MODELS = {
    "8B": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "70B": {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
}
WAYS = {  # quantisation and `policy.shard`
    "bf16, whole": ("none", "none"),
    "NF4, whole": ("nf4", "none"),
    "bf16, `node`": ("none", "node"),
    "bf16, `all`": ("none", "all"),
}
NODES, DEVICES = (1, 8, 64), 8
CARD = CARDS["H100"]
RATE = 400e12  # operations a second: 40 % of what the card is sold with
NETWORKS = (400.0, 50.0)  # 10^9 bits a second of a device's own port; the second is one such port of 8 devices
STEP = Lengths.of([(682, (683, 683))] * 2)
PASSES = 3  # of the reference, forward, backward
OPTIMIZER = 2.0  # copies of the adapters that AdamW keeps


class Row(NamedTuple):
    """A line of the table: GiB of each GPU, milliseconds of a step, and seconds of a micro-batch on each network."""

    model: str
    way: str
    gpus: int
    base: float
    gathered: float
    whole: float
    adapters: float
    reduce: float
    gathers: tuple[float, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limits", action="store_true")
    limits = parser.parse_args().limits
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    print("\n".join(table()))
    if limits:
        print()
        print("\n".join(hidden()))


def table() -> Iterator[str]:
    """The table, in Markdown."""
    yield (
        "| model, way | GPUs | base | gathered | head, scales | adapters | activations | in all, GiB | reduce, ms | "
        "gathers, s: 400 and 50 Gbit/s | arithmetic, s |"
    )
    yield "|" + "---|" * 11
    for row in rows():
        quantization = WAYS[row.way][0]
        alive, seconds = activations(row.model, quantization), sum(arithmetic(row.model))
        whole = row.base + row.gathered + row.whole + row.adapters + alive
        said = f"**{whole:.1f}**" if whole > CARD.memory else f"{whole:.1f}"
        yield f"{cells(row)[0]} {alive:.1f} | {said} | {cells(row)[1]} {seconds:.2f} |"


def cells(row: Row) -> tuple[str, str]:
    """What a line says before and after what takes a model's probes."""
    memory = f"{row.base:.2f} | {row.gathered:.2f} | {row.whole:.2f} | {row.adapters:.2f}"
    gathers = " · ".join(f"{one:.2f}" for one in row.gathers) if any(row.gathers) else "–"
    return f"| {row.model}, {row.way} | {row.gpus} | {memory} |", f"{row.reduce:.1f} | {gathers} |"


def rows() -> Iterator[Row]:
    """All lines, without probes: in a second."""
    for model in MODELS:
        for way, (quantization, shard) in WAYS.items():
            parts = sizes(model, quantization)
            for nodes in NODES:
                if shard == "all" and nodes == 1:
                    continue  # it is `node`
                mesh = Mesh(nodes, DEVICES, shard)
                share, traffics = Share.of(mesh, parts), [traffic(mesh, parts, network) for network in NETWORKS]
                adapters = parts.trained * (2 + OPTIMIZER) + share.buckets
                base, gathered, whole = (part / GIB for part in (share.base, share.gathered, share.whole))
                gathers = tuple(sum(one.gathering or ()) for one in traffics)
                reduce = 1000 * (traffics[0].reducing or 0)
                yield Row(model, way, mesh.ranks, base, gathered, whole, adapters / GIB, reduce, gathers)


def traffic(mesh: Mesh, parts: Parts, network: float) -> Traffic:
    return Traffic.of(mesh, parts.trained, [parts.spread] * PASSES, Links.of(CARD, network))


def hidden() -> Iterator[str]:
    """From how many tokens of a micro-batch a gather takes no longer than the forward pass that it is for."""
    yield "| model | one node | 8 nodes, 400 Gbit/s | 8 nodes, 50 Gbit/s |"
    yield "|" + "---|" * 4
    for model in MODELS:
        tokens = []
        for mesh, network in ((Mesh(1, 8, "all"), 400.0), *((Mesh(8, 8, "all"), network) for network in NETWORKS)):
            gathering = (traffic(mesh, sizes(model, "none"), network).gathering or (0.0,))[1]
            tokens.append(STEP.tokens * gathering / arithmetic(model)[1])
        yield f"| {model} | " + " | ".join(f"{one:,.0f}" for one in tokens) + " |"


# ---- models without weights ----


@cache
def made(model: str, quantization: str, layers: int | None) -> Skeleton:
    """A model of some layers; all of a model's are alike."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **LLAMA, **MODELS[model]}
        Path(folder, "config.json").write_text(json.dumps(config))
        policy = LoRAPolicy(folder, quantization=cast(Any, quantization), gradient_checkpointing=True)
        return skeleton(policy, torch.bfloat16, on_gpu=True, layers=layers)


def sizes(model: str, quantization: str) -> Parts:
    """Bytes of a model: of two layers, and what a third one adds for each of the others."""
    two, three = (Parts.of(made(model, quantization, layers).model) for layers in (2, 3))
    further = MODELS[model]["num_hidden_layers"] - 2
    grown = Parts(*(few + further * (more - few) for few, more in zip(two, three, strict=True)))
    return grown._replace(largest=two.largest)


@cache
def activations(model: str, quantization: str) -> float:
    """GiB of a micro-batch: what is alive after the forward pass, and the most on top of it."""
    estimates = []
    for layers in (2, 3):
        one = made(model, quantization, layers)

        @contextmanager
        def context(one: Skeleton = one) -> Iterator[None]:
            with one.fake, torch.autocast("cpu", dtype=torch.bfloat16):
                yield

        estimates.append(StepEstimate(one.model, OPTIMIZER, context=context))
    whole = estimates[0].with_layers(estimates[1], MODELS[model]["num_hidden_layers"] - 2, 0, 0)
    return whole.of([STEP]).total / GIB


@cache
def arithmetic(model: str) -> tuple[float, ...]:
    """Seconds of each pass of a micro-batch: of the reference, forward, and backward with what is computed again."""
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    few, more = (count(made(model, "none", layers), lambda: autocast, STEP) for layers in (2, 3))
    found = few.with_layers(more, MODELS[model]["num_hidden_layers"] - 2)
    return found.forward / RATE, found.forward / RATE, found.backward / RATE


if __name__ == "__main__":
    main()
