from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class APOZeroLoss(PreferenceLoss):
    """Anchored preference optimization, zero (APO, arXiv 2408.06266, eq. 7): 1 − σ(β·r_w) + σ(β·r_l).

    r = log π/π_ref of the chosen (w) and rejected (l) completion. Pushes the chosen completion's likelihood up and the
    rejected one's down, each by itself: for chosen completions that are better than the model's own. Bounded in (0, 2).
    At log-ratios 0 it is 1 and its slope in r_w is −β/4, in r_l β/4.

    Args:
        beta: inverse temperature.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> APOZeroLoss(beta=0.1)(PairLogps(side(-1.0), side(-21.0), side(-0.1), side(-0.1)))
        tensor([0.6326])
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        chosen, rejected = self.beta * pairs.chosen_logratio, self.beta * pairs.rejected_logratio
        return (-chosen).sigmoid() + rejected.sigmoid()
