"""A reference that is a model of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from lit_dpo.errors import PolicyError
from lit_dpo.logps.score import choose_layout
from lit_dpo.policy import LoRAPolicy
from lit_dpo.policy.limits import Limits, policy_limits
from lit_dpo.references.base import Reference, attached, keep_attached


@dataclass(frozen=True)
class ModelReference(Reference):
    """Another checkpoint with the policy's vocabulary, frozen next to it: a larger model, or the one before its SFT.

    Costs the memory of that model; `CachedReference` around it costs its passes once. At the first step policy and
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

    model: str
    revision: str | None = None
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    double_quantization: bool = True
    adapter_path: str | None = None
    adapter_base: Literal["same", "any"] = "same"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check the fields as the policy's are."""
        assert self.loader is not None

    @property
    def starts_at_policy(self) -> bool:
        """It is another model."""
        return False

    def check(self, policy: LoRAPolicy) -> None:
        """It can be loaded, and reads the same tokens."""
        mine = self.loader
        with _as_reference():
            mine.check()
        ours, theirs = policy.load_tokenizer().get_vocab(), mine.load_tokenizer().get_vocab()
        if different := sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)):
            raise PolicyError(
                f"Expected a reference with the policy's vocabulary but {self.model!r} and {policy.model!r} differ in "
                f"{len(different)} tokens, first {different[0]!r}: the same ids would be other texts."
            )

    def attach(self, model: Any, policy: LoRAPolicy) -> None:
        """Load it where the policy is."""
        device = next(model.parameters()).device
        with _as_reference():
            found = self.loader.load_frozen(device)
        choose_layout(found, self.attention)
        keep_attached(model, "reference", found)

    @contextmanager
    def activated(self, model: Any) -> Iterator[Any]:
        """That model, where the policy is."""
        found, device = attached(model, "reference"), next(model.parameters()).device
        if next(found.parameters()).device != device:
            found.to(device)
        yield found

    def limits(self) -> Limits:
        """How many token ids and positions the model has."""
        return policy_limits(self.loader)

    def checkpoint_identity(self, policy: LoRAPolicy) -> dict[str, Any]:
        """Of the model and its adapter."""
        mine = self.loader
        base = mine.checkpoint_identity()
        commit = {"commit": base["commit"]} if "commit" in base else {}
        return {"model": base["fingerprint"], **commit, "adapter": mine.adapter_digest()}

    def cache_identity(self, policy: LoRAPolicy) -> dict[str, Any]:
        """Its content, quantisation and dtype, and its adapter's content."""
        mine = self.loader
        adapter = None if self.adapter_path is None else mine.adapter_cache_identity(str(mine.adapter_place.folder))
        return {"base": mine.cache_identity(), "dtype": self.dtype, "adapter": adapter}

    @cached_property
    def loader(self) -> LoRAPolicy:
        """What loads it: one, so that a hub id stays at one commit."""
        return LoRAPolicy(
            self.model,
            revision=self.revision,
            quantization=self.quantization,
            double_quantization=self.double_quantization,
            adapter_path=self.adapter_path,
            adapter_base=self.adapter_base,
            dtype=self.dtype,
            attention=self.attention,
            trust_remote_code=self.trust_remote_code,
        )


@contextmanager
def _as_reference() -> Iterator[None]:
    """What a policy says of its own options, these have."""
    try:
        yield
    except PolicyError as error:
        raise PolicyError(str(error).replace("`policy.", "`reference.")) from None
