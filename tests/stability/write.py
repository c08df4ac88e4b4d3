"""Writes what is kept of this version: a model, data, a run with its files, a cache, and the numbers they gave.

    python tests/stability/write.py

Once for each release that changes a format, into a folder of its own: later versions must read what is there, so that a
folder is never written again after its release.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from contextlib import chdir
from importlib.metadata import requires
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent)]

from walk import CHECKPOINT, KEPT, command, into, released  # noqa: E402 - the environment comes first


def model(folder: Path) -> None:
    """A random Llama of 10,000 parameters, with a token for each byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # so that log-probs differ from token to token
    made.save_pretrained(folder)
    fast.save_pretrained(folder)


def pairs(path: Path) -> None:
    """Of different lengths, an odd number of them."""
    rows = [
        {
            "prompt": f"How many are {number}?",
            "chosen": " Exactly " + "one, " * (number % 4) + f"{number}.",
            "rejected": " No" + " idea" * (number % 3) + "!",
        }
        for number in range(21)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config() -> dict[str, Any]:
    """A loss with a memory, a reference with a cache, every file that a callback writes."""
    callbacks = "lit_dpo.callbacks."
    return {
        "seed_everything": 1,
        "model": {
            "policy": {
                "class_path": "lit_dpo.LoRAPolicy",
                "init_args": {"model": "model", "quantization": "none", "r": 2},
            },
            "loss": {"class_path": "lit_dpo.losses.BCOLoss"},
            "reference": {"class_path": "lit_dpo.CachedReference", "init_args": {"directory": "reference-cache"}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.0}},
        },
        "data": {"train": "pairs.jsonl", "val": "pairs.jsonl", "batch_size": 4},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "precision": "32-true",
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "limit_val_batches": 2,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": f"{callbacks}TrainingDynamics"},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {
                        "every_n_train_steps": 6,
                        "save_top_k": -1,
                        "filename": "step{step}",
                        "auto_insert_metric_name": False,
                    },
                },
            ],
        },
    }


def without_this_machine(path: Path) -> None:
    """Leave out of a sheet what is of the machine that it was written on, and keep its form."""
    sheet = json.loads(path.read_text(encoding="utf-8"))
    named = {re.split(r"[^\w-]", one)[0].lower() for one in requires("lit_dpo") or () if "extra ==" not in one}
    for start in sheet["starts"]:
        start["hardware"] |= {"system": "Linux", "processor": "x86_64"}
        start["packages"] = {name: one for name, one in start["packages"].items() if name.lower() in named}
    path.write_text(json.dumps(sheet, indent=1) + "\n", encoding="utf-8")


def write(folder: Path) -> None:
    """All of it."""
    import torch
    import yaml

    folder.mkdir(parents=True)
    with chdir(folder):
        model(Path("model"))
        pairs(Path("pairs.jsonl"))
        Path("start.yaml").write_text(yaml.safe_dump(config()), encoding="utf-8")
        command(["fit", "--config", "start.yaml", *into("run")])
        command(["predict", "--config", "run/config.yaml", "--ckpt_path", CHECKPOINT, *into("predicted")])
        for path in Path("predicted").iterdir():
            if path.name != "predictions.jsonl":
                path.unlink()
        for name in ("run/last", "run/checkpoints/step12"):
            shutil.rmtree(name)
        for name in ("start.yaml", "run/hparams.yaml", "run/last.ckpt", "run/checkpoints/step12.ckpt"):
            Path(name).unlink()
        without_this_machine(Path("run/environment.json"))
        for path in (*Path().rglob("adapter_config.json"), *Path().rglob("README.md")):
            path.write_text(path.read_text(encoding="utf-8").replace(f"{folder}/", ""), encoding="utf-8")
    print({str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()})
    print(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()), "bytes;", torch.__version__)


if __name__ == "__main__":
    if released():
        raise SystemExit(f"{KEPT} is of a release: it stays as it is. Name another folder in walk.py for a new format.")
    with tempfile.TemporaryDirectory() as made:
        write(Path(made) / KEPT.name)
        shutil.rmtree(KEPT, ignore_errors=True)
        shutil.copytree(Path(made) / KEPT.name, KEPT)
    shutil.copyfile(HERE / "public_api.txt", KEPT / "public_api.txt")
