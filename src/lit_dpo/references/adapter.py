"""References that share the policy's base model: its adapters off, or another adapter on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from lit_dpo.adapter_checks import check_adapter_keys, check_base, check_lora
from lit_dpo.data.batch import PairBatch
from lit_dpo.errors import PolicyError
from lit_dpo.fingerprints import sampled_digest
from lit_dpo.hub import Place, locate_adapter
from lit_dpo.references.base import Reference

if TYPE_CHECKING:
    from lit_dpo.policy import QLoRAPolicy

NAME = "reference"
"""Of the second adapter."""


@dataclass(frozen=True)
class BaseReference(Reference):
    """The base model under the policy: the same weights with the adapters off. Costs no memory.

    Right for a fresh adapter. For a policy that continues a trained adapter the reference is that adapter:
    `AdapterReference`, the default there.
    """

    @contextmanager
    def active(self, model: Any) -> Iterator[Any]:
        """The policy with the adapters off."""
        with adapters_off(model):
            yield model

    def identity(self, policy: QLoRAPolicy) -> dict[str, Any]:
        """The base's content and quantisation."""
        return {"base": policy.content()}


@dataclass(frozen=True)
class AdapterReference(Reference):
    """A frozen copy of a trained adapter on the policy's base. Costs one adapter of memory.

    Args:
        path: a PEFT directory, or `organisation/name` or `organisation/name@revision` of the hub; by default
            `policy.adapter_path`, where the policy starts.

    Raises:
        PolicyError: on attaching, if there is neither.
    """

    path: str | None = None

    @property
    def starts_at_policy(self) -> bool:
        """A path of its own may name any adapter."""
        return self.path is None

    def check(self, policy: QLoRAPolicy) -> None:
        """There is an adapter."""
        place = self._place(policy)
        check_base(policy, check_lora(place), place)

    def attach(self, model: Any, policy: QLoRAPolicy) -> None:
        """Load the copy."""
        place = self._place(policy)
        check_base(policy, check_lora(place), place)
        training = model.training
        try:
            model.load_adapter(place.folder, adapter_name=NAME, is_trainable=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise PolicyError(f"No adapter for the reference at {place}: {error}") from error
        check_adapter_keys(model, place.folder, NAME)
        freeze_second_adapter(model, training)

    @contextmanager
    def active(self, model: Any) -> Iterator[Any]:
        """The policy with the copy in its adapter's place."""
        with active_adapter(model, NAME):
            yield model

    def content(self, policy: QLoRAPolicy) -> dict[str, Any]:
        """Of the adapter."""
        return {"adapter": sampled_digest(self._place(policy).folder)}

    def identity(self, policy: QLoRAPolicy) -> dict[str, Any]:
        """The base's content and quantisation, and the adapter's content."""
        return {"base": policy.content(), "adapter": policy.adapter_content(str(self._place(policy).folder))}

    def _place(self, policy: QLoRAPolicy) -> Place:
        if self.path is not None:
            return self._own_place
        if policy.adapter_path is not None:
            return policy.adapter_place
        raise PolicyError(
            "Expected `reference.path` or `policy.adapter_path` with AdapterReference but got neither. A policy "
            "with a fresh adapter is compared with its base: BaseReference."
        )

    @cached_property
    def _own_place(self) -> Place:
        """Resolved once, so that a hub id stays at one commit."""
        return locate_adapter(str(self.path), "reference.path")


@dataclass(frozen=True)
class NoReference(Reference):
    """No reference at all, for losses that declare `needs_reference = False`: one forward pass less."""

    @property
    def gives(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def active(self, model: Any) -> NoReturn:
        """There is no model."""
        raise PolicyError("NoReference has no model to run.")

    def logps(self, model: Any, batch: PairBatch) -> tuple[None, None]:
        """Nothing."""
        return None, None


def default_reference(policy: QLoRAPolicy) -> Reference:
    """Where the policy starts: its base, or, if it continues an adapter, a frozen copy of that."""
    return AdapterReference() if policy.adapter_path else BaseReference()


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
    model.train(training)
    for layer in _tuner_layers(model):
        if NAME in getattr(layer, "lora_dropout", {}):
            layer.lora_dropout[NAME] = torch.nn.Identity()


def _tuner_layers(model: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
