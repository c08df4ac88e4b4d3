"""Callbacks; `DPOModule` brings all but `SampleCompletions`, `LastCheckpoint` and `TrainingDynamics` with it."""

from lit_dpo.callbacks.completions import SampleCompletions
from lit_dpo.callbacks.dynamics import TrainingDynamics
from lit_dpo.callbacks.export import AdapterExport
from lit_dpo.callbacks.health import TrainingHealth
from lit_dpo.callbacks.last import LastCheckpoint
from lit_dpo.callbacks.memory import MemoryEstimate
from lit_dpo.callbacks.predictions import PredictionWriter
from lit_dpo.callbacks.resume import ExactResume
from lit_dpo.callbacks.steps import OptimizerSteps

__all__ = [
    "AdapterExport",
    "ExactResume",
    "LastCheckpoint",
    "MemoryEstimate",
    "OptimizerSteps",
    "PredictionWriter",
    "SampleCompletions",
    "TrainingDynamics",
    "TrainingHealth",
]
