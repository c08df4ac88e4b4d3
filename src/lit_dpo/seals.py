"""Whether what is in a cache is what was put there: keyed digests of content.

A digest's key is made of what the content belongs to (a model, a data set, the code), so that a damaged file, and one
that belongs to something else, are both found. It has no secret in it by default: whoever can write to a cache, and
knows this file, can make both content and digest. Who shares a cache with others sets `LIT_DPO_CACHE_KEY` to a file
that those who may write have, and nobody else reads.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lit_dpo.errors import TrainingError
from lit_dpo.writing import written_whole

log = logging.getLogger(__name__)
_VARIABLE = "LIT_DPO_CACHE_KEY"
_PIECE = 1 << 20


def key_of(belongs: str) -> bytes:
    """Make the key, 32 bytes, of digests of what belongs to something.

    Args:
        belongs: says what; equal texts have equal keys, where the secret is the same.

    Raises:
        TrainingError: for a file of a secret that is not there, too short, or open to others.
    """
    return hashlib.blake2b(belongs.encode(), key=_secret(), digest_size=32).digest()


def is_sealed(files: Sequence[Path], belongs: str) -> bool:
    """Whether files are there as they were sealed; if they have changed a line says so.

    About a second per gigabyte. Files without a seal, as a kill may leave them, are not sealed.

    Args:
        files: all that were sealed together; the first one has the seal next to it.
        belongs: what was said when they were.
    """
    try:
        there = _seal(files[0]).read_text(encoding="ascii").strip()
        found = _digest(files, belongs)
    except (OSError, UnicodeDecodeError):
        return False
    if hmac.compare_digest(there, found):
        return True
    log.warning("%s is not what was written there; it is made again.", files[0])
    return False


def seal(files: Sequence[Path], belongs: str) -> None:
    """Seal files that have been written; where that cannot be done they are made again the next time.

    Args:
        files: all that belong together.
        belongs: says what their content depends on.
    """
    with suppress(OSError), written_whole(_seal(files[0])) as temporary:
        temporary.write_text(_digest(files, belongs), encoding="ascii")


def _seal(file: Path) -> Path:
    return file.with_name(f"{file.name}.seal")


def _digest(files: Sequence[Path], belongs: str) -> str:
    digest = hashlib.blake2b(key=key_of(belongs), digest_size=32)
    for file in files:
        digest.update(file.stat().st_size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            while piece := stream.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()


def _secret() -> bytes:
    if not (named := os.environ.get(_VARIABLE)):
        return b""
    path = Path(named).expanduser()
    try:
        content, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        raise TrainingError(
            f"Expected the key of caches at {path}, as {_VARIABLE} says, but {error.strerror}."
        ) from error
    if len(content) < 16:
        raise TrainingError(
            f"Expected 16 bytes or more in {path}, the key of caches, but it has {len(content)}: "
            f"`head -c 32 /dev/urandom > {path}` makes one."
        )
    if os.name == "posix" and mode & stat.S_IRWXO:
        raise TrainingError(f"Expected {path}, the key of caches, to be closed to others: `chmod o= {path}`.")
    return hashlib.blake2b(content, digest_size=32).digest()
