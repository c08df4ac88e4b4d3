"""A reference that follows the policy: TR-DPO."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lit_dpo.errors import PolicyError
from lit_dpo.policy.adapters import REFERENCE, active_adapter, adapter_pairs, copy_adapter
from lit_dpo.references.base import Reference

if TYPE_CHECKING:
    from peft import PeftModel

    from lit_dpo.policy import LoRAPolicy


@dataclass(frozen=True)
class EMAReference(Reference):
    """A reference that follows the policy (TR-DPO, arXiv 2404.09656, section 3): π_ref ← α·π + (1 − α)·π_ref.

    It starts as a copy of the policy's adapter, so at the first step it is the base model, or the adapter that is
    continued. Every `every` optimizer steps it moves: `alpha` below 1 is the paper's soft update, 1 the hard one, which
    puts the policy in its place. The average is taken of LoRA's factors A and B, as checkpoints average them, not of
    their product. Costs one adapter of memory; it is saved in checkpoints, so that resuming is exact.

    The rewards compare with the reference of the moment: they fall at each update, and accuracies before and after one
    do not compare.

    Args:
        alpha: α, weight of the policy. Expected in (0, 1]; 0.5 to 0.6 for soft updates in the paper.
        every: optimizer steps from one update to the next. Expected ≥ 1, and no more than the run has; TRL's
            default is 512 with α = 0.6.

    Raises:
        PolicyError: for a value outside its domain.
    """

    follows_policy: ClassVar[bool] = True

    alpha: float = 0.6
    every: int = 64

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not 0 < self.alpha <= 1:
            raise PolicyError(f"Expected `reference.alpha` in (0, 1] but got {self.alpha}.")
        if self.every < 1:
            raise PolicyError(f"Expected `reference.every` >= 1 but got {self.every}.")

    def attach(self, model: PeftModel, policy: LoRAPolicy) -> None:
        """Copy the policy's adapter."""
        copy_adapter(model)

    @contextmanager
    def activated(self, model: PeftModel) -> Iterator[Any]:
        """Run the policy with the average in its adapter's place."""
        with active_adapter(model, REFERENCE):
            yield model

    @torch.no_grad()
    def update(self, model: PeftModel, step: int) -> None:
        """Move if it is time."""
        if step % self.every == 0:
            for mine, policys in adapter_pairs(model):
                mine.lerp_(policys, self.alpha)
