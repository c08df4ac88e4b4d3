"""Processes in a second each: forked from a server that has imported everything, and started nothing (`forking.py`).

`run` has some ranks do the same work and gives what each returned; `command` starts `lit-dpo` with its own working
directory, environment and output, to be sent signals. What libraries read from the environment when they are imported
(`HF_HOME`, `HF_HUB_OFFLINE`, `OMP_NUM_THREADS`) is the server's: a test of that needs an interpreter of its own.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["preloaded"])
_HERE = Path(__file__).parent


def _start(process: Any) -> None:
    """Start a process; the first one starts the server, which finds `preloaded` by `PYTHONPATH` alone."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_HERE), str(_HERE.parent / "src"), *([before] if before else [])])
    try:
        process.start()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


class RankError(AssertionError):
    """What a rank raised, or where all of them were when the time was up."""


def run(
    work: Callable[..., Any], ranks: int, *given: Any, folder: Path, seconds: float = 60, environment: Any = None
) -> list[Any]:
    """Have `work(*given)` done by several ranks of one machine, and return what each returned.

    Lightning's `DDPStrategy` finds the ranks in the environment, as under `torchrun`; so does `torch.distributed`.

    Args:
        work: a function that pickle finds by its module and name.
        ranks: how many. 1: no rank is told.
        given: its arguments.
        folder: where `rank-N.log` holds what each rank wrote, and where it was when the time was up.
        seconds: after which all are killed. A rank that waits for another one shows itself by it.
        environment: variables, besides the ranks' own.

    Raises:
        RankError: with what the first rank raised, or with the stacks of all.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    processes, ends = [], {}
    for rank in range(ranks):
        of_rank = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(ranks),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "GROUP_RANK": "0",
            "NODE_RANK": "0",
        }
        here, there = _SERVER.Pipe(duplex=False)
        inherited = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}  # DDP would take it
        variables = {**inherited, **(of_rank if ranks > 1 else {}), **(environment or {})}
        log = folder / f"rank-{rank}.log"
        job = _SERVER.Process(target=_work, args=(there, log, variables, seconds, work, given))
        _start(job)
        there.close()
        processes.append(job)
        ends[here] = rank
    try:
        found = _collect(ends, time.monotonic() + seconds + 2)
    finally:
        for job in processes:
            job.kill()
            job.join()
    for rank, (kind, content) in sorted(found.items(), key=lambda one: one[1][0] != "raised"):
        if kind != "returned":
            written = "\n".join(f"--- {log.name}\n{log.read_text()[-6000:]}" for log in sorted(folder.glob("rank-*")))
            raise RankError(f"Rank {rank} of {ranks} {kind}: {content}\n{written}")
    return [pickle.loads(found[rank][1]) for rank in range(ranks)]


def _collect(ends: dict[Connection, int], until: float) -> dict[int, tuple[str, Any]]:
    found: dict[int, tuple[str, Any]] = {}
    waiting = dict(ends)
    while waiting and time.monotonic() < until:
        for end in wait(list(waiting), timeout=max(0.0, until - time.monotonic())):
            rank = waiting.pop(end)  # type: ignore[call-overload]
            try:
                found[rank] = end.recv()  # type: ignore[union-attr]
            except EOFError:
                found[rank] = ("ended", "without a result")
        if any(kind == "raised" for kind, _ in found.values()):
            until = min(until, time.monotonic() + 2)  # the others may wait for it for ever
    return found | dict.fromkeys(waiting.values(), ("was not done", "and its time was up"))


def _work(
    end: Connection,
    log: Path,
    variables: Mapping[str, str],
    seconds: float,
    work: Callable[..., Any],
    given: Sequence[Any],
) -> None:
    _become(log, variables, None)
    # and goes on: the first one to end would have the others say that it is gone, not where they wait
    faulthandler.dump_traceback_later(seconds, file=sys.__stderr__)
    try:
        end.send(("returned", pickle.dumps(work(*given))))
    except BaseException as error:
        traceback.print_exc()
        end.send(("raised", f"{type(error).__name__}: {error}"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a process group with a rank gone would be waited for


class Command:
    """A command that runs: its process, and its output in a file."""

    def __init__(self, process: Any, log: Path) -> None:
        self.process, self.log = process, log

    @property
    def pid(self) -> int:
        """Of the process, which leads a group of its own."""
        return int(self.process.pid)

    def output(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until it has written something."""
        end = time.monotonic() + seconds
        while text not in self.output():
            if self.process.exitcode is not None or time.monotonic() > end:
                self.kill()
                raise RankError(f"The command did not write {text!r}.\n{self.output()[-6000:]}")
            time.sleep(0.02)

    def wait(self, seconds: float = 120) -> int:
        """Wait for its end, and return its exit status, minus the signal if one ended it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            os.kill(self.pid, signal.SIGABRT)  # faulthandler writes where it is
            self.process.join(5)
            self.kill()
            raise RankError(f"The command was not done in {seconds} seconds.\n{self.output()[-6000:]}")
        return int(self.process.exitcode)

    def kill(self) -> None:
        """End it and all that it has started, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.join()


def command(
    words: Sequence[str],
    *,
    log: Path,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    before: Callable[..., Any] | None = None,
    given: Sequence[Any] = (),
) -> Command:
    """Start `lit-dpo` with these words, as a shell would.

    Args:
        words: after the command's name.
        log: what it writes on both outputs.
        cwd: its working directory.
        environment: all of its variables; by default this process's.
        before: called in the new process first, with `given`.
        given: arguments of `before`.
    """
    variables = dict(os.environ if environment is None else environment)
    process = _SERVER.Process(target=_command, args=(list(words), log, variables, cwd, before, given))
    _start(process)
    return Command(process, log)


def _command(
    words: Sequence[str],
    log: Path,
    variables: Mapping[str, str],
    cwd: Path | None,
    before: Callable[..., Any] | None,
    given: Sequence[Any],
) -> NoReturn:
    os.setsid()
    _become(log, variables, cwd)
    faulthandler.enable(sys.__stderr__)
    from lit_dpo.cli import main

    sys.argv = ["lit-dpo", *words]
    if before is not None:
        before(*given)
    status = 0
    try:
        main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.exit(status)  # what is to be done at the end of a process is done


def _become(log: Path, variables: Mapping[str, str], cwd: Path | None) -> None:
    """Take over an environment, a directory, and a file for what is written; and default signals."""
    multiprocessing.set_start_method(None, force=True)  # the system's, not that of this server
    os.environ.clear()
    os.environ.update(variables)
    if cwd is not None:
        os.chdir(cwd)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for output in (1, 2):
        os.dup2(file, output)
    os.close(file)
    multiprocessing.set_start_method("fork", force=True)  # of its own children, not the one by which it came
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
