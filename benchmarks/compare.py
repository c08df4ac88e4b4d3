"""lit_dpo compared with TRL's `DPOTrainer`: the same model, LoRA, pairs, order, batch and β, step by step in turn.

    pip install -e ".[bench]"
    python benchmarks/compare.py --data pairs.json
    python benchmarks/compare.py --device cuda --shape 1B --quantization nf4 --max-length 2048 --made 600,300

Each side trains with its own trainer in its own process; before every step it waits until the other sides have done
theirs, so that all see the same noise. `trl` has its defaults (activation checkpoints), `trl-best` what makes it
fastest (none; on a GPU flash attention and Liger's kernels too, where they are installed). Losses are compared before
any speed is printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from material import (
    SHAPES,
    Spec,
    made_conversations,
    matrix_peak,
    place_model,
    read_pairs,
    step_arithmetic,
    train_tokenizer,
)
from sides import extras, flat_pairs, missing, ready, start

GIB = 2.0**30


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="pairs: .json, .jsonl or .jsonl.gz")
    parser.add_argument("--made", help="instead of --data: mean tokens of prompt and answer, such as 600,300")
    parser.add_argument(
        "--tokenizer", type=Path, help="a folder; by default a BPE of 8192 tokens of the data's own text"
    )
    parser.add_argument("--shape", choices=SHAPES, default="5M")
    parser.add_argument(
        "--vocabulary", type=int, help="rows of the head; by default the tokenizer's, 128256 for 1B, 8B"
    )
    parser.add_argument("--sides", nargs="+", default=["lit_dpo", "trl", "trl-best"])
    parser.add_argument("--order", choices=["shuffled", "bucketed"], default="shuffled", help="lit_dpo's own: bucketed")
    parser.add_argument("--steps", type=int, default=12, help="measured steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are dropped")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpoints on every side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tolerance", type=float, help="of the losses; by default 1e-3, in 16 bits 5e-2")
    parser.add_argument("--store", type=Path, help="a folder where made weights stay, for the next comparison")
    return parser.parse_args(given)


def main() -> None:
    found = compare(arguments())
    if found["differs"]:
        sys.exit(found["differs"])


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Train all sides; print and return what was measured, or why no speed is compared (`differs`)."""
    os.environ.update(OMP_NUM_THREADS=str(given.threads), TOKENIZERS_PARALLELISM="false")
    dropped = {side: why for side in given.sides if (why := missing(side))}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        spec, about = prepare(given, Path(folder))
        results, memory = run([side for side in given.sides if side not in dropped], spec, given, dropped)
    for side, why in dropped.items():
        print(f"{side} is left out: {why}")
    results = {side: reports[given.warmup :] for side, reports in results.items()}
    tolerance = given.tolerance or (1e-3 if spec.dtype == "float32" else 5e-2)
    found = {"about": about, "dropped": dropped, "extras": {side: extras(side, spec.device) for side in results}}
    found |= dict[str, Any](differs=None, steps=steps_of(results), memory=memory) | {"losses differ by": {}}
    if given.sides[0] in dropped:
        return found | {"differs": f"{given.sides[0]} failed: {dropped[given.sides[0]]}"}
    found |= check(results, tolerance)
    if not found["differs"]:
        found |= show(results, memory, given)
        use(results, spec, given, found)
    return found


def steps_of(results: dict[str, list[Any]]) -> dict[str, Any]:
    """What each step took and computed, without its token ids."""
    names = ("wall", "cpu", "loss", "tokens")
    return {side: {name: [report[name] for report in reports] for name in names} for side, reports in results.items()}


