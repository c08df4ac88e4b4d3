"""Log-probs of completions on disk: what `CachedReference` remembers, and how it survives kills, ranks and bad disks.

A folder holds parts. Every process that has something to add writes a part of its own, two files that only grow:
`*.logps`, float32 values, and `*.index`, one `_ENTRY` per completion, written after its values. So processes never
write the same file, one that is killed leaves at worst values without an entry, and whatever is torn or has changed is
found, counts as missing, and is computed again. A torn entry shows by its checksum; values by a digest that is keyed by
the reference that computed them, and of their own key too: a record of another model, or of other tokens, in their
place is found as a changed bit is. Values are read, not mapped: a mapped file that is cut short ends the process that
reads it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import uuid
import zlib
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

_ENTRY = np.dtype(
    [
        ("key", "V16"),  # `CompletionBatch.keys`: 128 bits of BLAKE2b over the prompt's length and token ids
        ("offset", "<u8"),  # of the first value, in bytes
        ("length", "<u4"),  # values
        ("digest", "V16"),  # 128 bits of BLAKE2b, keyed, over the key and the values
        ("own_checksum", "<u4"),  # CRC-32 of this entry up to here
    ]
)
_OWN = _ENTRY.itemsize - 4  # bytes that `own_checksum` is of
_REREAD_SHARE = 0.05  # of the time at most goes into looking for what other processes have added

Values: TypeAlias = NDArray[np.float32]


class LogpStore:
    """Values by key, in a folder that several processes and runs may share.

    Args:
        folder: made when something is written.
        seal: the key of digests, up to 64 bytes: `lit_dpo.seals.key_of` what computed the values.
    """

    def __init__(self, folder: Path, seal: bytes = b"") -> None:
        self.folder, self._seal = folder, seal
        self.damaged = 0
        self._parts: list[Path] = []
        self._seen: dict[Path, int] = {}  # entries read of each part
        self._entries = np.zeros(0, _ENTRY)
        self._part_of = np.zeros(0, np.int32)
        self._order = np.zeros(0, np.int64)
        self._sorted = np.zeros(0, np.uint64)
        self._fresh: dict[bytes, Values] = {}  # of this process, since the folder was last read
        self._readers: dict[Path, BinaryIO] = {}
        self._writers: tuple[BinaryIO, BinaryIO] | None = None
        self._cost, self._last = 0.0, 0.0
        self.refresh()

    def __len__(self) -> int:
        return len(self._entries) + len(self._fresh)

    def get(self, key: bytes) -> Values | None:
        """Return the values, verified; None if there are none."""
        found = self._get(key)
        if found is None and time.perf_counter() - self._last > self._cost / _REREAD_SHARE and self.refresh():
            found = self._get(key)
        return found

    def put(self, completions: dict[bytes, Values]) -> None:
        """Add values. What was there under the same keys is no longer found."""
        if not completions:
            return
        values, index = self._part()
        offset, entries = values.tell(), np.zeros(len(completions), _ENTRY)
        content = []
        for entry, (key, one) in zip(entries, completions.items(), strict=True):
            piece = one.astype("<f4").tobytes()
            entry["key"], entry["offset"], entry["length"] = np.void(key), offset, len(one)
            entry["digest"] = np.void(self._digest(key, piece))
            entry["own_checksum"] = zlib.crc32(entry.tobytes()[:_OWN])
            content.append(piece)
            offset += len(piece)
        # values first: a kill in between leaves no entry without its values
        _write(values, b"".join(content))
        _write(index, entries.tobytes())
        self._fresh |= completions
        # sorting costs the whole index: once per quarter of it, so that a run's cost stays in proportion
        if len(self._fresh) > max(4096, len(self._entries) // 4):
            self.refresh()

    def refresh(self) -> bool:
        """Read what was added to the folder since it was last read; whether there was anything."""
        start = time.perf_counter()
        new = [(path, self._new_entries(path)) for path in sorted(self.folder.glob("*.index"))]
        new = [(path, entries) for path, entries in new if len(entries)]
        for path, entries in new:
            if path not in self._parts:
                self._parts.append(path)
            number = np.full(len(entries), self._parts.index(path), np.int32)
            self._entries = np.concatenate([self._entries, entries])
            self._part_of = np.concatenate([self._part_of, number])
        if new:
            # half of a key, to search by; the sort is stable, so that of equal ones the last that was read is last
            heads = np.ascontiguousarray(self._entries["key"]).view(np.uint64)[::2]
            self._order = np.argsort(heads, kind="stable")
            self._sorted = heads[self._order]
        self._fresh = {}  # its own part was read above too
        self._last = time.perf_counter()
        self._cost = self._last - start
        return bool(new)

    def _get(self, key: bytes) -> Values | None:
        if (fresh := self._fresh.get(key)) is not None:
            return fresh
        head = np.frombuffer(key, np.uint64)[0]
        first, last = (int(np.searchsorted(self._sorted, head, side)) for side in ("left", "right"))
        for place in self._order[first:last][::-1]:  # the newest first
            if self._entries["key"][place].tobytes() == key:
                found = self._read(self._parts[self._part_of[place]], self._entries[place])
                if found is not None:
                    return found
        return None

    def _read(self, index: Path, entry: Any) -> Values | None:
        size = 4 * int(entry["length"])
        try:
            if index not in self._readers:
                self._readers[index] = index.with_suffix(".logps").open("rb", buffering=0)
            self._readers[index].seek(int(entry["offset"]))
            content = self._readers[index].read(size) or b""
        except OSError:
            content = b""
        key, digest = entry["key"].tobytes(), entry["digest"].tobytes()
        if len(content) != size or self._digest(key, content) != digest:
            self._damage(1, index)
            return None
        return np.frombuffer(content, "<f4")

    def _digest(self, key: bytes, values: bytes) -> bytes:
        return hashlib.blake2b(key + values, key=self._seal, digest_size=16).digest()

    def _new_entries(self, path: Path) -> NDArray[Any]:
        seen = self._seen.get(path, 0)
        try:
            with path.open("rb") as stream:
                stream.seek(seen * _ENTRY.itemsize)
                content = stream.read()
        except OSError:  # another's, or no file at all
            self._damage(1, path)
            return self._entries[:0]
        # an entry that is still being written is read the next time
        entries = np.frombuffer(content[: len(content) // _ENTRY.itemsize * _ENTRY.itemsize], _ENTRY)
        self._seen[path] = seen + len(entries)  # damaged ones too, or they would be reported each time
        starts = range(0, len(entries) * _ENTRY.itemsize, _ENTRY.itemsize)
        sums = np.array([zlib.crc32(content[start : start + _OWN]) for start in starts], np.uint32)
        whole = sums == entries["own_checksum"]
        if not whole.all():
            self._damage(int((~whole).sum()), path)
        good: NDArray[Any] = entries[whole]
        return good

    def _damage(self, count: int, path: Path) -> None:
        if not self.damaged:
            log.warning("%s is damaged; what it held is computed again.", path.with_suffix(".logps"))
        self.damaged += count

    def _part(self) -> tuple[BinaryIO, BinaryIO]:
        """Return the files to write to; new ones if somebody has removed those that there were."""
        if self._writers is None:
            return self._open_part()
        if all(os.fstat(file.fileno()).st_nlink for file in self._writers):
            return self._writers
        log.warning("Files of %s were removed while it was in use; what they held is computed again.", self.folder)
        for file in self._writers:
            file.close()
        return self._open_part()

    def _open_part(self) -> tuple[BinaryIO, BinaryIO]:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:12]}"
        # unbuffered: what was written is in the file even if the process is killed next
        values, index = (part.with_suffix(suffix).open("ab", buffering=0) for suffix in (".logps", ".index"))
        self._writers = (values, index)
        return self._writers


def _write(file: BinaryIO, content: bytes) -> None:
    """Write all of it: an unbuffered file may take a part, on a disk that is nearly full, and say so in a number."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) or 0 :]
