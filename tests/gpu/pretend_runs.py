"""Runs on the pretend accelerator; prints what each waited for, as JSON: `python pretend_runs.py FOLDER [NAME]`."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from pretend import DEVICE, LOG, OnDevice, PretendStrategy
from torch.utils._pytree import tree_map

import tiny
import training
from lit_dpo import (
    AdapterReference,
    CachedReference,
    DPOModule,
    EMAReference,
    LoRAPolicy,
    ModelReference,
)
from lit_dpo.data.formats import Rankings, Triples
from lit_dpo.logps.attention import has_pair_attention
from lit_dpo.losses import AOTLoss, BetaDPOLoss, MixtureLoss, ODPOLoss, PlackettLuceLoss, SoftDPOLoss, TDPOLoss, WPOLoss
from lit_dpo.policy.base_model import BaseModel
from losses.test_contract import LOSSES, SETTINGS, _random


def _load_and_move(of: type, name: str) -> None:
    """Transformers' own loading is not what is looked at."""
    load = getattr(of, name)

    def moved(self: Any, device: torch.device, *dtype: Any) -> Any:
        assert device == DEVICE
        return load(self, torch.device("cpu"), *dtype).to(DEVICE)

    setattr(of, name, moved)


class _Scaled(MixedPrecision):
    """Its scaler alone: autocast casts nothing on this device."""

    def autocast_context_manager(self) -> Any:
        return nullcontext()


