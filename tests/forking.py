"""The server that `ranks.py` forks from is itself forked, from the process of the tests: it has imported everything.

`multiprocessing`'s fork server starts an interpreter of its own, and that imports for eight seconds. Its loop is a
function, which a forked process can run as well.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
from multiprocessing import connection, forkserver
from typing import NoReturn


def serve() -> None:
    """Fork the server, before the first test runs: nothing is started yet, and all that tests import is there."""
    ours = forkserver._forkserver
    if ours._forkserver_pid is not None:
        return
    with socket.socket(socket.AF_UNIX) as listener:
        address = connection.arbitrary_address("AF_UNIX")
        listener.bind(address)
        listener.listen()
        ends, stays = os.pipe()  # the server ends where nobody holds the second one any more
        process = os.fork()
        if process == 0:
            os.close(stays)
            _loop(listener.detach(), ends)
        os.close(ends)
    ours._forkserver_address, ours._forkserver_alive_fd, ours._forkserver_pid = address, stays, process


def _loop(listener: int, ends: int) -> NoReturn:
    status = 1
    try:
        # the tests' are pytest's, which captures them
        sys.stdin = open(os.devnull)  # noqa: SIM115
        sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(  # noqa: SIM115
            2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
        )
        # a library's has taken pytest's output when it was imported
        for logger in [logging.getLogger(), *logging.getLogger().manager.loggerDict.values()]:
            for handler in getattr(logger, "handlers", ()):
                if type(handler) is logging.StreamHandler:
                    handler.setStream(sys.stderr)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        gc.freeze()
        forkserver.main(listener, ends, ["preloaded"])
    except SystemExit:
        status = 0
    finally:
        os._exit(status)
