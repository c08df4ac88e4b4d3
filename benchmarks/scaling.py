"""What a training step costs as one thing grows and the rest stays: pairs, lengths, vocabulary, model, rows, epochs.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --axes vocabulary pairs --plot scaling.png
    python benchmarks/scaling.py --device cuda --shape 1B --quantization nf4

A step is the reference's forward, the policy's forward and backward, and the optimizer, on made pairs of random tokens.
The steps of an axis are taken in turn, so that all its points see the same noise. Printed are medians, CPU seconds on a
CPU and wall seconds on a GPU, and the straight line through them, `fixed + slope · x`, with how far points are off it.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lit_dpo import DPOModule, LoRAPolicy
from lit_dpo.data.batch import EncodedPrompt, collate
from material import SHAPES, made_pairs, save_model


class Point(NamedTuple):
    """One setting of a step."""

    pairs: int = 4
    prompt: int = 128
    completion: int = 128
    vocabulary: int = 8192
    shape: str = "5M"
    epochs: int = 1
    microbatch_tokens: int | None = None


def axes(base: Point) -> dict[str, list[tuple[float, Point]]]:
    """For each axis the values of x and the settings."""
    total = base.prompt + 2 * base.completion
    shapes = [name for name in SHAPES if name in ("5M", "30M")]
    return {
        "pairs per batch": [(n, base._replace(pairs=n)) for n in (1, 2, 4, 8, 16)],
        "completion tokens": [(2 * n * base.pairs, base._replace(completion=n)) for n in (32, 64, 128, 256, 512)],
        "prompt tokens": [(n * base.pairs, base._replace(prompt=n)) for n in (32, 64, 128, 256, 512)],
        "prompt share": [
            (share, base._replace(prompt=round(total * share), completion=round(total * (1 - share) / 2)))
            for share in (0.03, 0.38, 0.56, 0.87)
        ],
        "vocabulary": [(n, base._replace(vocabulary=n)) for n in (8192, 32768, 65536, 131072, 262144)],
        "model parameters": [(parameters(name), base._replace(shape=name)) for name in shapes],
        "tokens of a row": [(n, base._replace(pairs=16, microbatch_tokens=n)) for n in (256, 512, 1024, 2048, 8192)],
        "epochs": [(n, base._replace(epochs=n)) for n in (1, 2, 3)],
    }


def parameters(shape: str) -> float:
    """In the layers of a shape, millions; without embeddings."""
    sizes = SHAPES[shape]
    hidden, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    return float(layers * hidden * (3 * hidden + 3 * sizes["intermediate_size"]) / 1e6)


class Bench:
    """Steps at a point; models are made once per shape and vocabulary."""

    def __init__(self, device: str, quantization: Any) -> None:
        self.device, self.quantization = device, quantization
        self.clock = time.process_time if device == "cpu" else time.perf_counter
        self.module = functools.lru_cache(maxsize=None if device == "cpu" else 1)(self._module)

    def _module(self, shape: str, vocabulary: int) -> tuple[DPOModule, torch.optim.Optimizer]:
        with tempfile.TemporaryDirectory() as folder:
            dtype = "float32" if self.device == "cpu" else "bfloat16"
            save_model(folder, shape, vocabulary, dtype, 4096, self.device)
            targets = ["q_proj", "v_proj"]
            module = DPOModule(LoRAPolicy(folder, quantization=self.quantization, target_modules=targets))
            module.model = module.policy.load(self.device)
            module.to(self.device)  # which the length of a row depends on
        from lit_dpo.logps.choice import choose_layout

        choose_layout(module.model)
        adapters = [p for p in module.model.parameters() if p.requires_grad]
        return module, torch.optim.AdamW(adapters, lr=1e-4)

    def seconds(self, point: Point, seed: int) -> float:
        """Of one step, or of so many passes over its batch."""
        module, optimizer = self.module(point.shape, point.vocabulary)
        made = made_pairs(point.pairs, point.prompt, point.completion, point.vocabulary, seed)
        batch = collate([EncodedPrompt(pair[0], list(pair[1:])) for pair in made]).to(self.device)
        module.microbatch_tokens = point.microbatch_tokens
        rows = batch.cut(module.microbatch_limit)
        begun = self._now()
        for _ in range(point.epochs):
            if len(rows) == 1:
                module.compute_loss(module.pair_logps(batch)).sum().backward()
            else:
                module.accumulate(rows)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        return self._now() - begun

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.clock()


def line(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Fixed cost, slope, and the largest relative distance of a point from the line."""
    xs, ys = zip(*points, strict=True)
    slope, fixed = statistics.linear_regression(xs, ys)
    return fixed, slope, max(abs(fixed + slope * x - y) / y for x, y in points)


def measure(step: Callable[[Point, int], float], settings: list[Any], repeats: int) -> list[tuple[float, float]]:
    """`(x, median seconds)`; the first round warms up."""
    taken: list[list[float]] = [[] for _ in settings]
    for repeat in range(repeats + 1):
        for times, (_, point) in zip(taken, settings, strict=True):
            times.append(step(point, repeat))
    return [(x, statistics.median(times[1:])) for times, (x, _) in zip(taken, settings, strict=True)]


def plot(results: dict[str, list[tuple[float, float]]], file: str) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(3 * len(results), 3), squeeze=False)
    for panel, (name, points) in zip(panels[0], results.items(), strict=True):
        panel.plot(*zip(*points, strict=True), marker="o")
        panel.set(xlabel=name, ylabel="seconds", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", help="beginnings of names; by default all")
    parser.add_argument("--shape", choices=SHAPES, default="5M")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", help="an image file; needs matplotlib")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    bench, results = Bench(given.device, given.quantization), {}
    for name, settings in axes(Point(shape=given.shape)).items():
        if given.axes and not any(name.startswith(wanted) for wanted in given.axes):
            continue
        results[name] = measure(bench.seconds, settings, given.repeats)
        fixed, slope, off = line(results[name])
        print(f"{name}: {fixed:.3f} s + {slope:.3g} s · x, points off by up to {off:.0%}", flush=True)
        for x, seconds in results[name]:
            print(f"  {x:>10g} {seconds:8.3f} s")
    if given.plot:
        plot(results, given.plot)


if __name__ == "__main__":
    main()
