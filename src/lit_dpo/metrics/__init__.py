"""torchmetrics of preference training."""

from lit_dpo.metrics.preference import (
    ChosenLogps,
    ChosenReward,
    KLEstimate,
    LossPart,
    Mean,
    PreferenceLossMean,
    RejectedLogps,
    RejectedReward,
    RewardAccuracy,
    RewardMargin,
)

__all__ = [
    "ChosenLogps",
    "ChosenReward",
    "KLEstimate",
    "LossPart",
    "Mean",
    "PreferenceLossMean",
    "RejectedLogps",
    "RejectedReward",
    "RewardAccuracy",
    "RewardMargin",
]
