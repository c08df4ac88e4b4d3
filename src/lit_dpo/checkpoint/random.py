"""The random states of a run."""

from __future__ import annotations

from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """Of one rank, so that dropout masks continue too."""
    # Python's and NumPy's are not kept: the order of rows is drawn from seed and epoch alone
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def gather(mine: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    """Of every rank; all of them ask together."""
    if world_size == 1:
        return [mine]
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, mine)
    return gathered


def restore_random_state(states: list[dict[str, Any]], rank: int) -> None:
    """Continue this rank's random state; with another number of ranks or devices there is none to continue."""
    if rank >= len(states):
        return
    torch.set_rng_state(states[rank]["cpu"].cpu())
    if states[rank]["cuda"] and len(states[rank]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states[rank]["cuda"]])
