"""While weights are read, memory that is freed goes back to the system."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

# <malloc.h> of glibc
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 32 * 2**20  # where glibc's own, moving threshold ends
_SMALL = 2**17  # where it starts


@contextmanager
def returned_at_once() -> Iterator[None]:
    """Let tensors of 128 KiB and more have mappings of their own, which end with them.

    glibc moves its threshold for that up to 32 MiB as such tensors are freed. Then the passing float32 copies of
    weights and the packed weights that stay lie side by side in one heap, and no page of it can go: OPT-350m in 4 bits
    left 1.1 GiB where 0.3 are in use. Afterwards the threshold is where it would have moved to, because activations,
    which come and go in every step, are faster from a heap.

    Does nothing under another C library, or where `MALLOC_…` variables say what is wanted.
    """
    libc = None if any(name.startswith("MALLOC_") for name in os.environ) else _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _SMALL)
    libc.mallopt(_TRIM_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    return libc if hasattr(libc, "gnu_get_libc_version") else None
