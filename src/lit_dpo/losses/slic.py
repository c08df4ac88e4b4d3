from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_dpo.logps.fields import Field
from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class SLiCLoss(PreferenceLoss):
    """Sequence likelihood calibration (SLiC-HF, arXiv 2305.10425, section 2): max(0, 1 − β·(ℓ_w − ℓ_l)) − λ·ℓ_w/n_w.

    ℓ = log π of the chosen (w) and rejected (l) completion, n its number of tokens; no reference. The second term, the
    negative log-likelihood of the chosen completion, is what keeps the policy near its start. The paper, and HALOs,
    write max(0, δ − ℓ_w + ℓ_l) − λ′·ℓ_w, with the margin δ in nats and the likelihood of the whole completion: for a
    completion of n_w tokens that is δ times this loss with β = 1/δ and λ = λ′·n_w/δ. One λ for all lengths, per token
    as here, is how TRL's CPO regularises its hinge: long completions do not count more. The same hinge on log-ratios is
    `HingeLoss`. At equal log-probs it is 1 − λ·ℓ_w/n_w and its slope in ℓ_w is −β − λ/n_w.

    Args:
        beta: 1/β is the margin in nats from which on a pair is left alone.
        nll_weight: λ, the weight of the negative log-likelihood per token of the chosen completion. Expected ≥ 0.

    Raises:
        ValueError: if `nll_weight` is negative or not finite.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> SLiCLoss(beta=0.01, nll_weight=0.1)(PairLogps(side(-1.0), side(-21.0)))
        tensor([0.8500])
    """

    requires: ClassVar[frozenset[Field]] = frozenset()

    nll_weight: float = 0.1

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if not (self.nll_weight >= 0 and math.isfinite(self.nll_weight)):
            raise ValueError(f"Expected `nll_weight` >= 0 but got {self.nll_weight}.")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        contrast = pairs.policy_chosen.total - pairs.policy_rejected.total
        return torch.relu(1 - self.beta * contrast) - self.nll_weight * pairs.policy_chosen.mean
