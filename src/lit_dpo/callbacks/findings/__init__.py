"""Findings of `HealthMonitor`: rules, whose thresholds are fields; docs/callbacks.md says where those come from."""

from lit_dpo.callbacks.findings.base import Finding, FirstPairs, History, PairsSeen, Rule
from lit_dpo.callbacks.findings.pairs import LengthDrift, MarginOutliers, Overfitting
from lit_dpo.callbacks.findings.start import DeadAdapters, Mismatch, NotFinite, SameCompletions, Swapped
from lit_dpo.callbacks.findings.steps import Displacement, FlatWeights, KLRunaway, Saturated, StuckLoss

RULES: tuple[Rule, ...] = (
    Displacement(),
    KLRunaway(),
    Saturated(),
    FlatWeights(),
    StuckLoss(),
    Overfitting(),
    MarginOutliers(),
    LengthDrift(),
    DeadAdapters(),
    NotFinite(),
    Mismatch(),
    Swapped(),
    SameCompletions(),
)

__all__ = [
    "RULES",
    "DeadAdapters",
    "Displacement",
    "Finding",
    "FirstPairs",
    "FlatWeights",
    "History",
    "KLRunaway",
    "LengthDrift",
    "MarginOutliers",
    "Mismatch",
    "NotFinite",
    "Overfitting",
    "PairsSeen",
    "Rule",
    "SameCompletions",
    "Saturated",
    "StuckLoss",
    "Swapped",
]
