"""What a hostile file may cost: seconds of this thread and megabytes, measured around what reads it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fuzz import MEGABYTES, SECONDS, _forget, _peak


@contextmanager
def bounded(file_bytes: int = 0) -> Iterator[None]:
    """Within it, no more than 10 seconds of processor time, nor memory than 10 times the file and 500 MB."""
    before, start = _forget(), time.thread_time()
    yield
    assert time.thread_time() - start < SECONDS
    assert _peak() - before < MEGABYTES + 10 * file_bytes / 1e6
