"""How `gpu.py` runs its phases: each in a process group of its own, for a time of its own, its result whole on disk.

A phase is a function of a `Run`. It says what it has found so far with `run.note(…)`, which is on disk at once, and
returns its line for the table. What it raises is reported, and the next phase runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
RESERVE = 4.0  # seconds for the table, and for ending a phase
LAST_LINES = 40
HAS_CUDA = "import sys, torch; sys.exit(not torch.cuda.is_available())"


class MissingError(Exception):
    """What a phase needs is not installed: it is left out by name."""


class Phase(NamedTuple):
    """One question to the card.

    Attributes:
        name: a letter and what it is about.
        run: finds the answer.
        seconds: what it may take in any case, on a GPU; about twice what is expected.
        rehearsal: the same on a CPU, with tiny shapes.
        ahead: Python that a process runs next to the phases before it, which leave the CPU alone.
    """

    name: str
    run: Callable[[Run], str]
    seconds: float
    rehearsal: float
    ahead: str | None = None


@dataclass
class Run:
    """What a phase is told, and where it writes.

    Attributes:
        device: `cuda` or `cpu`.
        folder: for files that phases share, removed at the end.
        file: of this phase's result.
        before: what the phases before it have found, by name.
    """

    device: str
    folder: Path
    file: Path
    before: dict[str, Any]

    def __post_init__(self) -> None:
        self.found: dict[str, Any] = {}

    @property
    def rehearsed(self) -> bool:
        """Tiny shapes on a CPU."""
        return self.device == "cpu"

    def note(self, **found: Any) -> None:
        """Remember what was found, on disk, whatever comes next."""
        self.found |= found
        write(self.file, json.dumps(self.found, default=str))


def write(file: Path, text: str) -> None:
    """The whole file or the one before it."""
    temporary = file.with_name(f".{file.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def share(phases: Sequence[Phase], left: float, rehearse: bool) -> float:
    """Seconds that the first of these phases gets.

    What it may take in any case, and what the others cannot need; three times as much as the first is a hang. So that a
    phase that takes too long takes time from nobody, and one that is early leaves it to those that follow.
    """
    needs = [phase.rehearsal if rehearse else phase.seconds for phase in phases]
    return min(needs[0] + max(0.0, left - sum(needs)), 3 * needs[0], left)


class Program:
    """Runs phases one after another, and writes down what each has found."""

    def __init__(self, phases: Sequence[Phase], given: argparse.Namespace, folder: Path, end: float) -> None:
        self.phases, self.given, self.folder, self.end = phases, given, folder, end
        self.results: dict[str, dict[str, Any]] = {}
        self.running: list[subprocess.Popen[bytes]] = []

    def run(self) -> None:
        """All of them; results and the table are on disk after each."""
        for phase in self.phases:
            if phase.ahead:
                self.start(["-c", phase.ahead], subprocess.DEVNULL, subprocess.DEVNULL, OMP_NUM_THREADS="2")
        for place, phase in enumerate(self.phases):
            left = self.end - time.monotonic()
            need = phase.rehearsal if self.given.rehearse else phase.seconds
            if left < need / 2:
                why = f"no time: it may need {need:.0f} s and {max(0, left):.0f} s are left"
                result: dict[str, Any] = {"state": "left out", "seconds": 0.0, "line": why}
            else:
                seconds = share(self.phases[place:], left, self.given.rehearse)
                result = self.one(phase, seconds, cut_short=seconds < need)
            self.results[phase.name] = {**({"rehearsal": True} if self.given.rehearse else {}), **result}
            print(self.line(phase.name), flush=True)
            self.save()

    def one(self, phase: Phase, seconds: float, cut_short: bool) -> dict[str, Any]:
        """What a phase found; ended with all its children when its time is over."""
        file, output, errors = (self.folder / f"{phase.name}.{kind}" for kind in ("json", "out", "err"))
        before = {name: result["found"] for name, result in self.results.items() if result.get("found")}
        write(self.folder / "before.json", json.dumps(before))
        command = [sys.argv[0], "--phase", phase.name, "--folder", str(self.folder)]
        begun, over = time.monotonic(), False
        with output.open("wb") as out, errors.open("wb") as err:
            process = self.start(command + ["--rehearse"] * self.given.rehearse, out, err)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                over = True
            stop(process)
            self.running.remove(process)
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        line = found.pop("line", "")
        state, why = found.pop("state", "failed"), found.pop("why", f"its process ended with {process.returncode}")
        if over:
            state, why = "over time", f"not done in {seconds:.0f} s, ended"
            if cut_short:  # it never had the time that it may need
                state, why = "left out", f"no time: not done in the {seconds:.0f} s that were left"
        result = {"state": state, "seconds": round(time.monotonic() - begun, 1), "found": found}
        result["line"] = line if state == "ok" else "; ".join(part for part in (why, line) if part)
        result["output"] = last_lines(output)
        if state != "ok":
            result["errors"] = last_lines(errors)
        return result

    def start(self, arguments: list[str], out: Any, err: Any, **more: str) -> subprocess.Popen[bytes]:
        """A Python process with a session, and so a process group, of its own."""
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment(self.folder, self.given.rehearse) | more,
            start_new_session=True,
        )
        self.running.append(process)
        return process

    def stop(self) -> None:
        """End all that was started."""
        for process in self.running:
            stop(process)

    def line(self, name: str) -> str:
        """One line, as soon as it is known."""
        result = self.results[name]
        mark = "[rehearsal] " if self.given.rehearse else ""
        return f"{mark}{name:12} {result['state']:9} {result['seconds']:6.1f} s  {result['line']}"

    def save(self) -> None:
        """All results, and the table, each a whole file."""
        everything = {"rehearsal": self.given.rehearse, "phases": self.results}
        write(self.given.out / "gpu.json", json.dumps(everything, indent=1))
        write(self.given.out / "gpu.md", self.table())

    def table(self) -> str:
        """In Markdown."""
        rows = [
            f"| {name} | {r['state']} | {r['seconds']:.0f} | {r['line'].replace('|', '/')} |"
            for name, r in self.results.items()
        ]
        title = "A rehearsal on a CPU: no figure here is a card's.\n\n" if self.given.rehearse else ""
        return title + "\n".join(["| phase | state | s | result |", "|---|---|---|---|", *rows]) + "\n"

    @property
    def failed(self) -> bool:
        """Whether a phase did not end well; one that was left out by name did not fail."""
        return any(result["state"] not in ("ok", "left out") for result in self.results.values())


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(file: Path) -> list[str]:
    """The end of what a process has said; a bar's last state stands for the bar."""
    text = file.read_bytes()[-100_000:].decode(errors="replace")
    return [line.rpartition("\r")[2] for line in text.splitlines() if line.strip()][-LAST_LINES:]


