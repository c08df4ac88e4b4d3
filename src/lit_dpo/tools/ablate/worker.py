"""A process that makes runs, one after another: `python -m lit_dpo.tools.ablate.worker`.

Each line that comes in is a `Work`; each line that goes out is what became of it. Where nothing comes any more the
process that asked is gone, and a run that is under way stops as after SIGTERM: with a checkpoint.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import queue
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any


class _Asked(threading.Thread):
    """Reads what is asked, and ends the process when nobody asks any more."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.busy = False

    def run(self) -> None:
        # not `sys.stdin`: at its end the interpreter waits for the lock that a thread holds who reads from it
        with open(os.dup(0), "rb", buffering=0) as stream:
            for line in stream:
                self.lines.put(line)
        self.lines.put(None)
        if self.busy:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Work until there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; whoever asked says what happens
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    asked = _Asked()
    asked.start()
    # of a kernel for inference, from a hub; on some CPUs it is asked for at import
    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    kernels.addFilter(lambda record: "gemm_4bit_forward" not in record.getMessage())
    gc.disable()  # imports make a million objects, and no garbage
    from lit_dpo.policy import shared
    from lit_dpo.tools.ablate.configuring import FitCLI
    from lit_dpo.tools.ablate.records import Layout
    from lit_dpo.tools.ablate.single import Work, do

    gc.freeze()
    gc.enable()
    cli = FitCLI()
    with shared.keeping():
        while (line := asked.lines.get()) is not None:
            asked.busy = True
            work = Work.from_json(line)
            layout = Layout(Path(work.root))
            _print_into((layout.cache if work.is_pass else layout.run(work.asked.name)) / "log.txt")
            error = do(cli, work)
            asked.busy = False
            _answer(answers, {"error": error})


def _print_into(path: Path) -> None:
    """Let all that is printed, by whatever library, go into the run's own file."""
    sys.stdout.flush()
    sys.stderr.flush()
    path.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(number, 1)
    os.dup2(number, 2)
    os.close(number)


def _answer(answers: Any, given: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):
        answers.write(json.dumps(given) + "\n")


if __name__ == "__main__":
    main()
