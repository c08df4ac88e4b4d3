"""Adapters inside a loaded policy: which parameters they have, and which of them are on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DEFAULT = "default"
"""PEFT's name of the adapter that trains."""

REFERENCE = "reference"
"""The name of a second adapter, a reference's."""


def adapter_parameters(model: Any, adapter: str = DEFAULT) -> dict[str, torch.nn.Parameter]:
    """The parameters of one of a policy's adapters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name and f".{adapter}." in f"{name}."}


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Run the base alone. Not `disable_adapter`: that turns `requires_grad` of all adapter weights off and on again."""
    layers = _tuner_layers(model)
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off


@contextmanager
def active_adapter(model: Any, name: str) -> Iterator[None]:
    """Run with another adapter. Not `set_adapter`: that flips `requires_grad` and would silently stop training."""
    layers = _tuner_layers(model)
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def freeze_second_adapter(model: Any, training: bool) -> None:
    """A second adapter that was just added is evaluated, never trained, while the layers around it train.

    Args:
        model: the policy.
        training: the mode that it was in; PEFT leaves all of it in eval mode.
    """
    import torch

    model.train(training)
    for layer in _tuner_layers(model):
        if REFERENCE in getattr(layer, "lora_dropout", {}):
            layer.lora_dropout[REFERENCE] = torch.nn.Identity()


def _tuner_layers(model: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
