from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.checks import in_range


@dataclass(frozen=True)
class CDPOLoss(PreferenceLoss):
    """Conservative DPO (ericmitchell.ai/cdpo.pdf, eq. 3): −(1−ε)·log σ(β·Δ) − ε·log σ(−β·Δ).

    DPO for labels that are wrong with probability ε: the loss has its minimum at the finite margin β·Δ = log((1−ε)/ε)
    instead of at infinity. At margin 0 it is log 2 and its slope in Δ is −β(1−2ε)/2.

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
        >>> CDPOLoss(beta=0.1, label_smoothing=0.1)(PairLogps(side(-1.0), side(-21.0), side(-0.1), side(-0.1)))
        tensor([0.3269])
    """

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        in_range("label_smoothing", self.label_smoothing, "[0, 0.5)")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        z = self.beta * pairs.margin
        return -(1 - self.label_smoothing) * logsigmoid(z) - self.label_smoothing * logsigmoid(-z)
