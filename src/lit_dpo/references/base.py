"""The interface of references: what the policy is compared with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lit_dpo.data.batch import CompletionBatch
from lit_dpo.errors import PolicyError
from lit_dpo.logps.fields import OF_REFERENCE, Field, check_fields
from lit_dpo.logps.records import SequenceLogps
from lit_dpo.logps.score import completion_logps

if TYPE_CHECKING:
    from peft import PeftModel

    from lit_dpo.policy import LoRAPolicy


@dataclass(frozen=True)
class Reference(ABC):
    """A strategy that scores a batch under the reference model, without gradients.

    Subclass it anywhere; nothing has to be registered. Most say in `activated` which model to run; one that has its
    numbers from elsewhere overrides `logps` and says in `provides` what it has. A reference never calls
    `set_adapter`, which would flip `requires_grad` of the policy's adapter. What it loads it keeps next to the policy.
    """

    follows_policy: ClassVar[bool] = False
    """Whether training changes it (`update`). Its adapter is then named `reference` and part of every checkpoint."""

    @property
    def starts_at_policy(self) -> bool:
        """Whether policy and reference are the same before the first step; the run then stops if they are not."""
        return True

    @property
    def provides(self) -> frozenset[Field]:
        """What losses can read of it: sums, log-probs per token, its whole distribution to diverge from."""
        return OF_REFERENCE

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """See that what a reference declares exists."""
        super().__init_subclass__(**kwargs)
        check_fields(cls, "provides")

    @property
    def unwrapped(self) -> Reference:
        """The reference without what only makes it faster: runs with equal ones compute the same."""
        return self

    def check(self, policy: LoRAPolicy) -> None:  # noqa: B027 - most need nothing
        """Find what would fail in `attach`, without loading weights.

        Raises:
            PolicyError: naming the file or field, and what there is instead.
        """

    def attach(self, model: PeftModel, policy: LoRAPolicy) -> None:  # noqa: B027 - most need nothing
        """Put what the reference needs next to the loaded policy. Called once, after `policy.load`.

        Args:
            model: the `peft.PeftModel` of the policy.
            policy: where it came from.
        """

    @abstractmethod
    def activated(self, model: PeftModel) -> AbstractContextManager[Any]:
        """Yield, in a context, the reference as a model to run, made of the policy's or kept next to it.

        Args:
            model: the policy.
        """

    def logps(self, model: PeftModel, batch: CompletionBatch) -> SequenceLogps | None:
        """`(C,)` log-probs of the batch's completions under the reference; None if there is none."""
        with torch.no_grad(), self.activated(model) as reference:
            return completion_logps(reference, batch)

    def update(self, model: PeftModel, step: int) -> None:  # noqa: B027 - most stay as they are
        """Follow the policy. Called after every optimizer step, on all ranks alike, if `follows_policy`.

        Args:
            model: the policy.
            step: how many steps have been made, from 1.
        """

    def checkpoint_identity(self, policy: LoRAPolicy) -> dict[str, Any]:
        """Digests of what it loads next to the policy: resuming with other content, not from elsewhere, stops."""
        return {}

    def cache_identity(self, policy: LoRAPolicy) -> dict[str, Any]:
        """Everything that decides its log-probs of given token ids, in builtins: what a cache of them belongs to.

        Raises:
            PolicyError: if it cannot say.
        """
        raise PolicyError(
            f"{self} does not say what its log-probs depend on (`cache_identity`), so they cannot be cached."
        )


def keep_attached(model: PeftModel, name: str, frozen: object) -> None:
    """Keep something next to the policy that is none of its submodules: not trained, cast, counted or saved with it."""
    model.__dict__[f"lit_dpo_{name}"] = frozen


def attached(model: PeftModel, name: str) -> Any:
    """Return what `keep_attached` put there."""
    return model.__dict__[f"lit_dpo_{name}"]
