"""Digests of model and adapter directories: the same content has the same digest wherever it lies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from lit_dpo.hub import weight_names

_PIECE = 2**20


def sampled_digest(folder: Path) -> str:
    """Of configuration and weights: sizes, small files whole, evenly spaced samples of large ones. Milliseconds."""
    return _digest((file.name, file.stat().st_size, *_samples(file)) for file in _files(folder))


def whole_digest(folder: Path) -> str:
    """Of every byte of configuration, code and weights, about a second per gigabyte: for what must never be stale."""
    files = [*_files(folder), *sorted(folder.glob("*.py"))]
    stats = [file.stat() for file in files]
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        parts = pool.map(
            _whole, files, (stat.st_size for stat in stats), ((stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)
        )
        return _digest(zip((file.name for file in files), parts, strict=True))


def _files(folder: Path) -> list[Path]:
    named = ["config.json", "adapter_config.json", "adapter_model.safetensors", *weight_names(folder)]
    found = [file for name in named if (file := folder / name).is_file()]
    if any(file.suffix == ".safetensors" for file in found):
        return found
    return [*found, *sorted(folder.glob("*.safetensors"))]


def _digest(parts: Iterator[tuple[object, ...]]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for piece in part:
            digest.update(piece if isinstance(piece, bytes) else str(piece).encode())
    return f"sha256 {digest.hexdigest()[:32]}"


@lru_cache(maxsize=1024)
def _whole(file: Path, size: int, changed: tuple[int, int]) -> bytes:
    """Of one file, remembered for this process as long as its size and time of change stay."""
    digest = hashlib.blake2b()
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.digest()


def _samples(file: Path, parts: int = 64, width: int = 2**16) -> Iterator[bytes]:
    """Evenly spaced pieces of a file: all of a small one, 4 MiB of a large one."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= parts * width:
            yield stream.read()
            return
        for number in range(parts):
            stream.seek(number * (size - width) // (parts - 1))
            yield stream.read(width)
