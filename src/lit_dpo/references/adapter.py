"""References that share the policy's base model: its adapters off, or another adapter on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from lit_dpo.data.batch import CompletionBatch
from lit_dpo.errors import PolicyError
from lit_dpo.hub import Place, locate_adapter
from lit_dpo.logps.fields import Field
from lit_dpo.policy.adapter_checks import check_adapter_keys, check_base, check_lora
from lit_dpo.policy.adapters import REFERENCE, active_adapter, adapters_off, copy_adapter, freeze_second_adapter
from lit_dpo.policy.digests import sampled_digest
from lit_dpo.policy.sharding import as_if_whole, mesh_of
from lit_dpo.references.base import Reference

if TYPE_CHECKING:
    from peft import PeftModel

    from lit_dpo.policy import LoRAPolicy


@dataclass(frozen=True)
class BaseReference(Reference):
    """The base model under the policy: the same weights with the adapters off. Costs no memory.

    Right for a fresh adapter. For a policy that continues a trained adapter the reference is that adapter:
    `AdapterReference`, the default there.
    """

    @contextmanager
    def activated(self, model: PeftModel) -> Iterator[Any]:
        """Run the policy with the adapters off."""
        with adapters_off(model):
            yield model

    def cache_identity(self, policy: LoRAPolicy) -> dict[str, Any]:
        """Say the base's content and quantisation."""
        return {"base": policy.cache_identity()}


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

    def check(self, policy: LoRAPolicy) -> None:
        """There is an adapter."""
        if not self._copies(policy):
            self._checked(policy)

    def attach(self, model: PeftModel, policy: LoRAPolicy) -> None:
        """Load the copy, or make it of a model that came with its adapter."""
        if self._copies(policy):
            copy_adapter(model)
            return
        place = self._checked(policy)
        training = model.training
        try:
            if mesh_of(model) is not None:  # shapes first, and then the numbers
                with as_if_whole(model):
                    model.add_adapter(REFERENCE, check_lora(place))
            model.load_adapter(place.folder, adapter_name=REFERENCE, is_trainable=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise PolicyError(f"No adapter for the reference at {place}: {error}") from error
        check_adapter_keys(model, place.folder, REFERENCE)
        freeze_second_adapter(model, training)

    @contextmanager
    def activated(self, model: PeftModel) -> Iterator[Any]:
        """Run the policy with the copy in its adapter's place."""
        with active_adapter(model, REFERENCE):
            yield model

    def checkpoint_identity(self, policy: LoRAPolicy) -> dict[str, Any]:
        """Of the adapter."""
        if self._copies(policy):
            return {"adapter": policy.adapter_digest()}
        return {"adapter": sampled_digest(self._place(policy).folder)}

    def cache_identity(self, policy: LoRAPolicy) -> dict[str, Any]:
        """Say the base's content and quantisation, and the adapter's content."""
        if self._copies(policy):
            return {"base": policy.cache_identity(), "adapter": policy.adapter_digest()}
        return {
            "base": policy.cache_identity(),
            "adapter": policy.adapter_content(str(self._place(policy).folder)),
        }

    def _copies(self, policy: LoRAPolicy) -> bool:
        """See whether the policy starts from an adapter that is in no file: its model was given with it."""
        return self.path is None and policy.adapter_path is None and policy.starts_from_adapter

    def _checked(self, policy: LoRAPolicy) -> Place:
        place = self._place(policy)
        adapter = check_lora(place)
        check_base(policy, adapter, place)
        mine, theirs = policy.lora_config().trainable_token_indices, adapter.trainable_token_indices
        if bool(mine) != bool(theirs):  # PEFT fails to load the one, and lets the other's tokens into the policy
            raise PolicyError(
                f"Expected policy and reference both to have `trainable_token_indices`, or neither, but the policy has "
                f"{mine} and the adapter {place} has {theirs}. Put the reference on a base of its own: ModelReference "
                "with `reference.adapter_path`."
            )
        return place

    def _place(self, policy: LoRAPolicy) -> Place:
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
    """No reference at all, for losses that do not require one: one forward pass less."""

    @property
    def provides(self) -> frozenset[Field]:
        """Nothing."""
        return frozenset()

    def activated(self, model: PeftModel) -> NoReturn:
        """There is no model."""
        raise PolicyError("NoReference has no model to run.")

    def logps(self, model: PeftModel, batch: CompletionBatch) -> None:
        """Nothing."""


def default_reference(policy: LoRAPolicy) -> Reference:
    """Where the policy starts: its base, or, if it continues an adapter, a frozen copy of that."""
    return AdapterReference() if policy.starts_from_adapter else BaseReference()
