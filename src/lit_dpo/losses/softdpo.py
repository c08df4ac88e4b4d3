from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class SoftDPOLoss(PreferenceLoss):
    """Soft labels (cDPO, ericmitchell.ai/cdpo.pdf, eq. 3, a p per pair): −p·log σ(β·Δ) − (1−p)·log σ(−β·Δ).

    p is each pair's own probability that the chosen completion is really the better one, from the data: the share of
    annotators, or σ of a reward model's difference. Where cDPO has one ε for all pairs, ε = 1 − p here. Its minimum is
    at β·Δ = log(p/(1−p)), so a pair of equals is pulled to margin 0. At margin 0 it is log 2 and its slope in Δ is
    −β(2p−1)/2.

    Args:
        beta: inverse temperature.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> pairs = PairLogps(side(-1.0), side(-21.0), side(-0.1), side(-0.1))
        >>> SoftDPOLoss()(pairs._replace(columns={"probability": torch.tensor([0.9])}))
        tensor([0.3269])
    """

    columns: ClassVar[frozenset[str]] = frozenset({"probability"})

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        z = self.beta * pairs.margin
        probability: Tensor = pairs.column("probability").to(z)
        return -probability * logsigmoid(z) - (1 - probability) * logsigmoid(-z)
