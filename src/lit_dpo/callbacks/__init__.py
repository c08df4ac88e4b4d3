"""Callbacks; `DPOModule` brings all but `SampleAnswers` with it."""

from lit_dpo.callbacks.answers import SampleAnswers
from lit_dpo.callbacks.export import AdapterExport
from lit_dpo.callbacks.health import TrainingHealth
from lit_dpo.callbacks.memory import MemoryEstimate
from lit_dpo.callbacks.predictions import PredictionWriter

__all__ = ["AdapterExport", "MemoryEstimate", "PredictionWriter", "SampleAnswers", "TrainingHealth"]
