"""The callbacks that come along with a `DPOModule`, and the order in which all are called."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl

from lit_dpo.callbacks.environment import RunEnvironment
from lit_dpo.callbacks.export import AdapterExport
from lit_dpo.callbacks.faults import FaultNotes
from lit_dpo.callbacks.health import TrainingHealth
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
from lit_dpo.callbacks.together import PassesTogether

_BROUGHT = (
    Quiet,
    OwnDirectory,
    FaultNotes,
    PassesTogether,
    ExactResume,
    TrainingHealth,
    MemoryEstimate,
    OutOfMemory,
    OptimizerSteps,
    HealthMonitor,
    RunEnvironment,
    AdapterExport,
    RunSummary,
    PredictionWriter,
)


def with_brought(own: Sequence[pl.Callback]) -> list[pl.Callback]:
    """Put the callbacks that come along ahead of a trainer's; one of its own of the same class stands in their order.

    Those that write what others have counted, or end the run, come behind all others, `ModelCheckpoint` too: at the end
    of a batch, a file of this batch holds what every callback has counted of it, and a stop cuts none of them short.
    """
    first = [_of(kind, own) or kind() for kind in _BROUGHT]
    last = [*(one for one in own if isinstance(one, LastCheckpoint)), _of(StopTogether, own) or StopTogether()]
    return [*first, *(one for one in own if not any(one is other for other in (*first, *last))), *last]


def _of(kind: type[pl.Callback], own: Sequence[pl.Callback]) -> pl.Callback | None:
    return next((one for one in own if isinstance(one, kind)), None)
