"""Faults at a moment: signals, a full disk, a read-only one, in the very process that is at work.

A moment is the n-th time that a command opens a file to write, makes a folder, renames or removes something: the same
on every machine, however busy. `arm` counts them by Python's audit hook, and does the fault right before the n-th.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
FAULTS = (*SIGNALS, "full", "read-only")
PROGRESS = "SOAK_PROGRESS"
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND
_REMOUNT, _READ_ONLY = 32, 1
libc = ctypes.CDLL(None, use_errno=True)


class Steps(pl.Callback):
    """Writes each optimizer step into the file that the environment names, at once."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """From where."""
        self._step = trainer.global_step
        folder = Path(getattr(trainer.loggers[0], "log_dir", None) or "").name
        self._run = "fit" if folder.startswith("version_") else folder  # an ablation has several
        _say(f"from {self._step} {self._run}")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """One more."""
        if trainer.global_step != self._step and trainer.is_global_zero:
            self._step = trainer.global_step
            _say(f"made {self._step} {self._run}")


def _say(line: str) -> None:
    number = os.open(os.environ[PROGRESS], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(number, f"{line}\n".encode())
    os.close(number)


def steps(file: Path) -> dict[str, tuple[int, int]]:
    """Of each run: the step that it began from, and the last one that it made."""
    found: dict[str, tuple[int, int]] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        word, number, run = line.split(maxsplit=2)
        begun, made = found.get(run, (int(number), int(number)))
        found[run] = (begun, made if word == "from" else max(made, int(number)))
    return found


class Fired(NamedTuple):
    """How many moments there were, and at which one the fault was done, if it was."""

    moments: int
    what: str


def arm(root: str, counts: str, at: int | None, fault: str | None, rest: bool = False) -> None:
    """Count the moments of this process under a folder, and do the fault at one of them.

    Args:
        root: of what is counted, and the disk that is filled.
        counts: the file that the number of moments goes into.
        at: from 1; None only counts.
        fault: one of `FAULTS`.
        rest: end the processes that this one has started too.
    """
    number, own, inside = os.open(counts, os.O_WRONLY | os.O_CREAT), os.getpid(), False
    seen, done = 0, False

    def hook(event: str, given: tuple[Any, ...]) -> None:
        nonlocal seen, done, inside
        if event != "open" and event not in _CHANGES:
            return
        if inside or os.getpid() != own or (event == "open" and not _to_write(given)):
            return
        with suppress(TypeError):  # a descriptor
            path = os.path.abspath(os.fsdecode(given[0]))
            if not path.startswith(root):
                return
            inside = True
            try:
                seen += 1
                os.pwrite(number, f"{seen:8}\n".encode(), 0)
                if at is not None and seen >= at and not done:
                    os.pwrite(number, f"{event} {path.removeprefix(root)}\n".encode(), 9)
                    done = True  # before: Python's own handler of Ctrl-C raises here
                    done = strike(fault or "", root, rest=rest)
            finally:
                inside = False

    sys.addaudithook(hook)


def fired(counts: Path) -> Fired:
    """What `arm` has written."""
    text = counts.read_text(errors="replace") if counts.exists() else ""
    number, _, what = text.partition("\n")
    return Fired(int(number or 0), what.strip("\n\0 "))


def cpu(process: int) -> float:
    """Seconds of a processor that a process has taken, however busy the machine is; 0 of one that is gone."""
    try:
        taken = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    except OSError:
        return 0.0
    return sum(map(int, taken)) / os.sysconf("SC_CLK_TCK")


def _to_write(given: tuple[Any, ...]) -> bool:
    mode, flags = given[1], given[2]
    return bool(flags & _WRITES) if mode is None else any(letter in mode for letter in "wax+")


def strike(fault: str, root: str, *, rest: bool = False) -> bool:
    """Do a fault to this process, or to its disk; whether that was possible."""
    if fault in SIGNALS and rest:  # by another process: whoever stops a group is seldom in it
        sender = os.posix_spawn("/bin/kill", ["kill", f"-{SIGNALS[fault]:d}", "--", f"-{os.getpgrp()}"], os.environ)
        os.waitpid(sender, 0)
        return True
    if fault in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault])
        return True
    if fault == "full":
        fill(Path(root))
        return True
    return read_only(Path(root))


def fill(disk: Path) -> None:
    """Leave no byte."""
    file = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for size in (1 << 16, 1 << 12, 1):
            with suppress(OSError):
                while True:
                    os.write(file, b"x" * size)
    finally:
        os.close(file)


def read_only(disk: Path, *, on: bool = True) -> bool:
    """Make a disk read-only, or not so any more; False while a file on it is open to be written."""
    flags = _REMOUNT | (_READ_ONLY if on else 0)
    if libc.mount(None, os.fsencode(disk), None, flags, None) == 0:
        return True
    if ctypes.get_errno() == errno.EBUSY:
        return False
    raise OSError(ctypes.get_errno(), "mount", str(disk))


def mend(disk: Path) -> None:
    """Room again, and writable."""
    read_only(disk, on=False)
    (disk / "filler").unlink(missing_ok=True)


@contextmanager
def own_disk(at: Path, size: str) -> Iterator[Path]:
    """A small file system in memory. Needs to be root."""
    at.mkdir(parents=True, exist_ok=True)
    if libc.mount(b"tmpfs", os.fsencode(at), b"tmpfs", 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "mount", str(at))
    try:
        yield at
    finally:
        for _ in range(50):
            if libc.umount2(os.fsencode(at), 2) == 0:  # as soon as nobody is in it
                break
            time.sleep(0.1)
