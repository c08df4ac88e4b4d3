"""A reference that is a model of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lit_dpo.errors import PolicyError
from lit_dpo.logps.choice import choose_layout
from lit_dpo.policy.base_model import BaseModel
from lit_dpo.policy.limits import Limits, policy_limits
from lit_dpo.policy.lora_options import check_can_shard
from lit_dpo.policy.sharding import mesh_of
from lit_dpo.references.base import Reference, attached, keep_attached

if TYPE_CHECKING:
    from peft import PeftModel

    from lit_dpo.policy import LoRAPolicy


@dataclass(frozen=True)
class ModelReference(BaseModel, Reference):
    """Another checkpoint with the policy's vocabulary, frozen next to it: a larger model, or the one before its SFT.

    Costs the memory of that model, on each rank a part of it with `policy.shard`; `CachedReference` around it costs its
    passes once. At the first step policy and
    reference may differ, so that rewards do not start at 0.

    Args:
        model: hub id or directory, as in the policy.
        revision: branch, tag or commit of a hub id.
        quantization: `nf4`, `int8` or `none`, whatever the policy's is.
        double_quantization: as in the policy.
        adapter_path: a trained LoRA adapter on it, as in the policy.
        adapter_base: as in the policy.
        dtype: as in the policy.
        attention: as in the policy.
        trust_remote_code: run code that comes with the model.

    Raises:
        PolicyError: for a value outside its domain; on checking, if its tokenizer gives other ids than the policy's.
    """

    option: ClassVar[str] = "reference"

    @property
    def starts_at_policy(self) -> bool:
        """It is another model."""
        return False

    def check(self, policy: LoRAPolicy) -> None:
        """See that it can be loaded, and reads the same tokens."""
        self.check_model()
        if policy.shard != "none":
            check_can_shard(self)
        ours, theirs = policy.load_tokenizer().get_vocab(), self.load_tokenizer().get_vocab()
        if different := sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)):
            raise PolicyError(
                f"Expected a reference with the policy's vocabulary but {self.model!r} and {policy.model!r} differ in "
                f"{len(different)} tokens, first {different[0]!r}: the same ids would be other texts."
            )

    def attach(self, model: PeftModel, policy: LoRAPolicy) -> None:
        """Load it where the policy is, in shards if the policy's base is in shards."""
        found = self.load_frozen(next(model.parameters()).device, mesh_of(model))
        choose_layout(found, self.attention)
        keep_attached(model, "reference", found)

    @contextmanager
    def activated(self, model: PeftModel) -> Iterator[Any]:
        """Run that model, where the policy is."""
        found, device = attached(model, "reference"), next(model.parameters()).device
        if next(found.parameters()).device != device:
            found.to(device)
        yield found

    def limits(self) -> Limits:
        """How many token ids and positions the model has."""
        return policy_limits(self)

    def checkpoint_identity(self, policy: LoRAPolicy) -> dict[str, Any]:
        """Of the model and its adapter."""
        base = self.model_identity()
        commit = {"commit": base["commit"]} if "commit" in base else {}
        return {"model": base["fingerprint"], **commit, "adapter": self.adapter_digest()}

    def cache_identity(self, policy: LoRAPolicy) -> dict[str, Any]:
        """Its content, quantisation and dtype, and its adapter's content."""
        adapter = None if self.adapter_path is None else self.adapter_content(str(self.adapter_place.folder))
        return {"base": self.model_content(), "dtype": self.dtype, "adapter": adapter}