def prepare(given: argparse.Namespace, folder: Path) -> tuple[Spec, str]:
    """Model, tokenizer and pairs in a folder; the batches in the order in which every side sees them."""
    model, train = folder / "model", folder / "pairs.jsonl"
    wanted = given.batch_size * (given.warmup + given.steps + 1)
    pairs = read_pairs(given.data) if given.data else made_conversations(given.made, wanted)
    train.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    if given.tokenizer:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(given.tokenizer).save_pretrained(model)
    else:
        train_tokenizer(pairs, model)
    from transformers import AutoTokenizer

    least = 128256 if given.shape in ("1B", "8B") else 8192
    vocabulary = given.vocabulary or max(len(AutoTokenizer.from_pretrained(model)), least)
    dtype = "float32" if given.device == "cpu" else "bfloat16"
    sizes = (given.shape, vocabulary, dtype, max(2048, given.max_length), given.device)
    parameters = place_model(model, given.store, *sizes)
    spec = Spec(
        str(model),
        str(train),
        order=given.order,
        batch_size=given.batch_size,
        max_length=given.max_length,
        device=given.device,
        dtype=dtype,
        quantization=given.quantization,
        vocabulary=vocabulary,
        checkpointing=given.checkpointing,
        threads=given.threads,
    )
    spec.batches = batches(spec, given.warmup + given.steps)
    about = describe(spec, given, parameters, vocabulary)
    print(about, flush=True)
    return spec, about


def describe(spec: Spec, given: argparse.Namespace, parameters: int, vocabulary: int) -> str:
    used = [pair for batch in spec.batches for pair in batch]
    prompt, total = sum(len(p) for p, _, _ in used), sum(len(p) + len(c) + len(r) for p, c, r in used)
    return (
        f"{given.data.name if given.data else given.made}: {total / len(used):.0f} tokens a pair, prompt "
        f"{prompt / total:.0%}, {spec.order}; {given.shape} Llama, {parameters / 1e6:.1f}M parameters, vocabulary "
        f"{vocabulary}, {spec.dtype}, quantization {spec.quantization}, LoRA r={spec.r} on {', '.join(spec.targets)}; "
        f"batch {spec.batch_size}, max_length {spec.max_length}; {spec.device}, threads {spec.threads}; {given.steps} "
        f"steps after {given.warmup}"
    )


def batches(spec: Spec, steps: int) -> list[list[list[list[int]]]]:
    """The first batches of lit_dpo's sampler, as token ids; only whole batches."""
    from lit_dpo import PreferenceDataModule
    from lit_dpo.data.sampler import PromptSampler

    data = ready(PreferenceDataModule, spec)
    data.setup("fit")
    table = data.train_dataloader().dataset.table
    bucket = 50 if spec.order == "bucketed" else 0
    sampler, epoch = PromptSampler(table.lengths, spec.batch_size, bucket=bucket), 0
    found: list[list[list[list[int]]]] = []
    while len(found) < steps:
        sampler.set_epoch(epoch)
        found += [flat_pairs(table.batch(rows)) for rows in sampler]
        epoch += 1
    return found[:steps]


