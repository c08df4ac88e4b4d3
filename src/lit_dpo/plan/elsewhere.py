"""The trainer of a run that is planned for machines that are not here: as many devices, none of them asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.requirements import check_strategy


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say what a trainer's arguments become, so that it can be made anywhere; it plans, and never runs.

    Args:
        config: the trainer's arguments.

    Raises:
        TrainingError: for a strategy that the run would refuse.
    """
    check_strategy(config.get("strategy") or "auto")  # Lightning would first miss the GPUs that it is for
    plugins = config.get("plugins") or []
    plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    # a cluster's environment reads the ranks from the job that it is in, and here is none
    plugins = [one for one in plugins if not isinstance(one, ClusterEnvironment)]
    return {
        "accelerator": "cpu",
        "devices": count(config.get("devices", "auto")),
        "plugins": [*plugins, LightningEnvironment()],
    }


def count(devices: Any) -> int:
    """Count the devices of a node as a trainer's `devices` names them: a number, a list, or its text.

    Of `auto` and -1 it is those of this machine, or one, in a line that says so.

    Example:
        >>> count(8), count([0, 2]), count("0,1,2"), count("4")
        (8, 2, 3, 4)
    """
    if isinstance(devices, str) and devices not in ("auto", "-1"):
        named = [one for one in devices.split(",") if one.strip()]
        return len(named) if "," in devices else int(devices)
    if isinstance(devices, list | tuple):
        return len(devices)
    if devices in ("auto", "-1", -1):
        found = max(1, torch.cuda.device_count())
        rank_zero_info(f"devices {devices}: planned with {found} a node; `--trainer.devices` says how many")
        return found
    return int(devices)
