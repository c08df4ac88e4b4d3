from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Let what only shows or logs fail alone, in a line: it never costs what was trained.

    Interrupts and exits go through. Checks that shall stop a run do not belong in here, nor does what other ranks wait
    for.

    Args:
        name: of what fails.
    """
    try:
        yield
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        log.warning("%s failed, and the run goes on without it: %s: %s", name, type(error).__name__, first)
        log.debug("where it failed", exc_info=True)