def run(
    sides: list[str], spec: Spec, given: argparse.Namespace, dropped: dict[str, str]
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Train all sides, one step of each in turn; their reports of each step, and their memory.

    They load at the same time, and measure when all have loaded. One that fails goes to `dropped`, with its error.
    """
    context, steps = multiprocessing.get_context("spawn"), given.warmup + given.steps
    pipes, processes, memory = {}, [], dict[str, Any]()
    results: dict[str, list[Any]] = {side: [] for side in sides}
    for side in sides:
        pipes[side], theirs = context.Pipe()
        processes.append(context.Process(target=start, args=(side, spec, steps + 1, theirs), daemon=True))
        processes[-1].start()
        theirs.close()

    def answer(side: str, go: bool) -> dict[str, Any] | None:
        try:
            if go:
                pipes[side].send(True)
            said: dict[str, Any] = pipes[side].recv()
        except (EOFError, OSError):
            said = {"error": "its process ended"}
        if "error" not in said:
            return said
        dropped[side] = said["error"]
        del pipes[side], results[side]
        return None

    for side in sides:
        answer(side, go=False)
    for step in range(steps):
        for side in sides if step % 2 == 0 else sides[::-1]:
            if side in pipes and (said := answer(side, go=True)):
                results[side].append(said["report"])
                memory[side] = said["memory"]
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:  # what is measured next must not meet them
        process.join(60)
    return results, memory


def check(results: dict[str, list[Any]], tolerance: float) -> dict[str, Any]:
    """All sides had the same token ids and computed the same losses, or why there is nothing to compare."""
    first, *others = results
    furthest = {}
    for other in others:
        for step, (one, two) in enumerate(zip(results[first], results[other], strict=True)):
            if one["pairs"] != two["pairs"]:
                return {"differs": f"step {step}: {first} and {other} were given different token ids"}
        furthest[other] = max(abs(a["loss"] - b["loss"]) for a, b in zip(results[first], results[other], strict=True))
        print(f"losses of {first} and {other} differ by at most {furthest[other]:.1e} (same token ids)")
    apart = [f"{first} and {other} by {far:.1e}" for other, far in furthest.items() if not far <= tolerance]
    why = f"losses of {', '.join(apart)} differ by more than {tolerance}: no speed is compared" if apart else None
    return {"losses differ by": furthest, "differs": why}


def show(results: dict[str, list[Any]], memory: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """A line per side: medians, and ratios to the first side, step by step."""
    clock, first = "cpu" if given.device == "cpu" else "wall", given.sides[0]
    sides, ratios = {}, {}
    print(f"{'':20} pairs/{clock}-s   cpu s/step  wall s/step  tokens/pair  peak GiB  of it training")
    for side, reports in results.items():
        middle = {f"{name} s/step": statistics.median(report[name] for report in reports) for name in ("cpu", "wall")}
        total = sum(report[clock] for report in reports)
        sides[side] = {
            "pairs/s": len(reports) * given.batch_size / total,
            **middle,
            "tokens/pair": sum(report["tokens"] for report in reports) / len(reports) / given.batch_size,
            "peak GiB": memory[side]["peak"] / GIB,
            "of it training": (memory[side]["peak"] - memory[side]["start"]) / GIB,
            "loading GiB": memory[side].get("loading", 0) / GIB,
        }
        speed, cpu, wall, tokens, peak, training, _ = sides[side].values()
        print(f"{side:20} {speed:11.2f} {cpu:12.3f} {wall:12.3f} {tokens:12.0f} {peak:9.2f} {training:15.2f}")
    for side, reports in list(results.items())[1:]:
        steps = sorted(b[clock] / a[clock] for a, b in zip(results[first], reports, strict=True))
        ratios[side] = {
            "time": statistics.median(steps),
            "time, least": steps[0],
            "time, most": steps[-1],
            "time, of sums": sum(b[clock] for b in reports) / sum(a[clock] for a in results[first]),
            "peak memory": memory[side]["peak"] / memory[first]["peak"],
        }
        middle, least, most, total, peak = ratios[side].values()
        print(
            f"{side} / {first}: {clock} time, median of steps {middle:.2f} (from {least:.2f} to {most:.2f}), "
            f"of sums {total:.2f}; peak memory {peak:.2f}"
        )
    return {"sides": sides, f"over {first}": ratios}


def use(results: dict[str, list[Any]], spec: Spec, given: argparse.Namespace, found: dict[str, Any]) -> None:
    """Model FLOP utilisation: the arithmetic that the steps need, over their time, compared with a matrix product."""
    import torch

    torch.set_num_threads(given.threads)
    peak = matrix_peak(spec.device, spec.dtype)
    needed = sum(step_arithmetic(given.shape, spec.vocabulary, pairs) for pairs in spec.batches[given.warmup :])
    clock = "cpu" if spec.device == "cpu" else "wall"
    found |= {"matrix product FLOP/s": peak, "needed FLOP/step": needed / given.steps}
    print(f"a matrix product reaches {peak / 1e12:.3g} TFLOP/s in {spec.dtype}; of it use, counting what a step needs:")
    for side, reports in results.items():
        rate = needed / sum(report[clock] for report in reports)
        found["sides"][side] |= {"FLOP/s": rate, "of a matrix product": rate / peak}
        print(f"{side:20} {rate / 1e12:8.3g} TFLOP/s, {rate / peak:.0%}")


if __name__ == "__main__":
    main()
