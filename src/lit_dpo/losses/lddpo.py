from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lit_dpo.logps.fields import Field
from lit_dpo.logps.records import PairLogps, SequenceLogps
from lit_dpo.losses.checks import in_range, one_of
from lit_dpo.losses.composed import WrappedLoss, within
from lit_dpo.losses.humanline import HumanlineLoss


@dataclass(frozen=True)
class LDDPOLoss(WrappedLoss):
    """Length-desensitised DPO (LD-DPO, arXiv 2409.06411): any loss on log-probs whose surplus tokens weigh α.

    With the shared length n = min(n_w, n_l), a completion's log-prob becomes Σ_{t ≤ n} log p_t + α·Σ_{t > n} log p_t:
    what only the longer completion has counts less, so that its length alone moves the loss less and completions do not
    grow as under DPO. A loss that divides by lengths still divides by the real ones.

    The references disagree on π_ref, so it is an argument. `"decoupled"` treats it as the policy, so that the policy
    starts at margin 0, as TRL from its 1.0 on does; `"plain"` leaves its sums alone, as TRL 0.24, LLaMA-Factory and
    ms-swift do. For completions of one length it is the inner loss, with its value and slope.

    Args:
        loss: the loss, with its β; DPO in the paper.
        surplus_weight: α. Expected in [0, 1); 1 would be the inner loss. 0.5 is where to start.
        reference: how the reference's log-probs are taken. Of effect only where the loss reads them.

    Raises:
        ValueError: if `surplus_weight` is outside [0, 1), `reference` neither, or within there is a
            `HumanlineLoss` or a loss over lists.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> from lit_dpo.losses import DPOLoss
        >>> side = lambda *x: SequenceLogps(torch.tensor([sum(x)]), torch.tensor([1.0 * len(x)]), torch.tensor(x))
        >>> pairs = PairLogps(side(-1.0, -4.0), side(-3.0), side(-1.0, -2.0), side(-3.0))
        >>> LDDPOLoss(DPOLoss(beta=0.1), surplus_weight=0.5)(pairs), DPOLoss(beta=0.1)(pairs)
        (tensor([0.7444]), tensor([0.7981]))
    """

    surplus_weight: float = 0.5
    reference: Literal["decoupled", "plain"] = "decoupled"

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        in_range("surplus_weight", self.surplus_weight, "[0, 1)")
        one_of("reference", self.reference, "decoupled", "plain")
        parts = [*within(self.loss)]
        if any(isinstance(one, HumanlineLoss) for one in parts):  # it sums tokens again: the weights would be lost
            raise ValueError(f"Expected `HumanlineLoss` around `LDDPOLoss`, not within, but got {self.loss}.")
        if any(one.per_prompt for one in parts):
            raise ValueError(f"Expected `loss` to score pairs, which share a length, not lists, but got {self.loss}.")

    @property
    def requires(self) -> frozenset[Field]:  # type: ignore[override]
        """Log-probs per token, of the reference too where it is decoupled, and what the loss requires."""
        return (
            super().requires | {Field.PER_TOKEN} | ({Field.REFERENCE_PER_TOKEN} if self._changes_reference else set())
        )

    @property
    def _changes_reference(self) -> bool:
        return self.reference == "decoupled" and Field.REFERENCE in self.loss.requires

    def view(self, pairs: PairLogps) -> PairLogps:
        """Weigh the pairs' surplus tokens down."""
        shared = torch.minimum(pairs.policy_chosen.length, pairs.policy_rejected.length).long()
        names = ["policy_chosen", "policy_rejected"]
        if self._changes_reference:
            names += ["reference_chosen", "reference_rejected"]
        changed: dict[str, Any] = {
            name: self._weigh(pairs.require(name), pairs.require(f"{name}.per_token"), shared) for name in names
        }
        # what a completion weighs depends on what it is compared with: none has one number in all its pairs
        return pairs._replace(**changed, completions=None)

    def _weigh(self, side: SequenceLogps, tokens: Tensor, shared: Tensor) -> SequenceLogps:
        lengths, size = side.length.long(), tokens.numel()
        starts = lengths.cumsum(0) - lengths
        # the first position of the surplus, for each token
        border = (starts + shared).repeat_interleave(lengths, output_size=size)
        surplus = torch.arange(size, device=tokens.device) >= border
        return side._replace(total=side.sums(torch.where(surplus, self.surplus_weight * tokens, tokens)))
