from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class DPOLoss(PreferenceLoss):
    """Direct Preference Optimization (arXiv 2305.18290, eq. 7): −log σ(β·Δ).

    Δ is the difference of the log-ratios log π/π_ref of chosen and rejected, summed over tokens. At margin 0 the loss
    is log 2 and its slope in Δ is −β/2.

    Args:
        beta: inverse temperature; 0.1 is common, 0.01 to 0.5 in use.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> DPOLoss(beta=0.1)(PairLogps(side(-1.0), side(-21.0), side(-0.1), side(-0.1)))
        tensor([0.1269])
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        return -logsigmoid(self.beta * pairs.margin)
