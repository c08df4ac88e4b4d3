"""Real sizes on a CPU: seconds a step, and the peak memory of the whole process.

    OMP_NUM_THREADS=1 python benchmarks/sizes.py
    OMP_NUM_THREADS=1 python benchmarks/sizes.py --only opt-350m

`lit-dpo fit` runs in a process of its own, on a model directory of the shape with random weights: OPT-350m through
`configs/opt-350m.yaml`, a 1B Llama shape in NF4. Of an 8B shape there is a configuration alone, and `--plan` says what
it would need.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from material import KEY_HEADS, SHAPES, made_conversations, save_model, train_tokenizer

ROOT = Path(__file__).parents[1]
GIB = 2.0**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["opt-350m", "1B", "8B"])
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of opt-350m")
    given = parser.parse_args()
    for name, run in (("opt-350m", opt_350m), ("1B", one_billion), ("8B", eight_billion)):
        if given.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                run(Path(folder), given.steps)


def opt_350m(folder: Path, steps: int) -> None:
    """The tutorial: two pairs a batch, two batches a step, at most 256 tokens a side."""
    model, pairs = folder / "model", _pairs(folder, "25,25", 4 * steps)
    _apart(_save_opt, model)
    _fit(
        "OPT-350m, configs/opt-350m.yaml",
        folder,
        *("--config", str(ROOT / "configs" / "opt-350m.yaml"), "--model.policy.model", str(model)),
        *("--data.train", str(pairs), "--trainer.max_epochs", "1"),
    )


def _save_opt(model: Path) -> None:
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=50272,
        hidden_size=1024,
        num_hidden_layers=24,
        ffn_dim=4096,
        num_attention_heads=16,
        max_position_embeddings=2048,
        word_embed_proj_dim=512,
        do_layer_norm_before=False,
        dtype="float16",
    )
    torch.manual_seed(0)
    OPTForCausalLM(config).half().save_pretrained(model)


def one_billion(folder: Path, steps: int) -> None:
    """Two steps of two pairs."""
    model, pairs = folder / "model", _pairs(folder, "100,100", 4)
    _apart(save_model, model, "1B", 128256, "bfloat16", 2048)
    _fit(
        "1B Llama shape, NF4, all linear layers",
        folder,
        *("--model.policy.model", str(model), "--data.train", str(pairs), "--data.batch_size", "2"),
        *("--trainer.max_steps", "2"),
    )


def eight_billion(folder: Path, steps: int) -> None:
    """From its configuration."""
    model, pairs = folder / "model", _pairs(folder, "600,300", 2000)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        **SHAPES["8B"],
        "num_key_value_heads": KEY_HEADS["8B"],
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (model / "config.json").write_text(json.dumps(config))
    for card in ("RTX-4090", "H100"):
        _fit(
            f"8B Llama shape, --plan {card}",
            folder,
            *("--model.policy.model", str(model), "--data.train", str(pairs), "--data.max_length", "2048"),
            *("--data.batch_size", "16", "--trainer.max_epochs", "1", "--plan", card),
        )


def _apart(make: Callable[..., Any], *arguments: Any) -> None:
    """In a process of its own: the system counts the peak of a process from that of the one that starts it."""
    process = multiprocessing.get_context("spawn").Process(target=make, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"the model was not made: status {process.exitcode}")


def _pairs(folder: Path, made: str, count: int) -> Path:
    pairs = made_conversations(made, count)
    train_tokenizer(pairs, folder / "model")
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def _fit(what: str, folder: Path, *arguments: str) -> None:
    """Run the command; print its time, and the peak that the system counted for the process."""
    command = [sys.executable, "-m", "lit_dpo", "fit", *arguments]
    output = folder / "output"
    begun = time.perf_counter()
    with output.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        _, status, used = os.wait4(process.pid, 0)
    text = output.read_text()
    if status:
        sys.exit(f"{what} failed:\n{text[-3000:]}")
    print(f"{what}: peak {used.ru_maxrss * 1024 / GIB:.2f} GiB, {time.perf_counter() - begun:.0f} s in all")
    for pattern in (r"^a step needs about .*", r"^\d+ steps in .*", r"^(?:data|model|a step|fits|time) {2}.*"):
        for line in re.findall(pattern, text, re.MULTILINE):
            print(f"  {line}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