def environment(folder: Path, rehearse: bool) -> dict[str, str]:
    """This checkout's package, one card, no network, and caches that go with the folder."""
    paths = [str(HERE.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0],
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
        **({"OMP_NUM_THREADS": "1"} if rehearse else {}),  # threads that wait for a core slow each other tenfold
    }


def run_phase(phase: Phase, folder: Path, device: str) -> int:
    """The body of a phase's process."""
    _end_with_the_parent(folder)
    before = json.loads((folder / "before.json").read_text(encoding="utf-8"))
    run = Run(device, folder, folder / f"{phase.name}.json", before)
    try:
        run.note(line=phase.run(run), state="ok")
    except MissingError as missing:
        run.note(state="left out", why=str(missing))
    except BaseException as error:
        traceback.print_exc()
        words = str(error).strip().splitlines()
        run.note(state="failed", why=f"{type(error).__name__}: {words[0] if words else ''}")
        return 1
    return 0


def _end_with_the_parent(folder: Path) -> None:
    """A program that is killed can neither end its phase nor clear up: the phase looks whether it is still there."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(phases: Sequence[Phase], about: str | None = None) -> int:
    """The command line over a table of phases; its exit status."""
    begun, given = time.monotonic(), arguments(phases, about)
    if given.phase:
        phase = next(phase for phase in phases if phase.name == given.phase)
        return run_phase(phase, given.folder, "cpu" if given.rehearse else "cuda")
    if not given.rehearse and subprocess.run([sys.executable, "-c", HAS_CUDA]).returncode:
        print("Expected a CUDA device but torch finds none; `--rehearse` runs every phase on the CPU.", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    chosen = [phase for phase in phases if given.only is None or phase.name.startswith(given.only)]

    def stopped(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(one, stopped)
    with tempfile.TemporaryDirectory(prefix="lit-dpo-gpu-") as folder:
        program = Program(chosen, given, Path(folder), begun + 60 * given.minutes - RESERVE)
        try:
            program.run()
        finally:
            program.stop()
            program.save()
            print(f"\n{program.table()}\nall of it: {given.out / 'gpu.json'}", flush=True)
    return int(program.failed)


def arguments(phases: Sequence[Phase], about: str | None) -> argparse.Namespace:
    names = [phase.name for phase in phases]
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="a folder for gpu.json and gpu.md")
    parser.add_argument("--rehearse", action="store_true", help="every phase on the CPU, with tiny shapes")
    parser.add_argument("--only", help=f"beginnings of names, with commas between; names are {', '.join(names)}")
    parser.add_argument("--phase", choices=names, help=argparse.SUPPRESS)  # in its own process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only is not None:
        given.only = tuple(given.only.split(","))
        for wanted in given.only:
            if not wanted or not any(name.startswith(wanted) for name in names):
                parser.error(f"Expected `--only` to name phases among {', '.join(names)} but got {wanted!r}.")
    return given
