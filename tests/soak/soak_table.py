"""What became of cases, and the table that is made of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from soak_cases import Case, Fault
from soak_faults import FAULTS

_WORDS = {"SIGINT": "Ctrl-C", "full": "the disk is full", "read-only": "the disk is read-only"}
_WORDS |= {"SIGKILL": "SIGKILL", "SIGTERM": "SIGTERM"}


class Outcome(NamedTuple):
    """Of a case."""

    case: Case
    hit: tuple[str, ...]
    """Where each fault was; empty for one that came too late."""
    statuses: tuple[int, ...]
    lost: int
    """Most optimizer steps that were made twice."""
    left: int
    """Temporary files that there were right after a fault."""
    traceback: bool
    wrong: tuple[str, ...]


def table(outcomes: Sequence[Outcome], seed: int) -> str:
    """Markdown: what happened, how often, and what was lost."""
    lines = ["| fault | how often | what was lost | command |", "|---|---|---|---|"]
    groups: dict[tuple[str, str], list[tuple[Outcome, str]]] = {}
    for one in outcomes:
        for hit in one.hit:
            groups.setdefault((hit.split()[0], one.case.command), []).append((one, hit))
    order = {name: place for place, name in enumerate(FAULTS)}
    for (fault, command), found in sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        writing = sum("os." in hit or "open " in hit for _, hit in found)
        wrong = sum(bool(one.wrong) for one, _ in found)
        lost = max(one.lost for one, _ in found)
        said = "nothing" if lost < 1 else f"at most {lost} step{'s' * (lost > 1)}, made again"
        said = said if command in ("fit", "ablate") else "nothing that was there; its work is made again"
        said += f"; {wrong} ended otherwise" if wrong else ""
        times = f"{len(found)}, {writing} of them at a write"
        lines.append(f"| {_WORDS[fault]}, `{command}` | {times} | {said} | `soak.py --seed {seed}` |")
    count = sum(len(one.hit) for one in outcomes)
    wrong = sum(bool(one.wrong) for one in outcomes)
    said = (
        f"{count} faults in {len(outcomes)} cases of seed {seed}; {wrong} cases ended otherwise than the straight run."
    )
    configs: dict[str, list[Outcome]] = {}
    for one in outcomes:
        configs.setdefault(one.case.config, []).append(one)
    lines += ["", "| configuration | faults | equal, to the bit |", "|---|---|---|"]
    for name, found_ in sorted(configs.items()):
        faults_ = sum(len(one.hit) for one in found_)
        lines.append(f"| {name} | {faults_} | {sum(not one.wrong for one in found_)} of {len(found_)} |")
    return "\n".join([said, "", *lines, ""])


def read(file: Path) -> list[Outcome]:
    """What was done before, of the same seed."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        (number, command, config, given), hit, statuses, lost, left, traceback, wrong = json.loads(line)
        case = Case(number, command, config, tuple(Fault(*one) for one in given))
        found.append(Outcome(case, tuple(hit), tuple(statuses), lost, left, traceback, tuple(wrong)))
    return found
