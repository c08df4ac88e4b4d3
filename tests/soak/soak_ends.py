"""How the processes of a command end, and whether a shell can tell."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import Any, NamedTuple

from soak_cases import Fault
from soak_faults import SIGNALS, cpu

_PATIENCE = 240.0
_SURVIVORS = 60.0
"""Seconds that a rank may take to see that another one is gone, on a machine that is busy."""


class Ended(NamedTuple):
    """How a command ended: of each rank, the first one first."""

    statuses: tuple[int, ...]
    seconds: float
    """Of a processor, of the first one."""
    moments: int
    what: str
    """At which moment the fault was; empty if the command was over before."""
    output: str
    stuck: str = ""


def send(started: list[Any], fault: Fault, *, rest: bool) -> None:
    """Send a fault that is a signal to processes, or to all that they have started."""
    if fault.name not in SIGNALS:
        return
    for one in started:
        with suppress(ProcessLookupError):
            (os.killpg if rest else os.kill)(one.pid, SIGNALS[fault.name])


def ends(started: list[Any]) -> tuple[tuple[int, ...], float, str]:
    """Wait for all: their statuses, the seconds of a processor of the first one, what is said of one that stays."""
    until, stuck, seconds = time.monotonic() + _PATIENCE, "", 0.0
    while any(one.process.is_alive() for one in started) and time.monotonic() < until:
        seconds = max(seconds, cpu(started[0].pid))
        if not all(one.process.is_alive() for one in started):
            until = min(until, time.monotonic() + _SURVIVORS)
            for one in started:
                if one.process.is_alive() and "processes registered" not in started[0].output():
                    one.kill()  # as a launcher does: nobody else sees it while not all have met
        time.sleep(0.01)
    for rank, one in enumerate(started):
        if one.process.is_alive():
            os.kill(one.pid, signal.SIGABRT)
            one.process.join(5)
            stuck = f"rank {rank} did not end"
        one.kill()
    return tuple(int(one.process.exitcode) for one in started), seconds, stuck


def status_wrong(fault: Fault, ended: Ended) -> list[str]:
    """A status that a shell would not understand: 128 and the signal's number, or 1 where the disk refused."""
    allowed = {0, 1} if fault.name not in SIGNALS else {-SIGNALS[fault.name], 0}
    if fault.name in ("SIGTERM", "SIGINT"):
        allowed |= {128 + SIGNALS[fault.name]}
    if len(ended.statuses) > 1 and fault.whom == "one":
        allowed |= {1, -signal.SIGKILL}
    return [f"status {one} after {fault.name}" for one in ended.statuses if one not in allowed]


def said(output: str) -> str:
    return " | ".join(line for line in output.splitlines() if line.strip())[-300:]
