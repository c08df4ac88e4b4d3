from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class ChiPOLoss(PreferenceLoss):
    """χ²-preference optimization (χPO, arXiv 2407.13399): −log σ(β·[φ(u_w) − φ(u_l)]), φ(u) = u + log u.

    u = π/π_ref of the chosen (w) and rejected (l) completion. DPO, whose φ is log u, for a divergence that adds χ² to
    the KL: the term u makes it dear to raise a completion far above the reference, which is where a policy exploits
    what the preferences do not cover. With r = log u: φ = e^r + r.

    Where e^r comes within e⁸ of what the type can hold it is held there, with no gradient: in float32 from r ≈ 80 up.
    The paper also clips the difference, which is left out here. At log-ratios 0 it is log 2 and its slope in r_w is −β,
    twice DPO's.

    Args:
        beta: inverse temperature.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> pairs = PairLogps(side(-1.0), side(-21.0), side(-1.0), side(-1.0))
        >>> ChiPOLoss(beta=0.1)(pairs)
        tensor([0.1155])
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        return -logsigmoid(self.beta * (self._link(pairs.chosen_logratio) - self._link(pairs.rejected_logratio)))

    def _link(self, logratio: Tensor) -> Tensor:
        """φ(u) − 1 from log u."""
        largest = math.log(torch.finfo(logratio.dtype).max) - 8 - math.log(max(1.0, self.beta))
        return logratio.clamp(max=largest).expm1() + logratio
