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
    """χ²-preference optimization (χPO, arXiv 2407.13399): −log σ(clip(β·[φ(u_w) − φ(u_l)])), φ(u) = u + log u.

    u = π/π_ref of the chosen (w) and rejected (l) answer. DPO, whose φ is log u, for a divergence that adds χ² to the
    KL: the term u makes it dear to raise an answer far above the reference, which is where a policy exploits what the
    preferences do not cover. With r = log u: φ = e^r + r.

    Where e^r comes within e⁸ of what the type can hold it is held there, with no gradient: in float32 from r ≈ 80 up.
    At log-ratios 0 it is log 2 and its slope in r_w is −β, twice DPO's.

    Args:
        beta: inverse temperature.
        clip: the bound on |β·[φ(u_w) − φ(u_l)]|, beyond which a pair has no gradient; the paper's 2·R_max, where R_max
            bounds the true reward. None for no bound. Expected > 0.

    Raises:
        ValueError: if `clip` is not a positive number.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> pairs = PairLogps(side(-1.0), side(-21.0), side(-1.0), side(-1.0))
        >>> ChiPOLoss(beta=0.1)(pairs), ChiPOLoss(beta=0.1, clip=1.0)(pairs)
        (tensor([0.1155]), tensor([0.3133]))
    """

    clip: float | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if self.clip is not None and not (self.clip > 0 and math.isfinite(self.clip)):
            raise ValueError(f"Expected `clip` > 0, or None, but got {self.clip}.")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        z = self.beta * (self._link(pairs.chosen_logratio) - self._link(pairs.rejected_logratio))
        return -logsigmoid(z if self.clip is None else z.clamp(-self.clip, self.clip))

    def _link(self, logratio: Tensor) -> Tensor:
        """φ(u) − 1 from log u."""
        largest = math.log(torch.finfo(logratio.dtype).max) - 8 - math.log(max(1.0, self.beta))
        return logratio.clamp(max=largest).expm1() + logratio
