from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class DPOPLoss(PreferenceLoss):
    """DPO-Positive (DPOP, Smaug, arXiv 2402.13228, eq. 3): −log σ(β·(Δ − λ·max(0, −r_w))).

    r_w = log π/π_ref of the chosen completion: a pair whose chosen completion has become less likely than under the
    reference has to pay λ times as much for it as it can gain by its margin. For pairs that differ in a few tokens,
    such as right and wrong sums, under which DPO lowers the likelihood of both. λ is inside β, as in the paper. At
    log-ratios 0 it is log 2 and its slope in r_w is −β/2; just below, −β(1 + λ)/2.

    Args:
        beta: inverse temperature; 0.3 in the paper.
        penalty_weight: λ; 50 in the paper, which found 5 to 500 to do. Expected ≥ 0; 0 is DPO.

    Raises:
        ValueError: if `penalty_weight` is negative or not finite.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> DPOPLoss(beta=0.1, penalty_weight=10.0)(PairLogps(side(-1.0), side(-21.0), side(-0.1), side(-0.1)))
        tensor([0.2873])
    """

    beta: float = 0.3
    penalty_weight: float = 50.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if not (self.penalty_weight >= 0 and math.isfinite(self.penalty_weight)):
            raise ValueError(f"Expected `penalty_weight` >= 0 but got {self.penalty_weight}.")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        fallen = torch.relu(-pairs.chosen_logratio)
        return -logsigmoid(self.beta * (pairs.margin - self.penalty_weight * fallen))
