"""What a process has of memory, and how it is told that there is no more."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import torch
from lightning.pytorch.utilities.memory import is_oom_error

_GIB = 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the system refused memory, whichever library says it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or is_oom_error(error)


def in_use(device: torch.device) -> str:
    """Say in a sentence what of a device's memory, or of the system's, is in use and what is left."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (
            f"The GPU has {total / _GIB:.2f} GiB: {torch.cuda.memory_allocated(device) / _GIB:.2f} in tensors (at most "
            f"{torch.cuda.max_memory_allocated(device) / _GIB:.2f}), "
            f"{torch.cuda.memory_reserved(device) / _GIB:.2f} held by this process, {free / _GIB:.2f} free."
        )
    parts = []
    if resident := _kibibytes("/proc/self/status", "VmRSS"):
        parts.append(f"this process has {resident / 2**20:.2f} GiB of memory")
    if (limit := _limit()) is not None and (size := _kibibytes("/proc/self/status", "VmSize")):
        parts.append(f"{size / 2**20:.2f} of the {limit / _GIB:.2f} GiB of addresses that it may have (`ulimit -v`)")
    if (available := _kibibytes("/proc/meminfo", "MemAvailable")) is not None:
        parts.append(f"the system has {available / 2**20:.2f} GiB left")
    said = ", ".join(parts)
    return f"{said[:1].upper()}{said[1:]}." if said else ""


def _limit() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _kibibytes(file: str, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path(file).read_text(encoding="ascii"), re.MULTILINE)
    except OSError:  # not Linux
        return None
    return int(found.group(1)) if found else None
