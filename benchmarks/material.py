"""What both sides of a comparison are given: pairs, a tokenizer, a random model, one order of batches."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Shapes of well-known models, with random weights: nothing is downloaded.
SHAPES: dict[str, dict[str, Any]] = {
    "5M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8},
    "30M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
KEY_HEADS = {"5M": 4, "30M": 4, "1B": 8, "8B": 8}
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
    dtype: str = "float32"
    quantization: str = "none"
    vocabulary: int = 8192
    checkpointing: bool = False
    best: bool = False
    threads: int = 1


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
    prompt, chosen, rejected = row.get("prompt", row.get("request")), row["chosen"], row["rejected"]
    if prompt is None:  # transcripts that share their beginning
        prompt, header, chosen = chosen.rpartition("\n\nAssistant:")
        prompt, rejected = prompt + header, rejected.rpartition(header)[2]
    return {
        "prompt": [_message("user", prompt)],
        "chosen": [_message("assistant", chosen)],
        "rejected": [_message("assistant", rejected)],
    }


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def made_pairs(count: int, prompt: int, answer: int, vocabulary: int, seed: int = 0) -> list[list[list[int]]]:
    """Random token ids of given mean lengths; single lengths vary by a quarter."""
    import numpy as np

    random = np.random.default_rng(seed)

    def part(length: int) -> list[int]:
        spread = max(1, round(length * random.uniform(0.75, 1.25)))
        return random.integers(3, vocabulary, spread).tolist()

    return [[part(prompt), part(answer), part(answer)] for _ in range(count)]


def made_conversations(lengths: str, count: int) -> list[dict[str, Any]]:
    """Made pairs as words of letters, each of which becomes a token of a tokenizer trained on them.

    Args:
        lengths: mean tokens of prompt and answer, such as `600,300`.
        count: how many.
    """
    prompt, answer = (int(length) for length in lengths.split(","))
    sides, roles = ("prompt", "chosen", "rejected"), ("user", "assistant", "assistant")
    letters = str.maketrans("0123456789", "abcdefghij")
    return [
        {
            side: [_message(role, " ".join(f"{token:05}".translate(letters) for token in part))]
            for side, role, part in zip(sides, roles, pair, strict=True)
        }
        for pair in made_pairs(count, prompt, answer, 5000)
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


def save_model(at: Path | str, shape: str, vocabulary: int, dtype: str, positions: int) -> int:
    """A Llama of that shape with random weights; its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape],
        num_key_value_heads=KEY_HEADS[shape],
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=shape != "8B",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(at)
    return model.num_parameters()


def step_arithmetic(shape: str, vocabulary: int, pairs: list[list[list[int]]]) -> float:
    """Floating point operations of a DPO step over these pairs without waste, where the base is frozen.

    Every token of the flat row passes every layer three times (the reference's forward, the policy's forward, the
    gradient of its activations), every completion token passes the head three times, and attention's backward pass
    costs twice its forward pass. Adapters, norms and activation checkpoints are left out.
    """
    sizes, heads = SHAPES[shape], KEY_HEADS[shape]
    hidden, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    keys = hidden // sizes["num_attention_heads"] * heads
    weights = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * sizes["intermediate_size"])
    lengths = [tuple(map(len, pair)) for pair in pairs]
    tokens = sum(p + c + r for p, c, r in lengths)
    scored = sum(c + r for _, c, r in lengths)
    seen = sum((p + c) * (p + c + 1) / 2 + r * p + r * (r + 1) / 2 for p, c, r in lengths)
    return 6.0 * weights * tokens + 6.0 * hidden * vocabulary * scored + (4 + 4 + 8) * hidden * layers * seen


def matrix_peak(device: str, dtype: str) -> float:
    """Floating point operations a second of a large square matrix product, the best of ten."""
    import time

    import torch

    size = 8192 if device == "cuda" else 1024
    one, two = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        one @ two
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2.0 * size**3 / best
