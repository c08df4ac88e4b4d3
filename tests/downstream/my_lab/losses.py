from dataclasses import dataclass

import torch
from torch import Tensor

from lit_dpo.logps import PairLogps
from lit_dpo.losses import PreferenceLoss


@dataclass(frozen=True)
class HingeLoss(PreferenceLoss):
    """max(0, target − β·Δ)."""

    target: float = 1.0

    def __call__(self, pairs: PairLogps) -> Tensor:
        return torch.relu(self.target - self.beta * pairs.margin)
