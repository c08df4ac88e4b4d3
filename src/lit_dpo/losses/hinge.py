from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class HingeLoss(PreferenceLoss):
    """Hinge loss (SLiC-HF, arXiv 2305.10425, section 2; with a reference RSO, arXiv 2309.06657): max(0, 1 − β·Δ).

    The support vector machine among preference losses: a pair beyond the margin β·Δ = 1 has no gradient any more. It is
    the `hinge-norm` of RSO, whose γ is our β: SLiC's loss on log-ratios to the reference instead of log-probs, so
    without SLiC's own regulariser (`SLiCLoss` has it). At margin 0 the loss is 1 and its slope in Δ is −β.

    Args:
        beta: 1/β is the margin in nats from which on a pair is left alone.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> HingeLoss(beta=0.01)(PairLogps(side(-1.0), side(-21.0), side(-0.1), side(-0.1)))
        tensor([0.8000])
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        return torch.relu(1 - self.beta * pairs.margin)
