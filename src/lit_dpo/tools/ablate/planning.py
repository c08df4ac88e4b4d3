"""`lit-dpo ablate --plan`: how many runs, how long, and how much memory, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace

from lit_dpo.plan import plan
from lit_dpo.tools.ablate.configuring import FitCLI, quiet
from lit_dpo.tools.ablate.preparing import Prepared
from lit_dpo.tools.ablate.sharing import plain
from lit_dpo.tools.ablate.single import Work

_GIB = 2.0**30
_NUMBERS = ("seed", "lr", "seed_everything", "warmup_ratio", "min_lr_ratio", "decay_ratio", "lr_scheduler", "config")
"""Options that change no byte and no second."""


def planned(prepared: Prepared, device: str, jobs: int) -> str:
    """Plan one run of each setting that takes other memory or time, and add up.

    Args:
        prepared: the runs.
        device: `here`, or a GPU by name.
        jobs: runs at once.

    Raises:
        LitDPOError: for what a run itself would refuse before it loads weights.
    """
    cli = FitCLI()
    groups: dict[str, list[Work]] = {}
    for work in prepared.works:
        with quiet():
            groups.setdefault(setting_of(cli.parse(work.asked.arguments)), []).append(work)
    at_once = min(jobs, len(prepared.works))
    lines, low, high, most = [], 0.0, 0.0, 0
    for works in groups.values():
        with quiet():
            cli.parse(works[0].asked.arguments)
            cli.build()
            made = plan(cli.model, cli.datamodule, cli.trainer, device)
        low, high = low + len(works) * made.seconds[0], high + len(works) * made.seconds[1]
        most = max(most, made.step.total)
        lines += ["", f"{len(works)} runs, such as {works[0].asked.name}:", str(made)]
    passes = f"; {len(prepared.passes)} pass of the reference" if prepared.passes else ""
    head = [
        f"{len(prepared.works)} runs, {at_once} at a time{passes}",
        f"{_hours(low / at_once, high / at_once)} in all, without loading, measuring and sampling",
        f"about {most / _GIB:.2f} GiB for a step of each that runs, {at_once * most / _GIB:.2f} GiB in all",
    ]
    return "\n".join([*head, *lines])


def setting_of(config: Namespace) -> str:
    """All of a configuration but numbers that cost nothing."""
    kept = plain(config)
    loss = kept.get("model", {}).get("init_args", {}).get("loss")
    if isinstance(loss, dict):
        loss["init_args"] = {}
    return json.dumps(_without(kept), sort_keys=True, default=str)


def _without(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without(one) for name, one in value.items() if name not in _NUMBERS}
    return value


def _hours(low: float, high: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if high >= 2 * size:
            return f"{low / size:.2g} to {high / size:.2g} {unit}"
    return f"{low:.2g} to {high:.2g} seconds"