class _EndOfSteps(pl.Callback):
    """What an epoch's end does is no step's."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert {one.device for one in (*pl_module.parameters(), *pl_module.buffers())} == {DEVICE}
        # an error of a device in the probe would only choose padded rows
        assert has_pair_attention(pl_module.model.get_base_model()) == (pl_module.policy.attention == "auto")

    def on_validation_epoch_end(self, *_: Any) -> None:
        LOG.begin("end")

    def on_test_epoch_end(self, *_: Any) -> None:
        LOG.begin("end")

    def on_train_epoch_end(self, *_: Any) -> None:
        LOG.begin("end")


def fit(folder: Path, stages: tuple[str, ...] = (), **given: Any) -> None:
    """A run of four batches, and validation."""
    strategy = PretendStrategy()
    names = {"logger", "enable_progress_bar", "log_every_n_steps", "accumulate_grad_batches", "gradient_clip_val"}
    options = {name: given.pop(name) for name in (names | {"plugins", "max_epochs", "estimate"}) & given.keys()}
    policy = {"quantization": "none", **given.pop("policy", {})}
    rows, name = given.pop("rows", {}), given.pop("file", "pairs.jsonl")
    torch.manual_seed(0)
    sizes = {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 2}
    trainer = training.trainer(
        folder / "run", **{"accelerator": "auto", "num_sanity_val_steps": 0, "inference_mode": False,
        "limit_test_batches": 2, "limit_predict_batches": 2, **sizes, **options},
        strategy=strategy, devices=1, callbacks=[_EndOfSteps()],
    )  # fmt: skip
    strategy.trainer = trainer
    made = {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3), "lr_scheduler": "linear", **given}
    module = DPOModule(LoRAPolicy(str(folder / "model"), **policy), **made)
    file = str(folder / name)
    data = training.data(file, val=file, test=file, predict=file, **rows)
    trainer.fit(module, data)
    for stage in stages:
        getattr(trainer, stage)(module, data)


def score(loss: Any) -> None:
    """A loss by itself, on the record of a batch: values, gradients, rewards, parts, memory, metrics."""

    def moved(given: Any) -> Any:
        return tree_map(lambda one: one.to(DEVICE) if isinstance(one, torch.Tensor) else one, given)

    pairs = _random()
    lists, columns = pairs.lists, moved(pairs.columns)  # counts and places stay on the CPU
    lists = lists._replace(policy=moved(lists.policy), reference=moved(lists.reference))
    measured = pl.LightningModule()  # holds them, so that they move as the module's do
    measured.metrics = DPOModule(LoRAPolicy("any"), loss).train_metrics
    measured.to(DEVICE)
    if (state := loss.initial_state()) is not None:
        state = state.to(DEVICE)
    LOG.begin("steps")
    for _ in range(2):
        policy = lists.policy._replace(
            total=lists.policy.total.clone().requires_grad_(), per_token=lists.policy.per_token.clone().requires_grad_()
        )
        seen = lists._replace(policy=policy).pairs(columns, state)
        if state is not None:
            state = loss.next_state(state, loss.sums(seen.detach()))
            seen = seen._replace(state=state)
        losses = loss(seen)
        losses.sum().backward()
        assert losses.device == DEVICE
        chosen, rejected = loss.rewards(seen.detach())
        parts = loss.parts(seen.detach())
        measured.metrics.update(
            pairs=seen.detach(), losses=losses, parts=parts, chosen_rewards=chosen, rejected_rewards=rejected
        )
        assert {one.device for one in measured.metrics.compute().values()} == {DEVICE}


def cases(folder: Path) -> dict[str, Callable[[], None]]:
    """By name."""
    adapter, model = folder / "adapter", folder / "model"
    mixed = MixtureLoss(losses=(TDPOLoss(), WPOLoss(ODPOLoss()), SoftDPOLoss()))
    columns = {"weight": "weight", "score_margin": "score", "probability": "share"}
    found: dict[str, dict[str, Any]] = {
        "all shown": {
            "log_every_n_steps": 1,
            "logger": TensorBoardLogger(folder / "logs"),
            "enable_progress_bar": True,
            "gradient_clip_val": 1.0,
            "estimate": True,
            "stages": ("validate", "test", "predict"),
        },
        "rows": {"microbatch_tokens": 60, "policy": {"dropout": 0.1}},
        "accumulated": {"accumulate_grad_batches": 2, "microbatch_tokens": 60},
        "checkpointing": {"policy": {"gradient_checkpointing": True, "target_modules": ["q_proj", "lm_head"]}},
        "padded": {"policy": {"attention": "eager"}},
        "padded sdpa": {"policy": {"attention": "sdpa"}},
        "adapter": {"reference": AdapterReference(), "policy": {"adapter_path": str(adapter)}},
        "other model": {"reference": ModelReference(str(model), quantization="none"), "loss": AOTLoss()},
        "moving": {"reference": EMAReference(every=1), "loss": BetaDPOLoss()},
        "stored": {"max_epochs": 2, "reference": CachedReference(directory=str(folder / "cache"))},
        "all columns": {"loss": mixed, "rows": {"format": Triples(**columns)}},
        "rankings": {"loss": PlackettLuceLoss(), "rows": {"format": Rankings()}, "file": "ranked.jsonl"},
        "rankings in parts": {"rows": {"format": Rankings()}, "file": "ranked.jsonl", "microbatch_tokens": 10},
        "scaled": {"plugins": [_Scaled("16-mixed", DEVICE.type)], "microbatch_tokens": 60},
    }
    made = {name: lambda given=given: fit(folder, **given) for name, given in found.items()}
    for kind in LOSSES:
        for settings in [{}, *SETTINGS.get(kind, [])]:
            made[f"loss {kind(**settings)}"] = lambda kind=kind, settings=settings: score(kind(**settings))
    return made


def main(folder: Path, only: str = "") -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for of, name in ((LoRAPolicy, "load"), (BaseModel, "load_frozen")):
        _load_and_move(of, name)
    tiny.lora(tiny.model(max_position_embeddings=256, num_hidden_layers=1)).save_pretrained(folder / "adapter")
    found: dict[str, Any] = {}
    for name, run in cases(folder).items():
        if only not in name:
            continue
        LOG.parts.clear()
        LOG.begin("start")
        begun = time.monotonic()
        try:
            with OnDevice():
                run()
            found[name] = {"parts": dict(LOG.parts)}
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:1000], "trace": traceback.format_exc()[-6000:]}
        print(f"{time.monotonic() - begun:.1f} s  {name}", file=sys.stderr)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
