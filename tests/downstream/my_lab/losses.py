from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_dpo.logps import PairLogps
from lit_dpo.losses import PreferenceLoss


@dataclass(frozen=True)
class TargetHingeLoss(PreferenceLoss):
    """max(0, target − β·Δ)."""

    target: float = 1.0

    def __call__(self, pairs: PairLogps) -> Tensor:
        return torch.relu(self.target - self.beta * pairs.margin)


@dataclass(frozen=True)
class GradedHingeLoss(TargetHingeLoss):
    """The same, times a column of the data."""

    columns: ClassVar[frozenset[str]] = frozenset({"difficulty"})

    def __call__(self, pairs: PairLogps) -> Tensor:
        return super().__call__(pairs) * pairs.column("difficulty")
