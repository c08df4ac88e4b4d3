from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.checks import in_range


@dataclass(frozen=True)
class RobustDPOLoss(PreferenceLoss):
    """Robust DPO (arXiv 2403.00409, section 3.1): [−(1−ε)·log σ(β·Δ) + ε·log σ(−β·Δ)] / (1−2ε).

    An unbiased estimate, from labels that are flipped with probability ε, of the DPO loss of the true labels: its
    expectation over flips is DPO. Unlike cDPO it has no minimum, and it is negative at large margins: it falls
    with slope −βε/(1−2ε) for ever. At margin 0 it is log 2 and its slope in Δ is −β/(2(1−2ε)).

    Args:
        beta: inverse temperature.
        label_smoothing: ε, the probability that a label is flipped. Expected in [0, 0.5); 0 is DPO.

    Raises:
        ValueError: if `label_smoothing` is outside [0, 0.5).

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> RobustDPOLoss(beta=0.1, label_smoothing=0.1)(PairLogps(side(-1.0), side(-21.0), side(-0.1), side(-0.1)))
        tensor([-0.1231])
    """

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        in_range("label_smoothing", self.label_smoothing, "[0, 0.5)")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        z = self.beta * pairs.margin
        right, flipped = logsigmoid(z), logsigmoid(-z)
        return (self.label_smoothing * flipped - (1 - self.label_smoothing) * right) / (1 - 2 * self.label_smoothing)
