"""Processes that collate batches: who may stop them."""

from __future__ import annotations

import os
import signal
import threading


def stopped_by_the_run_alone(worker: int) -> None:
    """Let signals that are sent to all processes of a run pass by its loaders' workers.

    A batch system, a container or Ctrl-C stops a run so. The run then writes a checkpoint, and needs nothing less than
    the news that its workers were killed, which torch raises wherever it is. They end with it.

    Args:
        worker: its number, which says nothing here.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    # `terminate` of the run itself, as torch calls it where a worker does not end by itself
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
