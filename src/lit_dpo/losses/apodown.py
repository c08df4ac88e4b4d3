from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class APODownLoss(PreferenceLoss):
    """Anchored preference optimization, down (APO, arXiv 2408.06266, eq. 8): σ(β·r_w) + 1 − σ(β·Δ).

    r_w = log π/π_ref of the chosen completion and Δ = r_w − r_l. Pushes both likelihoods down, the rejected one
    further: for chosen completions that are worse than the model's own. Bounded in (0, 2). At log-ratios 0 it is 1 and
    its slope in r_w is 0, in r_l β/4.

    Args:
        beta: inverse temperature.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> APODownLoss(beta=0.1)(PairLogps(side(-1.0), side(-21.0), side(-0.1), side(-0.1)))
        tensor([0.5967])
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        return (self.beta * pairs.chosen_logratio).sigmoid() + (-self.beta * pairs.margin).sigmoid()
