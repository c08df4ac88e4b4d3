"""The estimated peak of a training step compared with the measured one.

python benchmarks/memory.py            # a table over architectures, quantisation, vocabulary, batch and length
python benchmarks/memory.py --quick    # a few of its rows

On a CPU: every allocation and release that the allocator reports to the profiler during a step, on top of all tensors
that are there before it. On a GPU: `torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import math
import tempfile
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from lit_dpo import DPOModule, LoRAPolicy
from lit_dpo.data.batch import CompletionBatch, EncodedPrompt, collate
from lit_dpo.memory import Lengths, estimate_step

SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 2048}
LLAMA = {**SIZES, "intermediate_size": 688, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", LLAMA),
    "Qwen2": ("Qwen2Config", LLAMA),
    "GPT-2": ("GPT2Config", {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 2048}),
    "OPT": ("OPTConfig", {**SIZES, "ffn_dim": 1024, "word_embed_proj_dim": 256}),
}
VOCABULARIES = (2_000, 32_000, 128_000)
ROWS = (math.inf, 512)  # most tokens of a row
BATCHES = ((2, 64), (8, 256), (4, 900))  # pairs, tokens of a side of the longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    print("model  bits  again   vocab pairs tokens   row measured estimate    off   (MiB; again: checkpointing)")
    worst = 0.0
    for name, vocabulary in itertools.product(MODELS, VOCABULARIES):
        if vocabulary != 32_000 and (quick or name != "Llama"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder), name, vocabulary)
            for quantization, checkpointing in itertools.product(("nf4", "none"), (False, True)):
                module = load(folder, quantization, checkpointing)
                for (pairs, tokens), limit in itertools.product(BATCHES[2:3] if quick else BATCHES, ROWS):
                    batch = random_batch(pairs, tokens, vocabulary).to(module.device)
                    rows = batch.cut(limit)
                    if len(rows) == 1 and limit < math.inf:
                        continue
                    candidates = [lengths(row) for row in rows]
                    estimate = estimate_step(module.model, candidates, several=len(rows) > 1).total
                    measured = peak(module, rows)
                    off = estimate / measured - 1
                    worst = max(worst, abs(off))
                    print(
                        f"{name:6} {quantization:5} {'yes' if checkpointing else 'no':5} {vocabulary:7} {pairs:5} "
                        f"{lengths(batch).tokens:6} {limit:5} {measured / 2**20:8.1f} {estimate / 2**20:8.1f} "
                        f"{off:+6.1%}",
                        flush=True,
                    )
    print(f"furthest off: {worst:.1%}")


def save(folder: Path, name: str, vocabulary: int) -> None:
    kind, sizes = MODELS[name]
    config = getattr(transformers, kind)(vocab_size=vocabulary, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def load(folder: str, quantization: Any, checkpointing: bool) -> Any:
    module = DPOModule(LoRAPolicy(folder, quantization=quantization, gradient_checkpointing=checkpointing))
    module.configure_model()
    return module.to("cuda" if torch.cuda.is_available() else "cpu")


def random_batch(pairs: int, longest: int, vocabulary: int) -> CompletionBatch:
    random = np.random.default_rng(0)

    def tokens(low: int, high: int) -> list[int]:
        return list(map(int, random.integers(0, vocabulary, random.integers(low, high))))

    half = longest // 2
    return collate(
        [EncodedPrompt(tokens(1, half), [tokens(1, half + 1), tokens(1, half + 1)]) for _ in range(pairs - 1)]
        + [EncodedPrompt(tokens(half, half + 1), [tokens(half, half + 1), tokens(half, half + 1)])]
    )


def lengths(batch: CompletionBatch) -> Lengths:
    counts = (batch.prompt_lengths, batch.completions_per_prompt, batch.completion_lengths)
    return Lengths(*(one.numpy() for one in counts))


def peak(
    module: Any,
    rows: list[CompletionBatch],
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> int:
    """Bytes, in the second step, when the optimizer has its state, and with the gradients of an accumulation.

    Args:
        module: on the device.
        rows: a batch, or its parts, there too.
        context: what the forward pass runs in, such as autocast.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)

    def step() -> None:
        with context():
            if len(rows) == 1:
                total = module.compute_loss(module.pair_logps(rows[0])).sum()
            else:
                total = module.accumulate(rows)[0]
        total.backward()

    step()
    optimizer.step()
    if module.device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        step()
        found = torch.cuda.max_memory_allocated()
    else:
        found = there_now() + allocated(step)
    module.zero_grad()
    return found


def there_now() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def allocated(run: Any) -> int:
    """Most bytes that a function had allocated at any time on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(max(np.cumsum(changes)))


if __name__ == "__main__":
    main()
