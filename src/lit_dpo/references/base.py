"""The interface of references: what the policy is compared with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_dpo.data.batch import PairBatch
from lit_dpo.logps.records import SequenceLogps

if TYPE_CHECKING:
    from lit_dpo.policy import QLoRAPolicy


@dataclass(frozen=True)
class Reference(ABC):
    """A frozen strategy that scores a batch under the reference model, without gradients.

    Subclass it anywhere; nothing has to be registered. A reference never calls `set_adapter`, which would flip
    `requires_grad` of the policy's adapter.
    """

    @property
    def starts_at_policy(self) -> bool:
        """Whether policy and reference are the same before the first step; the run then stops if they are not."""
        return True

    def attach(self, model: Any, policy: QLoRAPolicy) -> None:  # noqa: B027 - most need nothing
        """Put what the reference needs beside the loaded policy. Called once, after `policy.load`.

        Args:
            model: the `peft.PeftModel` of the policy.
            policy: where it came from.
        """

    @abstractmethod
    def logps(self, model: Any, batch: PairBatch) -> tuple[SequenceLogps, SequenceLogps] | tuple[None, None]:
        """Log-probs of the chosen and rejected completions under the reference; (None, None) if there is none."""
