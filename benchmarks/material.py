"""What both sides of a comparison are given: pairs, a tokenizer, a random model, one order of batches."""

from __future__ import annotations

import gzip
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

# Shapes of well-known models, with random weights: nothing is downloaded.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "5M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8},
    "30M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
KEY_HEADS = {"tiny": 2, "5M": 4, "30M": 4, "1B": 8, "8B": 8}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Spec:
    """One comparison. Everything in it is handed to every side."""

    model: str
    train: str
    batches: list[list[list[list[int]]]] = field(default_factory=list)
    order: str = "shuffled"
    batch_size: int = 4
    max_length: int = 1024
    beta: float = 0.1
    lr: float = 1e-4
    r: int = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    device: str = "cpu"
    dtype: Any = "float32"
    quantization: Any = "none"
    vocabulary: int = 8192
    checkpointing: bool = False
    best: bool = False
    threads: int = 1
    lists: list[list[tuple[list[int], list[list[int]]]]] = field(default_factory=list)
    """Instead of `train`: batches of prompts with their completions, of which all are compared."""
    at_once: int | None = None
    """Pairs that TRL runs at once, its gradients adding up; by default the batch."""


def read_pairs(file: Path) -> list[dict[str, Any]]:
    """Pairs as conversations, from the layouts that preference files come in."""
    text = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode()
    rows = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line]
    pairs = map(_pair, rows)
    return [pair for pair in pairs if all(pair[side][0]["content"].strip() for side in ("chosen", "rejected"))]


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    if "conversations" in row:  # ShareGPT
        roles = {"human": "user", "gpt": "assistant"}
        prompt = [_message(roles.get(turn["from"], turn["from"]), turn["value"]) for turn in row["conversations"]]
        return {"prompt": prompt} | {
            side: [_message("assistant", row[side]["value"])] for side in ("chosen", "rejected")
        }
    asked, chosen, rejected = row.get("prompt", row.get("request")), row["chosen"], row["rejected"]
    if asked is None:  # transcripts that share their beginning
        asked, header, chosen = chosen.rpartition("\n\nAssistant:")
        asked, rejected = asked + header, rejected.rpartition(header)[2]
    return {
        "prompt": [_message("user", asked)],
        "chosen": [_message("assistant", chosen)],
        "rejected": [_message("assistant", rejected)],
    }


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def made_pairs(count: int, prompt: int, completion: int, vocabulary: int, seed: int = 0) -> list[list[list[int]]]:
    """Random token ids of given mean lengths; single lengths vary by a quarter."""
    import numpy as np

    random = np.random.default_rng(seed)

    def part(length: int) -> list[int]:
        spread = max(1, round(length * random.uniform(0.75, 1.25)))
        return list(map(int, random.integers(3, vocabulary, spread)))

    return [[part(prompt), part(completion), part(completion)] for _ in range(count)]


def made_conversations(lengths: str, count: int) -> list[dict[str, Any]]:
    """Made pairs as words of letters, each of which becomes a token of a tokenizer trained on them.

    Args:
        lengths: mean tokens of prompt and completion, such as `600,300`.
        count: how many.
    """
    prompt, completion = (int(length) for length in lengths.split(","))
    sides, roles = ("prompt", "chosen", "rejected"), ("user", "assistant", "assistant")
    letters = str.maketrans("0123456789", "abcdefghij")
    return [
        {
            side: [_message(role, " ".join(f"{token:05}".translate(letters) for token in part))]
            for side, role, part in zip(sides, roles, pair, strict=True)
        }
        for pair in made_pairs(count, prompt, completion, 5000)
    ]


def train_tokenizer(pairs: list[dict[str, Any]], at: Path, size: int = 8192) -> None:
    """A byte-level BPE of the pairs' own text, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(pairs), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(at)


def _texts(pairs: list[dict[str, Any]]) -> Iterator[str]:
    for pair in pairs:
        for side in ("prompt", "chosen", "rejected"):
            yield from (message["content"] for message in pair[side])


def save_model(at: Path | str, shape: str, vocabulary: int, dtype: str, positions: int, device: str = "cpu") -> int:
    """A Llama of that shape with random weights; its number of parameters.

    Weights are made on the device, which takes no time on a GPU, and written one tensor after another.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPES[shape],
        num_key_value_heads=KEY_HEADS[shape],
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=shape != "8B",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    random = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, parameter in skeleton.named_parameters():  # one that is tied is named once
        weight = torch.ones(parameter.shape, dtype=getattr(torch, dtype), device=device)
        weights[name] = weight if weight.ndim == 1 else weight.normal_(std=0.02, generator=random)
    config.save_pretrained(at)
    save_file(weights, Path(at) / "model.safetensors", {"format": "pt"})
    parameters = sum(weight.numel() for weight in weights.values())
    del weights, weight
    if device == "cuda":  # room for the processes that train
        torch.cuda.empty_cache()
    return parameters


def place_model(at: Path, store: Path | None, *model: Any) -> int:
    """`save_model(at, *model)`; with a store, of links to what is made there once."""
    if store is None:
        return save_model(at, *model)
    made = store / "-".join(map(str, model))
    if not made.is_dir():
        unfinished = Path(tempfile.mkdtemp(dir=store))
        save_model(unfinished, *model)
        unfinished.rename(made)
    at.mkdir(exist_ok=True)
    for file in made.iterdir():
        (at / file.name).symlink_to(file)
    with safe_open(made / "model.safetensors", "pt") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


def step_arithmetic(shape: str, vocabulary: int, pairs: list[list[list[int]]]) -> float:
    """Floating point operations of a DPO step over these pairs without waste, where the base is frozen.

    Every token of the flat row passes every layer three times (the reference's forward, the policy's forward, the
    gradient of its activations), every completion token passes the head three times, and attention's backward pass
    costs twice its forward pass: `6 · weights · tokens + 6 · hidden · vocabulary · scored + 16 · hidden · layers ·
    seen`. Adapters, norms and activation checkpoints are left out.
    """
    sizes, heads = SHAPES[shape], KEY_HEADS[shape]
    hidden, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    keys = hidden // sizes["num_attention_heads"] * heads
    weights = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * sizes["intermediate_size"])
    lengths = [tuple(map(len, pair)) for pair in pairs]
    tokens = sum(p + c + r for p, c, r in lengths)
    scored = sum(c + r for _, c, r in lengths)
    seen: float = sum((p + c) * (p + c + 1) / 2 + r * p + r * (r + 1) / 2 for p, c, r in lengths)
    return float(6 * weights * tokens + 6 * hidden * vocabulary * scored + (4 + 4 + 8) * hidden * layers * seen)


def matrix_peak(device: str, dtype: str) -> float:
    """Floating point operations a second of a large square matrix product: the best of five times ten in a row."""
    import torch

    size, times = (8192, 10) if device == "cuda" else (1024, 2)
    one, two = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return times * 2.0 * size**3 / best_seconds(lambda: [one @ two for _ in range(times)], device)


def copy_rate(device: str) -> float:
    """Bytes a second that a copy within the device's memory moves, those read and those written."""
    import torch

    size, times = (2**32, 10) if device == "cuda" else (2**26, 2)
    one, two = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return times * 2.0 * size / best_seconds(lambda: [two.copy_(one) for _ in range(times)], device)


def best_seconds(run: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Least wall seconds of a function, after a call that warms up, until the device has done what it was told."""
    import torch

    best = float("inf")
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return best
