"""Adapters inside a loaded policy: which parameters they have, and which of them are on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lit_dpo import compat

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

DEFAULT = "default"
"""PEFT's name of the adapter that trains."""

REFERENCE = "reference"
"""The name of a second adapter, a reference's."""


def adapter_parameters(model: PeftModel, adapter: str = DEFAULT) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of one of a policy's adapters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if is_adapters(name) and f".{adapter}." in f"{name}."}


def is_adapters(name: str) -> bool:
    """Whether a parameter, in a model or a file, is an adapter's: of its layers, or of its tokens' embeddings."""
    return "lora_" in name or "trainable_tokens_delta" in name


@contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """Run the base alone. Not `disable_adapter`: that turns `requires_grad` of all adapter weights off and on again."""
    layers = _tuner_layers(model)
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        compat.turn_adapters_off(layer, True)
    try:
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            compat.turn_adapters_off(layer, off)


@contextmanager
def active_adapter(model: PeftModel, name: str) -> Iterator[None]:
    """Run with another adapter. Not `set_adapter`: that flips `requires_grad` and would silently stop training."""
    layers = _tuner_layers(model)
    before = [layer.active_adapter for layer in layers]
    for layer in layers:
        compat.use_adapters(layer, [name] if _has(layer, name) else [])
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            compat.use_adapters(layer, active)


def copy_adapter(model: PeftModel) -> None:
    """Put a frozen copy of the adapter that trains next to it, as `REFERENCE`."""
    training = model.training
    config = copy.deepcopy(model.peft_config[DEFAULT])
    config.init_lora_weights = True  # its weights are copied below; some initialisations would change the base
    from lit_dpo.policy.sharding import as_if_whole

    with as_if_whole(model):
        model.add_adapter(REFERENCE, config)
    freeze_second_adapter(model, training)
    for mine, policys in adapter_pairs(model):
        mine.requires_grad_(False)
        mine.data = policys.detach().clone()


def adapter_pairs(model: PeftModel) -> list[tuple[Any, Any]]:
    """Parameters of the reference's adapter, each with the policy's."""
    mine, policys = (adapter_parameters(model, name).values() for name in (REFERENCE, DEFAULT))
    return list(zip(mine, policys, strict=True))


def freeze_second_adapter(model: PeftModel, training: bool) -> None:
    """Let a second adapter that was just added be evaluated, never trained, while the layers around it train.

    Args:
        model: the policy.
        training: the mode that it was in; PEFT leaves all of it in eval mode.
    """
    from torch import nn

    model.train(training)
    for layer in _tuner_layers(model):
        if REFERENCE in getattr(layer, "lora_dropout", {}):
            layer.lora_dropout[REFERENCE] = nn.Identity()


def _tuner_layers(model: PeftModel) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper  # around trained tokens; it looks at flags of its own

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def _has(layer: Any, name: str) -> bool:
    """Of an adapter that it lacks, a layer takes no notice, but one of trained tokens looks for it."""
    tokens = getattr(getattr(layer, "token_adapter", layer), "trainable_tokens_delta", None)
    return tokens is None or name in tokens
