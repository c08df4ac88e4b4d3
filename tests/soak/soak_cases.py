"""What is started, and what happens to it: configurations of commands, and faults drawn by a seed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import yaml

LAST_EVERY = 2
"""Optimizer steps from one `last.ckpt` to the next."""

TRAINER: dict[str, Any] = {
    "max_epochs": 2,
    "accelerator": "cpu",
    "val_check_interval": 3,
    "limit_val_batches": 2,
    "log_every_n_steps": 2,
    "enable_progress_bar": False,
}
_KEPT = {"every_n_train_steps": 3, "save_top_k": 2, "monitor": "step", "mode": "max"}


class Config(NamedTuple):
    """A configuration of `fit`."""

    model: dict[str, Any]
    data: dict[str, Any] = {}  # noqa: RUF012 - a default of a record, never changed
    trainer: dict[str, Any] = {}  # noqa: RUF012
    ranks: int = 1
    board: bool = True
    """Rows go to TensorBoard too; its file is open all the time, so that its disk cannot become read-only."""


def _policy(quantization: str = "none", **more: Any) -> dict[str, Any]:
    return {"policy": {"quantization": quantization, "r": 4, "dropout": 0.1, **more}}


def _of(name: str, **given: Any) -> dict[str, Any]:
    return {"class_path": f"lit_dpo.{name}", "init_args": given}


def configurations(model: Path, reference: Path, adapter: Path) -> dict[str, Config]:
    """Of `fit`, by what is special about each.

    Args:
        model: the policy's base.
        reference: another model with its vocabulary.
        adapter: a trained one.
    """
    cached = {"reference": _of("CachedReference", directory="cache")}
    ema = {"reference": _of("EMAReference", alpha=0.5, every=1)}
    bco = {"loss": _of("losses.BCOLoss")}
    other = {"reference": _of("ModelReference", model=str(reference))}
    stream = {"streaming": True, "shuffle_buffer": 10}
    flat = {"lr_scheduler": "constant"}  # nobody knows how long a stream is
    ranked = {"format": {"class_path": "lit_dpo.data.formats.Rankings"}, "batch_size": 2}
    of_two = {"batch_size": 2}
    return {
        "nf4": Config(_policy("nf4"), trainer={"accumulate_grad_batches": 2}),
        "none, 2 workers": Config(_policy(), {"num_workers": 2}),
        "adapter reference": Config({**_policy(adapter_path=str(adapter)), "reference": _of("AdapterReference")}),
        "model reference, nf4": Config({**_policy("nf4"), **other}),
        "cached": Config({**_policy(), **cached}, board=False),
        "cached, nf4, 2 workers": Config({**_policy("nf4"), **cached}, {"num_workers": 2}),
        "ema, bco": Config({**_policy(), **ema, **bco}),
        "bco, accumulated": Config({**_policy(), **bco}, trainer={"accumulate_grad_batches": 4}, board=False),
        "streaming, ema": Config({**_policy(), **ema, **flat}, {**stream, "num_workers": 0}),
        "streaming, bco, 2 workers": Config({**_policy(), **bco, **flat}, {**stream, "num_workers": 2}, board=False),
        "rankings": Config({**_policy(), "loss": _of("losses.PlackettLuceLoss", beta=0.5)}, ranked),
        "rankings, nf4": Config({**_policy("nf4"), "loss": _of("losses.LiPOLoss", beta=0.5)}, ranked, board=False),
        "no reference": Config({**_policy(), "loss": _of("losses.ORPOLoss"), "reference": _of("NoReference")}),
        "2 ranks, nf4": Config(_policy("nf4"), of_two, ranks=2),
        "2 ranks, ema, bco": Config({**_policy(), **ema, **bco}, of_two, ranks=2),
        "2 ranks, cached, 2 workers": Config({**_policy(), **cached}, {**of_two, "num_workers": 2}, ranks=2),
    }


def settings(config: Config, model: Path, pairs: Path) -> dict[str, Any]:
    """What `--config` gives `fit`."""
    made = {key: value for key, value in config.model.items() if key != "policy"}
    boards = [{"class_path": "lit_dpo.callbacks.tensorboard.RunLogger"}] if config.board else []
    loggers = [*boards, {"class_path": "lightning.pytorch.loggers.CSVLogger"}]
    for one in loggers:
        kept = {"flush_logs_every_n_steps": 1} if "CSV" in one["class_path"] else {"default_hp_metric": False}
        one["init_args"] = {"save_dir": "runs", "name": "", **kept}  # type: ignore[assignment]
    return {
        "model": {
            "policy": {"model": str(model), **config.model["policy"]},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
            **made,
        },
        "data": {"init_args": {"train": str(pairs), "val": str(pairs), "batch_size": 4, **config.data}},
        "trainer": {
            **TRAINER,
            **({"strategy": "ddp", "devices": config.ranks} if config.ranks > 1 else {}),
            **config.trainer,
            "logger": loggers,
            "callbacks": [
                {"class_path": "soak_faults.Steps"},
                {"class_path": "training.Unestimated"},
                {"class_path": "lit_dpo.callbacks.LastCheckpoint", "init_args": {"every_n_steps": LAST_EVERY}},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": _KEPT},
            ],
        },
    }


def write_settings(given: dict[str, Any], file: Path) -> Path:
    """As YAML."""
    file.write_text(yaml.safe_dump(given))
    return file


class Fault(NamedTuple):
    """One of a case."""

    name: str
    by: str
    """What the moment is a share of, in the straight run: `writes`, `seconds` of a processor, `files`."""
    share: float
    whom: str
    """`one` process, or `all` that the command has started; of two ranks, the one or both."""


class Case(NamedTuple):
    """A command, and what happens to it, and to what goes on from there."""

    number: int
    command: str
    config: str
    faults: tuple[Fault, ...]


def drawn(seed: int, number: int, names: list[str], boards: set[str], ranks: set[str]) -> Case:
    """Draw a case.

    Args:
        seed: of all cases.
        number: of this one.
        names: of the configurations of `fit`.
        boards: those whose disk cannot become read-only.
        ranks: those of several ranks.
    """
    random_ = random.Random(f"{seed} {number}")
    command = random_.choices(("fit", "ablate", "inspect", "export"), (78, 6, 8, 8))[0]
    config = random_.choice(names) if command == "fit" else command
    faults = []
    for _ in range(random_.choices((1, 2, 3), (2, 2, 1))[0]):
        weights = (5, 2, 2, 2, 0 if config in boards or command == "ablate" else 2)
        name = random_.choices(("SIGKILL", "SIGTERM", "SIGINT", "full", "read-only"), weights)[0]
        by = random_.choices(("writes", "seconds"), (2, 1))[0]
        if command == "ablate":
            by = random_.choice(("files", "seconds"))
        whom = random_.choice(("one", "all"))
        if config in ranks and name not in ("SIGKILL", "full"):
            whom = "all"  # as who starts ranks does
        faults.append(Fault(name, by, random_.random(), whom))
    return Case(number, command, config, tuple(faults))


def made_model(folder: Path, seed: int = 0) -> Path:
    """A random Llama with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(vocabulary), num_key_value_heads=2, max_position_embeddings=512,
                         bos_token_id=0, eos_token_id=1, **sizes)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def made_pairs(file: Path) -> Path:
    """21 pairs: every last batch has a tail."""
    rows = [
        {
            "prompt": f"How many are {number}?",
            "chosen": " Exactly " + "one, " * (number % 4) + f"{number}.",
            "rejected": " No" + " idea" * (number % 3) + "!",
        }
        for number in range(21)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def made_rankings(file: Path) -> Path:
    """11 prompts with two to four completions."""
    texts = [" yes", " no", " maybe so", " who knows"]
    rows = [
        {"prompt": f"question {n}", "completions": texts[: 2 + n % 3], "scores": [3.0, 1.0, 2.5, 0.0][: 2 + n % 3]}
        for n in range(11)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
