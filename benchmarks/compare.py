"""lit_dpo beside TRL's `DPOTrainer`: the same model, LoRA, pairs, order, batch and β, step by step in turn.

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
from pathlib import Path
from typing import Any

from material import (
    SHAPES,
    Spec,
    made_conversations,
    matrix_peak,
    read_pairs,
    save_model,
    step_arithmetic,
    train_tokenizer,
)
from sides import flat_pairs, ready, start

GIB = 2.0**30


def arguments() -> argparse.Namespace:
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
    return parser.parse_args()


def main() -> None:
    given = arguments()
    os.environ.update(OMP_NUM_THREADS=str(given.threads), TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        spec = prepare(given, Path(folder))
        results, memory = run(given.sides, spec, given.warmup + given.steps)
    results = {side: reports[given.warmup :] for side, reports in results.items()}
    tolerance = given.tolerance or (1e-3 if spec.dtype == "float32" else 5e-2)
    check(results, tolerance)
    show(results, memory, given)
    use(results, spec, given)


def prepare(given: argparse.Namespace, folder: Path) -> Spec:
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
    parameters = save_model(model, given.shape, vocabulary, dtype, max(2048, given.max_length))
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
    describe(spec, given, parameters, vocabulary)
    return spec


def describe(spec: Spec, given: argparse.Namespace, parameters: int, vocabulary: int) -> None:
    used = [pair for batch in spec.batches for pair in batch]
    prompt, total = sum(len(p) for p, _, _ in used), sum(len(p) + len(c) + len(r) for p, c, r in used)
    print(
        f"{given.data.name if given.data else given.made}: {total / len(used):.0f} tokens a pair, prompt "
        f"{prompt / total:.0%}, {spec.order}; {given.shape} Llama, {parameters / 1e6:.1f}M parameters, vocabulary "
        f"{vocabulary}, {spec.dtype}, quantization {spec.quantization}, LoRA r={spec.r} on {', '.join(spec.targets)}; "
        f"batch {spec.batch_size}, max_length {spec.max_length}; {spec.device}, threads {spec.threads}; {given.steps} "
        f"steps after {given.warmup}"
    )


def batches(spec: Spec, steps: int) -> list[list[list[list[int]]]]:
    """The first batches of lit_dpo's sampler, as token ids; only whole batches."""
    from lit_dpo import PreferenceDataModule
    from lit_dpo.data.sampler import PairSampler

    data = ready(PreferenceDataModule, spec)
    data.setup("fit")
    table = data._table("train")
    bucket = 50 if spec.order == "bucketed" else 0
    sampler, found, epoch = PairSampler(table.lengths, spec.batch_size, bucket=bucket), [], 0
    while len(found) < steps:
        sampler.set_epoch(epoch)
        found += [flat_pairs(table.batch(rows)) for rows in sampler]
        epoch += 1
    return found[:steps]


def run(sides: list[str], spec: Spec, steps: int) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Train all sides, one step of each in turn; their reports of each step, and their memory."""
    context = multiprocessing.get_context("spawn")
    pipes, results, memory = {}, {side: [] for side in sides}, {}
    for side in sides:
        pipes[side], theirs = context.Pipe()
        context.Process(target=start, args=(side, spec, steps + 1, theirs), daemon=True).start()
        theirs.close()
        pipes[side].recv()  # loaded and waiting: the next one may load
    for step in range(steps):
        for side in sides if step % 2 == 0 else sides[::-1]:
            pipes[side].send(True)
            answer = pipes[side].recv()
            results[side].append(answer["report"])
            memory[side] = answer["memory"]
    for pipe in pipes.values():
        pipe.send(False)
    return results, memory


def check(results: dict[str, list[Any]], tolerance: float) -> None:
    """Stop unless all sides had the same token ids and computed the same losses."""
    first, *others = results
    for other in others:
        for step, (one, two) in enumerate(zip(results[first], results[other], strict=True)):
            if one["pairs"] != two["pairs"]:
                sys.exit(f"step {step}: {first} and {other} were given different token ids")
        furthest = max(abs(a["loss"] - b["loss"]) for a, b in zip(results[first], results[other], strict=True))
        print(f"losses of {first} and {other} differ by at most {furthest:.1e} (same token ids)")
        if not furthest <= tolerance:
            sys.exit(f"that is more than {tolerance}: no speed is compared")


def show(results: dict[str, list[Any]], memory: dict[str, Any], given: argparse.Namespace) -> None:
    """A line per side: medians, and ratios to the first side, step by step."""
    clock = "cpu" if given.device == "cpu" else "wall"
    size, first = given.batch_size, given.sides[0]
    print(f"{'':20} pairs/{clock}-s   cpu s/step  wall s/step  tokens/pair  peak GiB  of it training")
    for side, reports in results.items():
        middle = {name: statistics.median(report[name] for report in reports) for name in ("cpu", "wall")}
        total = sum(report[clock] for report in reports)
        tokens = sum(report["tokens"] for report in reports) / len(reports) / size
        peak, begun = memory[side]["peak"] / GIB, memory[side]["start"] / GIB
        speed = f"{side:20} {len(reports) * size / total:11.2f} {middle['cpu']:12.3f} {middle['wall']:12.3f}"
        print(f"{speed} {tokens:12.0f} {peak:9.2f} {peak - begun:15.2f}")
    for side, reports in list(results.items())[1:]:
        ratios = sorted(b[clock] / a[clock] for a, b in zip(results[first], reports, strict=True))
        total = sum(b[clock] for b in reports) / sum(a[clock] for a in results[first])
        print(
            f"{side} / {first}: {clock} time, median of steps {statistics.median(ratios):.2f} "
            f"(from {ratios[0]:.2f} to {ratios[-1]:.2f}), of sums {total:.2f}; "
            f"peak memory {memory[side]['peak'] / memory[first]['peak']:.2f}"
        )


def use(results: dict[str, list[Any]], spec: Spec, given: argparse.Namespace) -> None:
    """Model FLOP utilisation: the arithmetic that the steps need, over their time, beside a matrix product."""
    import torch

    torch.set_num_threads(given.threads)
    peak = matrix_peak(spec.device, spec.dtype)
    needed = sum(step_arithmetic(given.shape, spec.vocabulary, pairs) for pairs in spec.batches[given.warmup :])
    clock = "cpu" if spec.device == "cpu" else "wall"
    print(f"a matrix product reaches {peak / 1e12:.3g} TFLOP/s in {spec.dtype}; of it use, counting what a step needs:")
    for side, reports in results.items():
        rate = needed / sum(report[clock] for report in reports)
        print(f"{side:20} {rate / 1e12:8.3g} TFLOP/s, {rate / peak:.0%}")


if __name__ == "__main__":
    main()
