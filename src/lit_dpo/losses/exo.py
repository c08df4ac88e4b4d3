from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class EXOLoss(PreferenceLoss):
    """Efficient exact optimization on pairs (EXO, arXiv 2402.00856, eq. 16): KL(p ‖ q) of the two completions.

    p = (σ(β·Δ), σ(−β·Δ)) is what the policy prefers and q = (1−ε, ε) the smoothed label: σ(β·Δ)·[log σ(β·Δ) − log(1−ε)]
    + σ(−β·Δ)·[log σ(−β·Δ) − log ε]. The reverse of the direction that cDPO minimises, up to a constant; both have their
    minimum, here 0, at β·Δ = log((1−ε)/ε). On a pair that is ranked far wrong EXO is flat where DPO is linear. At
    margin 0 it is −log 2 − ½·log(ε(1−ε)) and its slope in Δ is −(β/4)·log((1−ε)/ε).

    Args:
        beta: inverse temperature, the paper's β_r.
        label_smoothing: ε, the label's probability of the rejected completion. Expected in (0, 0.5): at 0 it is
            infinite.

    Raises:
        ValueError: if `label_smoothing` is outside (0, 0.5).

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> EXOLoss(beta=0.1)(PairLogps(side(-1.0), side(-21.0), side(-0.1), side(-0.1)))
        tensor([0.4590])
    """

    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if not 0 < self.label_smoothing < 0.5:
            raise ValueError(f"Expected `label_smoothing` in (0, 0.5) but got {self.label_smoothing}.")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        z = self.beta * pairs.margin
        right = z.sigmoid() * (logsigmoid(z) - math.log1p(-self.label_smoothing))
        return right + (-z).sigmoid() * (logsigmoid(-z) - math.log(self.label_smoothing))
