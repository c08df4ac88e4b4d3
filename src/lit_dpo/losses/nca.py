from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class NCALoss(PreferenceLoss):
    """Noise contrastive alignment on pairs (NCA, arXiv 2402.05369, section 4.1).

    −log σ(β·r_w) − ½·log σ(−β·r_w) − ½·log σ(−β·r_l), where r = log π/π_ref of the chosen (w) and rejected (l)
    completion. It fits each completion's own log-ratio rather than their difference, so it keeps the likelihood of the
    chosen completion from falling: in r_w alone its minimum is at β·r_w = log 2. At log-ratios 0 it is 2·log 2 and its
    slope in r_w is −β/4, in r_l β/4.

    Args:
        beta: inverse temperature, the paper's α; 0.01 there.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> NCALoss(beta=0.1)(PairLogps(side(-1.0), side(-21.0), side(-0.1), side(-0.1)))
        tensor([1.1220])
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        chosen, rejected = self.beta * pairs.chosen_logratio, self.beta * pairs.rejected_logratio
        return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
