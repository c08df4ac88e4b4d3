"""What the tests of training share: a module, data and a quiet trainer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lit_dpo import DPOModule, LoRAPolicy, PreferenceDataModule
from lit_dpo.callbacks import MemoryEstimate

TARGETS = ["q_proj", "down_proj"]  # of a Llama, in attention and MLP


class Trace(Callback):
    """Writes down the rows, losses and parameters that training saw."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append(batch.indices.tolist())
        self.losses.append(float(outputs["loss"]))


class Unestimated(MemoryEstimate):
    """Stands in a trainer for the estimate of a step's memory, which costs as much as ten steps of a tiny model."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Nothing."""


def module(
    model: Path,
    lr: float = 1e-2,
    policy: dict[str, Any] | None = None,
    kind: type[DPOModule] = DPOModule,
    **kwargs: Any,
) -> DPOModule:
    torch.manual_seed(0)
    given = {"quantization": "none", "r": 4, **(policy or {})}
    # Adam divides by the gradient's size. Where all of a gradient is rounding (1e-10 among 1e-3), two orders of
    # summation would step apart by a part of `lr`; with this `eps`, a hundredth of most gradients, by next to nothing.
    optimizer = functools.partial(torch.optim.AdamW, lr=lr, weight_decay=0.0, eps=1e-5)
    return kind(LoRAPolicy(str(model), **given), **{"optimizer": optimizer, "lr_scheduler": "constant", **kwargs})


def light(model: Path, *given: Any, policy: dict[str, Any] | None = None, **kwargs: Any) -> DPOModule:
    """The same with adapters on two of a Llama's seven layers, for what does not depend on where they are."""
    return module(model, *given, policy={"target_modules": TARGETS, **(policy or {})}, **kwargs)


def data(train: Path | str | dict[str, float], **kwargs: Any) -> PreferenceDataModule:
    return PreferenceDataModule(train=train if isinstance(train, dict) else str(train), **{"batch_size": 4, **kwargs})


def trainer(root: Path, *, estimate: bool = False, callbacks: Sequence[Any] = (), **kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        callbacks=[*callbacks, *([] if estimate else [Unestimated()])],
        **{
            "default_root_dir": root,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "log_every_n_steps": 1,
            "max_epochs": 1,
            **kwargs,
        },
    )


def adapter(trained: DPOModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trained.model.named_parameters() if p.requires_grad}
