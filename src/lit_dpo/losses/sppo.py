from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class SPPOLoss(PreferenceLoss):
    """Self-play preference optimization (SPPO, arXiv 2405.00675, eq. 4.7): (r_w − 1/(2β))² + (r_l + 1/(2β))².

    r = log π/π_ref of the chosen (w) and rejected (l) completion. This is the `hard` form: the paper regresses the
    log-ratio of a completion onto η·(P − ½), with the probability P that it wins from a preference model; here P is 1
    for the chosen and 0 for the rejected one, and β is 1/η. Each log-ratio has its own target, so both likelihoods are
    held, not only their difference. At log-ratios 0 it is 1/(2β²) and its slope in r_w is −1/β, in r_l 1/β.

    Args:
        beta: the paper's 1/η; the targets are ±1/(2β) nats.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> SPPOLoss(beta=0.1)(PairLogps(side(-1.0), side(-21.0), side(-0.1), side(-0.1)))
        tensor([287.6200])
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        target = 1 / (2 * self.beta)
        return (pairs.chosen_logratio - target) ** 2 + (pairs.rejected_logratio + target) ** 2
