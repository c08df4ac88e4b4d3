"""Processes that make runs: none is left, whatever happens to them or to the command."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

from lit_dpo.tools.ablate import pool as pools
from lit_dpo.tools.ablate.pool import Pool, _DiedError, _environment, _said, _Worker, cores, gpus, pool
from lit_dpo.tools.ablate.records import Asked
from lit_dpo.tools.ablate.single import Work

ONE = Work(Asked("one", {}, 1, []), [], {}, "dpo", "nowhere", 0, None)


def test_a_worker_that_died_is_said_with_what_killed_it():
    """Killed before it reads what is asked; here before it has imported anything."""
    worker = _Worker(0, 1, ())
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(_DiedError, match=r"was killed by SIGKILL \(was there too little memory\?\)"):
        worker.do(ONE)
    worker.let_go()
    assert _said(3) == "ended with status 3"
    assert _said(-signal.SIGSEGV) == "was killed by SIGSEGV"


def test_sigterm_to_the_command_ends_its_workers_and_says_nothing_of_their_work():
    told: list[Any] = []
    seen: list[_Worker] = []
    before = signal.getsignal(signal.SIGTERM)

    def signalled(workers: Pool) -> None:
        while (worker := workers._workers[0]) is None:
            time.sleep(0.01)
        seen.append(worker)
        os.kill(os.getpid(), signal.SIGTERM)

    def work() -> None:
        with pool(1) as workers:
            threading.Thread(target=signalled, args=(workers,), daemon=True).start()
            workers.do([ONE], lambda *one: told.append(one))

    with pytest.raises(SystemExit) as stopped:
        work()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert seen[0].process.wait() == -signal.SIGTERM
    assert told == []


@pytest.mark.parametrize("end", ["stop", "close"])
def test_a_worker_that_hangs_is_killed_after_a_while(end, monkeypatch):
    """It neither ends when it is told to, nor sees that there is no more work."""
    monkeypatch.setattr(pools, "_PATIENCE", 0.05)
    found = Pool(2)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as it is then in the process that is started
    worker = found._workers[0] = _Worker(0, 1, ())
    signal.signal(signal.SIGTERM, before)
    os.kill(worker.process.pid, signal.SIGSTOP)
    getattr(found, end)()
    assert worker.process.wait() == -signal.SIGKILL


def test_in_a_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def inside() -> None:
        with pool(1):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


def test_each_worker_has_its_gpu_in_turn_and_its_part_of_the_cores(monkeypatch):
    """GPUs are named as CUDA_VISIBLE_DEVICES names them; threads are the user's if the user said how many."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5,-1,")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)  # a machine that has some
    assert gpus() == ["3", "GPU-5"]
    found = [_environment(place, 3) for place in range(3)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["3", "GPU-5", "3"]
    assert found[0]["OMP_NUM_THREADS"] == str(max(1, cores() // 3))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert _environment(0, 3)["OMP_NUM_THREADS"] == "7"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert gpus() == []
