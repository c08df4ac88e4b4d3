from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.checks import in_range


@dataclass(frozen=True)
class DiscoPOPLoss(PreferenceLoss):
    """DiscoPOP, the log-ratio modulated loss (arXiv 2406.08414, eq. 5): (1−m)·(−log σ(z)) + m·e^(−z).

    z = β·Δ and m = σ(z/τ): the logistic loss on pairs ranked wrong, the exponential loss on pairs ranked right, and a
    dip between them. Found by a language model's search; not convex. At margin 0 it is (1 + log 2)/2 and its slope in Δ
    is β·[(1 − log 2)/(4τ) − 3/4].

    Args:
        beta: inverse temperature; 0.05 in the paper.
        tau: width of the change from one loss to the other. Expected in (0, 1]; beyond 1 the exponential would win on
            pairs ranked far wrong.

    Raises:
        ValueError: if `tau` is outside (0, 1].

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> DiscoPOPLoss(beta=0.1)(PairLogps(side(-1.0), side(-21.0), side(-0.1), side(-0.1)))
        tensor([0.1353])
    """

    tau: float = 0.05

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        in_range("tau", self.tau, "(0, 1]")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        z = self.beta * pairs.margin
        gate = z / self.tau
        return (logsigmoid(gate) - z).exp() - (-gate).sigmoid() * logsigmoid(z)
