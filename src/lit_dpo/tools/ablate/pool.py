"""Processes that make runs, and the threads that talk to them. One that dies costs what it was doing, and no more."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from lit_dpo.tools.ablate.single import Work

log = logging.getLogger(__name__)

_PATIENCE = 60.0
"""Seconds that a run has to write its checkpoint when everything stops."""


class _DiedError(Exception):
    """A worker, before it answered."""


class _Worker:
    """A process of `lit_dpo.tools.ablate.worker`."""

    def __init__(self, place: int, jobs: int, keep_open: Sequence[int]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lit_dpo.tools.ablate.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(place, jobs),
            pass_fds=tuple(keep_open),
        )

    def do(self, work: Work) -> str:
        """Have it done; an error, or nothing."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(work.to_json().encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = b""
        if not line:
            raise _DiedError(_said(self.process.wait()))
        return str(json.loads(line)["error"])

    def let_go(self) -> None:
        """Tell it that there is no more work."""
        with suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()


class Pool:
    """So many workers, started when there is work for them.

    Args:
        jobs: how many.
        keep_open: descriptors of files that stay open as long as any of them lives.
    """

    def __init__(self, jobs: int, keep_open: Sequence[int] = ()) -> None:
        self.jobs, self._keep_open = jobs, keep_open
        self._workers: list[_Worker | None] = [None] * jobs
        self._stopping = False

    def do(self, works: Sequence[Work], done: Callable[[Work, str], None]) -> None:
        """Have all of it done; `done` is told of each, with an error or nothing, one at a time."""
        todo: queue.SimpleQueue[Work] = queue.SimpleQueue()
        for work in works:
            todo.put(work)
        one_at_a_time = threading.Lock()

        def told(work: Work, error: str) -> None:
            with one_at_a_time:
                done(work, error)

        count = min(self.jobs, len(works))
        threads = [threading.Thread(target=self._serve, args=(n, todo, told), daemon=True) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # in pieces, so that signals come through
                thread.join(0.2)

    def _serve(self, place: int, todo: queue.SimpleQueue[Work], done: Callable[[Work, str], None]) -> None:
        while not self._stopping:
            try:
                work = todo.get_nowait()
            except queue.Empty:
                return
            error = self._tried(place, work)
            if error is not None:
                done(work, error)

    def _tried(self, place: int, work: Work) -> str | None:
        """Have it done, once more in another process if the first one dies; None if everything stops."""
        deaths: list[str] = []
        while len(deaths) < 2:
            worker = self._workers[place]
            if worker is None:
                worker = self._workers[place] = _Worker(place, self.jobs, self._keep_open)
            try:
                return worker.do(work)
            except _DiedError as death:
                self._workers[place] = None
                if self._stopping:
                    return None
                deaths.append(str(death))
                if len(deaths) == 1:
                    log.warning("%s: its process %s; it is tried once more.", work.asked.name, death)
        return f"its process {deaths[-1]}, twice."

    def stop(self) -> None:
        """Stop everything: runs write a checkpoint, or are killed after a minute."""
        self._stopping = True
        there = [worker.process for worker in self._workers if worker is not None]
        for process in there:
            process.terminate()
        try:
            for process in there:
                process.wait(_PATIENCE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            for process in there:
                process.kill()

    def close(self) -> None:
        """Let the workers end, which have nothing to do any more."""
        there = [worker for worker in self._workers if worker is not None]
        for worker in there:
            worker.let_go()
        for worker in there:
            try:
                worker.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                worker.process.kill()


@contextmanager
def pool(jobs: int, keep_open: Sequence[int] = ()) -> Iterator[Pool]:
    """Have workers; whatever happens, none is left. SIGTERM stops them as Ctrl-C does."""
    found = Pool(jobs, keep_open)
    try:
        with _sigterm_raises():
            yield found
    except BaseException:
        found.stop()
        raise
    found.close()


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Raise SystemExit, with the status that a shell says."""

    def end(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def gpus() -> list[str]:
    """Name the GPUs that may be used, as CUDA_VISIBLE_DEVICES does. No context is opened on any."""
    import torch

    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [one for one in given.split(",") if one.strip() not in ("", "-1")] if torch.cuda.device_count() else []
    return [str(number) for number in range(torch.cuda.device_count())]


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment(place: int, jobs: int) -> dict[str, str]:
    """One GPU for each worker, in turn; of the cores an equal part, unless the user has said how many threads."""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(one for one in sys.path if one)}
    if there := gpus():
        found["CUDA_VISIBLE_DEVICES"] = there[place % len(there)]
    found.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    found.setdefault("TOKENIZERS_PARALLELISM", "false")
    return found


def _said(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    return f"was killed by {name}" + (" (was there too little memory?)" if name == "SIGKILL" else "")
