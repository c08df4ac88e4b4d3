"""Checkpoints of adapters: what is in them, what they belong to, and the PEFT directory next to each."""

from lit_dpo.checkpoint.classes import only_known_classes
from lit_dpo.checkpoint.identity import (
    KEY,
    REMEDY,
    check_belongs,
    compare,
    compare_steps,
    configuration,
    describe,
    describe_steps,
    flatten,
    to_builtins,
)
from lit_dpo.checkpoint.io import AdapterCheckpointIO, check_finite, check_writable, save_adapter
from lit_dpo.checkpoint.position import Standing, remeasure, remeasure_share, rewind, standing, take_settings
from lit_dpo.checkpoint.random import gather, random_state, restore_random_state
from lit_dpo.checkpoint.state import (
    adapter_state,
    frozen_is_not_missing,
    hyper_parameters,
    load_strictly,
    read_checkpoint,
    untrusting,
)
from lit_dpo.policy.adapter_checks import RECORD

__all__ = [
    "KEY",
    "RECORD",
    "REMEDY",
    "AdapterCheckpointIO",
    "Standing",
    "adapter_state",
    "check_belongs",
    "check_finite",
    "check_writable",
    "compare",
    "compare_steps",
    "configuration",
    "describe",
    "describe_steps",
    "flatten",
    "frozen_is_not_missing",
    "gather",
    "hyper_parameters",
    "load_strictly",
    "only_known_classes",
    "random_state",
    "read_checkpoint",
    "remeasure",
    "remeasure_share",
    "restore_random_state",
    "rewind",
    "save_adapter",
    "standing",
    "take_settings",
    "to_builtins",
    "untrusting",
]
