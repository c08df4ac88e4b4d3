from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lit_dpo import DPOModule
from lit_dpo.logps import PairLogps
from lit_dpo.metrics import Mean


class LengthBias(Mean):
    """How much longer chosen completions are, in tokens."""

    def update(self, pairs: PairLogps) -> None:
        self.add(pairs.policy_chosen.length - pairs.policy_rejected.length)


class WatchedDPO(DPOModule):
    """DPO that pays for length, and measures it."""

    def __init__(self, *args: Any, length_penalty: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.length_penalty = length_penalty
        self.bonus = torch.nn.Parameter(torch.zeros(1))

    def configure_metrics(self) -> MetricCollection:
        metrics = super().configure_metrics()
        metrics.add_metrics({"length_bias": LengthBias()})
        return metrics

    def compute_loss(self, pairs: PairLogps) -> Tensor:
        longer = (pairs.policy_chosen.length - pairs.policy_rejected.length) / 100
        return super().compute_loss(pairs) + self.length_penalty * longer + self.bonus**2
