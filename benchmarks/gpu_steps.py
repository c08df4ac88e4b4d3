"""Single steps on this card: which settings are best, and their memory compared with its estimate.

A step is the reference's forward, the policy's forward and backward, and the optimizer, on made pairs of chat lengths.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

import lit_dpo.logps.head as head
import memory as program
from gpu_compare import store
from gpu_run import Run
from lit_dpo import DPOModule, LoRAPolicy
from lit_dpo.data.batch import CompletionBatch, EncodedPrompt, collate
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.microbatch import MICROBATCH_TOKENS
from lit_dpo.memory import estimate_step
from material import made_pairs, place_model

GIB = 2.0**30
REHEARSED = 1024  # tokens of a rehearsal's vocabulary


def memory(run: Run) -> str:
    """The estimate of a step's memory compared with the allocator's peak."""
    rows, worst = [], 0.0
    if run.rehearsed:
        run.note(measured="on a CPU: what its allocator tells the profiler")
    for quantization, checkpointing in (("none", False), ("nf4", False), ("nf4", True)):
        module = load(run, quantization, checkpointing)
        batch = batch_of(run, pairs=4 if run.rehearsed else 8)
        for limit in (float("inf"), batch.input_ids.numel() / 3):
            parts = batch.cut(limit)
            candidates = [program.lengths(part) for part in parts]
            context = usual(run)
            estimate = estimate_step(module.model, candidates, several=len(parts) > 1, context=context)
            measured = program.peak(module, parts, context)
            off = estimate.total / measured - 1
            worst = max(worst, off, key=abs)
            setting = f"{quantization}, {'with' if checkpointing else 'without'} checkpoints, {len(parts)} rows"
            rows.append({"setting": setting, "estimate": str(estimate), "measured GiB": measured / GIB, "off": off})
            run.note(steps=rows, line=f"furthest off {worst:+.1%} of {len(rows)} settings")
        del module
    return str(run.found["line"])


def sweeps(run: Run) -> str:
    """Settings one by one, compared with what is there now."""
    lines: list[str] = []
    for sweep in (rows_of_a_batch, rows_of_a_chunk, mixed_precision, kept_weights):
        lines.append(sweep(run))
        run.note(line="; ".join(lines))
    return "; ".join(lines)


def rows_of_a_batch(run: Run) -> str:
    """`microbatch_tokens`, on a batch that is longer than all of them."""
    sizes = (64, 1024) if run.rehearsed else (2048, 8192, 16384, 32768)
    module, batch, results = load(run), batch_of(run, pairs=6 if run.rehearsed else 40), {}
    for size in sizes:
        results[size] = measured(run, module, batch.cut(size))
        run.note(microbatch_tokens=results, row_tokens_of=f"a batch of {batch.input_ids.numel()} tokens")
    return f"microbatch_tokens {best(results, MICROBATCH_TOKENS[run.device])}"


def rows_of_a_chunk(run: Run) -> str:
    """Rows of hidden states that the head projects at once."""
    module, batch, results = load(run), batch_of(run, pairs=2 if run.rehearsed else 16), {}
    plain = head.chunk_rows(module.model.config.vocab_size, batch.input_ids.device)
    try:
        for size in sorted({plain, *((32,) if run.rehearsed else (128, 512, 1024, 2048, 4096))}):
            rows = size
            head.chunk_rows = lambda *_: rows  # noqa: B023 - called in this turn alone
            results[size] = measured(run, module, [batch])
            run.note(head_rows=results)
    finally:
        head.chunk_rows = PLAIN_CHUNK_ROWS
    return f"rows of the head {best(results, plain)}"


def mixed_precision(run: Run) -> str:
    """`bf16-mixed` compared with bf16 weights and activations without autocast."""
    module, batch, results = load(run), batch_of(run, pairs=2 if run.rehearsed else 16), {}
    mixed = functools.partial(torch.autocast, run.device, torch.bfloat16)
    for name, context in (("bf16-mixed", mixed), ("without autocast", contextlib.nullcontext)):
        results[name] = measured(run, module, [batch], context=context)
        run.note(precision=results)
    return ratio("autocast", results["bf16-mixed"], results["without autocast"], "none")


def kept_weights(run: Run) -> str:
    """4-bit weights dequantised in each pass, as they are, and once a step."""
    module, batch, results = load(run, "nf4"), batch_of(run, pairs=2 if run.rehearsed else 16), {}
    results["in each pass"] = measured(run, module, [batch])
    run.note(dequantised=results)
    with dequantised_once(module.model) as forget:
        results["once a step"] = measured(run, module, [batch], after=forget)
    run.note(dequantised=results)
    return ratio("weights dequantised once a step", results["once a step"], results["in each pass"], "in each pass")


@contextlib.contextmanager
def dequantised_once(model: Any) -> Iterator[Callable[[], None]]:
    """A prototype: what a pass has dequantised stays for the next one, until the function that is yielded is called."""
    layers = [layer for layer in model.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    kept: dict[Any, Tensor] = {}

    def forward(layer: Any, given: Tensor) -> Tensor:
        if layer not in kept:
            weight = layer.weight
            kept[layer] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(layer.compute_dtype)
        return torch.nn.functional.linear(given.to(layer.compute_dtype), kept[layer], layer.bias).to(given.dtype)

    try:
        for layer in layers:
            layer.forward = functools.partial(forward, layer)
        yield kept.clear
    finally:
        for layer in layers:
            del layer.forward


def load(run: Run, quantization: Any = "none", checkpointing: bool = False) -> DPOModule:
    """The default policy and loss on the 1B shape."""
    empty(run)
    size = ("tiny", REHEARSED, "float32", 2048) if run.rehearsed else ("1B", 128256, "bfloat16", 2048)
    folder = run.folder / "steps"
    if not folder.is_dir():
        place_model(folder, store(run), *size, run.device)
    policy = LoRAPolicy(str(folder), quantization=quantization, gradient_checkpointing=checkpointing)
    module = DPOModule(policy)
    device = torch.device("cpu") if run.rehearsed else torch.device("cuda", 0)
    module.model = policy.load(device)
    choose_layout(module.model)
    return module.to(device)


def batch_of(run: Run, pairs: int) -> CompletionBatch:
    prompt, completion = (20, 16) if run.rehearsed else (300, 250)
    made = made_pairs(pairs, prompt, completion, REHEARSED)
    return collate([EncodedPrompt(pair[0], list(pair[1:])) for pair in made]).to(run.device)


def usual(run: Run) -> Callable[[], AbstractContextManager[Any]]:
    """What the forward pass runs in where users train on this device: `bf16-mixed`, or on a CPU float32."""
    return contextlib.nullcontext if run.rehearsed else functools.partial(torch.autocast, run.device, torch.bfloat16)


def measured(
    run: Run,
    module: DPOModule,
    rows: list[CompletionBatch],
    context: Callable[[], AbstractContextManager[Any]] | None = None,
    after: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Median seconds of a step, its peak and its loss; or that there was no room."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.0)
    seconds, loss = [], float("nan")
    clock = time.process_time if run.rehearsed else time.perf_counter
    empty(run)
    try:
        for _ in range(2 if run.rehearsed else 4):  # the first warms up
            synchronise(run)
            begun = clock()
            with (context or usual(run))():
                total = step_loss(module, rows)
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            after()
            synchronise(run)
            seconds.append(clock() - begun)
            loss = float(total)
            del total
    except torch.OutOfMemoryError:
        module.zero_grad()
        after()
        return {"seconds": None, "GiB": None, "loss": None, "why": "out of memory"}
    peak = None if run.rehearsed else torch.cuda.max_memory_allocated() / GIB
    return {"seconds": statistics.median(seconds[1:]), "GiB": peak, "loss": loss / sum(row.size for row in rows)}


def step_loss(module: DPOModule, rows: list[CompletionBatch]) -> Tensor:
    if len(rows) == 1:
        return module.compute_loss(module.pair_logps(rows[0])).sum()
    return module.accumulate(rows)[0]


def synchronise(run: Run) -> None:
    if run.device == "cuda":
        torch.cuda.synchronize()


def empty(run: Run) -> None:
    """Of what came before."""
    gc.collect()
    if run.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def best(results: dict[int, dict[str, Any]], plain: int) -> str:
    """The fastest setting, compared with what is there now."""
    done = {size: one for size, one in results.items() if one["seconds"] is not None}
    if not done:
        raise RuntimeError("no setting had room")
    fastest = min(done, key=lambda size: done[size]["seconds"])
    one, now = done[fastest], done.get(plain)
    text = f"{fastest}: {one['seconds']:.3g} s" + (f", {one['GiB']:.1f} GiB" if one["GiB"] else "")
    if now is None:
        return text
    now_text = f"{now['seconds']:.3g} s" + (f", {now['GiB']:.1f} GiB" if now["GiB"] else "")
    return f"{text} (now {plain}: {now_text})"


def ratio(name: str, one: dict[str, Any], other: dict[str, Any], than: str) -> str:
    if one["seconds"] is None or other["seconds"] is None:
        return f"{name}: out of memory"
    room = f", {one['GiB'] / other['GiB']:.2f}× the memory" if one["GiB"] else ""
    return f"{name} {one['seconds'] / other['seconds']:.2f}× the time{room} of {than}"


PLAIN_CHUNK_ROWS = head.chunk_rows
