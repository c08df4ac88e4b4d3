"""Callbacks; docs/callbacks.md says which of them `DPOModule` brings with it, and which the command."""

from lit_dpo.callbacks.completions import SampleCompletions
from lit_dpo.callbacks.dynamics import TrainingDynamics
from lit_dpo.callbacks.environment import RunEnvironment
from lit_dpo.callbacks.export import AdapterExport
from lit_dpo.callbacks.faults import FaultNotes
from lit_dpo.callbacks.health import TrainingHealth
from lit_dpo.callbacks.histograms import RewardHistograms
from lit_dpo.callbacks.last import LastCheckpoint
from lit_dpo.callbacks.memory import MemoryEstimate
from lit_dpo.callbacks.monitor import HealthMonitor
from lit_dpo.callbacks.out_of_memory import OutOfMemory
from lit_dpo.callbacks.own_directory import OwnDirectory
from lit_dpo.callbacks.predictions import PredictionWriter
from lit_dpo.callbacks.quiet import Quiet
from lit_dpo.callbacks.resume import ExactResume
from lit_dpo.callbacks.steps import OptimizerSteps
from lit_dpo.callbacks.stop import StopTogether
from lit_dpo.callbacks.summary import RunSummary
from lit_dpo.callbacks.tensorboard import RunLogger
from lit_dpo.callbacks.throughput import LearningRate, Throughput
from lit_dpo.callbacks.together import PassesTogether

__all__ = [
    "AdapterExport",
    "ExactResume",
    "FaultNotes",
    "HealthMonitor",
    "LastCheckpoint",
    "LearningRate",
    "MemoryEstimate",
    "OptimizerSteps",
    "OutOfMemory",
    "OwnDirectory",
    "PassesTogether",
    "PredictionWriter",
    "Quiet",
    "RewardHistograms",
    "RunEnvironment",
    "RunLogger",
    "RunSummary",
    "SampleCompletions",
    "StopTogether",
    "Throughput",
    "TrainingDynamics",
    "TrainingHealth",
]
