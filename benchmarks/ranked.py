"""Many completions of one prompt: as lists, as pairs written out, and by TRL on these pairs.

    pip install -e ".[bench]"
    python benchmarks/ranked.py                     # K = 2, 3, 4, 7; prompts of 20, 50, 80 % of a pair
    python benchmarks/ranked.py --counts 4 --shares 0.5 --sides lit_dpo-lists lit_dpo

Every side makes the same optimizer steps, one of each in turn, each in a process of its own: all comparisons of some
prompts of K completions. Losses and gradients of the lists and of the pairs are compared before anything is timed, and
the losses of all sides at each step. A pair has `--tokens` tokens on average; single lengths vary by a quarter.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from compare import check, run
from material import Spec, place_model, train_tokenizer
from sides import listed, missing, same_start

PROMPTS = {2: 12, 3: 4, 4: 2, 7: 1}
"""Of a step, so that it has 12 comparisons, or 21."""

AT_ONCE = 3
"""Pairs that TRL runs at once; with more it takes longer for each, and more memory."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.5, 0.8], help="the prompt's, of a pair")
    parser.add_argument("--tokens", type=int, default=512, help="of a pair")
    parser.add_argument("--shape", default="5M")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument("--sides", nargs="+", default=["lit_dpo-lists", "lit_dpo", "trl-best"])
    parser.add_argument("--steps", type=int, default=3, help="measured steps")
    parser.add_argument("--warmup", type=int, default=1, help="steps that are dropped")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    given.device, given.batch_size = "cpu", 0
    for share, count in itertools.product(given.shares, given.counts):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
            measure(given, share, count, Path(folder))


def measure(given: argparse.Namespace, share: float, count: int, folder: Path) -> None:
    """Print what one comparison costs each side."""
    spec = prepared(given, share, count, folder)
    sides = [side for side in given.sides if not missing(side)]
    tokens = [sum(len(p) + sum(map(len, c)) for p, c in batch) for batch in spec.lists]
    pairs = [sum(map(len, pair)) for batch in spec.batches for pair in batch]
    print(
        f"\nK = {count}, prompts {share:.0%}: {PROMPTS[count]} prompts and {spec.batch_size} comparisons a step, "
        f"{sum(pairs) / len(pairs):.0f} tokens a pair; lists have {sum(tokens) / sum(pairs):.3f} of the pairs' tokens; "
        f"{given.shape}, {given.quantization}",
        flush=True,
    )
    print("losses and gradients of lists and pairs differ by {:.1e} and {:.1e}".format(*apart(spec)), flush=True)
    dropped: dict[str, str] = {}
    results, memory = run(sides, spec, given, dropped)
    results = {side: reports[given.warmup :] for side, reports in results.items()}
    if dropped or (differs := check(results, 1e-3)["differs"]):
        raise SystemExit(dropped or differs)
    first, *others = results
    for side, reports in results.items():
        each = statistics.median(report["cpu"] for report in reports) / spec.batch_size
        peak = memory[side]["peak"] - memory[side]["start"]
        print(f"{side:14} {1000 * each:9.1f} CPU ms a comparison, {peak / 2**20:7.0f} MiB while training", flush=True)
    for side in others:
        ratios = [b["cpu"] / a["cpu"] for a, b in zip(results[first], results[side], strict=True)]
        middle = statistics.median(ratios)
        print(f"{side} / {first}: {middle:.2f} (from {min(ratios):.2f} to {max(ratios):.2f}); inverse {1 / middle:.3f}")


def prepared(given: argparse.Namespace, share: float, count: int, folder: Path) -> Spec:
    """A model, and batches of random token ids."""
    import numpy as np

    random, model = np.random.default_rng(0), folder / "model"

    def part(mean: float) -> list[int]:
        length = max(1, round(mean * random.uniform(0.75, 1.25)))
        return list(map(int, random.integers(3, given.vocabulary, length)))

    prompt, completion = share * given.tokens, (1 - share) * given.tokens / 2
    lists = [
        [(part(prompt), [part(completion) for _ in range(count)]) for _ in range(PROMPTS[count])]
        for _ in range(given.warmup + given.steps + 1)
    ]
    batches = [
        [[p, one, other] for p, completions in batch for one, other in itertools.combinations(completions, 2)]
        for batch in lists
    ]
    text = [{side: [{"content": "some text"}] for side in ("prompt", "chosen", "rejected")}]
    train_tokenizer(text, model)
    place_model(model, None, given.shape, given.vocabulary, "float32", 4096, "cpu")
    return Spec(
        str(model),
        "",
        batches=batches,
        lists=lists,
        batch_size=len(batches[0]),
        max_length=4096,
        quantization=given.quantization,
        vocabulary=given.vocabulary,
        at_once=AT_ONCE,
    )


def apart(spec: Spec) -> tuple[float, float]:
    """How far losses, and gradients compared with the largest of their tensor, are apart."""
    from lit_dpo import DPOModule, LoRAPolicy

    policy = LoRAPolicy(
        spec.model, quantization=spec.quantization, r=spec.r, alpha=spec.r, target_modules=list(spec.targets)
    )
    module = DPOModule(policy)
    module.configure_model()
    same_start(module.model)
    trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():  # else nothing reaches A
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    found: list[tuple[Any, dict[str, Any]]] = []
    for as_lists in (True, False):
        batch = next(iter(listed(spec, as_lists)))
        total, losses, _ = module.accumulate(batch.cut(module.microbatch_limit))
        total.backward()
        found.append((losses.detach(), {name: parameter.grad for name, parameter in trained.items()}))
        module.zero_grad()
    (losses, gradients), (others, theirs) = found
    return float((losses - others).abs().max()), max(
        float((gradients[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in trained
    )


if __name__ == "__main__":
    main()
