from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.fields import Field
from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class CPOLoss(PreferenceLoss):
    """Contrastive Preference Optimization (CPO, arXiv 2401.08417, eq. 3): −log σ(β·(ℓ_w − ℓ_l)) − λ·ℓ_w/n_w.

    ℓ = log π of the chosen (w) and rejected (l) completion, n its number of tokens; no reference. The second term, the
    negative log-likelihood of the chosen completion, keeps its likelihood from falling with the rejected one's. It is
    taken per token of each pair: TRL takes the mean over all tokens of the batch, so that long completions count more.
    With λ = 0 it is DPO under a uniform reference (`reference_free` in other packages). At equal log-probs it is
    log 2 − λ·ℓ_w/n_w and its slope in ℓ_w is −β/2 − λ/n_w.

    Args:
        beta: inverse temperature.
        nll_weight: λ, the weight of the negative log-likelihood of the chosen completion. Expected ≥ 0; 1 in the paper.

    Raises:
        ValueError: if `nll_weight` is negative or not finite.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> CPOLoss(beta=0.1)(PairLogps(side(-1.0), side(-21.0)))
        tensor([0.6269])
    """

    requires: ClassVar[frozenset[Field]] = frozenset()

    nll_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if not (self.nll_weight >= 0 and math.isfinite(self.nll_weight)):
            raise ValueError(f"Expected `nll_weight` >= 0 but got {self.nll_weight}.")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        contrast = pairs.policy_chosen.total - pairs.policy_rejected.total
        return -logsigmoid(self.beta * contrast) - self.nll_weight * pairs.policy_chosen.mean
