"""Will it fit: the peak memory of a training step, estimated before it is needed."""

from lit_dpo.memory.estimate import (
    PROBES,
    Context,
    Lengths,
    StepEstimate,
    StepMemory,
    estimate_step,
    optimizer_bytes,
    step_features,
)
from lit_dpo.memory.live import LiveBytes, stored_bytes

__all__ = [
    "PROBES",
    "Context",
    "Lengths",
    "LiveBytes",
    "StepEstimate",
    "StepMemory",
    "estimate_step",
    "optimizer_bytes",
    "step_features",
    "stored_bytes",
]
