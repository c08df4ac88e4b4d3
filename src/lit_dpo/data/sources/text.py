"""Lines of text files: decompressed, and decoded as it is declared."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lit_dpo.errors import DataError

_SURROGATE = re.compile(r"[\ud800-\udfff]")
# What is offered, and never guessed: a text can be decoded by several of these, and reads well in one.
_ENCODINGS = ("cp1252", "cp1250", "cp1251", "gb18030", "cp932", "cp949", "big5")


def _zstandard(path: Path) -> Any:
    import pyarrow as pa  # Python has a reader of its own from 3.14 on

    return pa.input_stream(str(path), compression="zstd")


# Each says if the file ends too early.
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".zst": _zstandard, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSIONS = tuple(_OPENERS)
_ARCHIVES = (".tgz", ".7z", ".rar", ".lz4")  # that do not say how long their contents are, but for `.tar.…`


LONGEST_LINE = 1 << 27
"""Characters of one line, which is in memory several times while it is read."""

_MUCH = 1 << 25  # bytes: what is less than this may come of any file
_MOST_BLANK = 1_000_000  # lines in a row, which cost time and hold nothing
_MOST_TIMES = {False: 100, True: 20}  # as long as it was, by whether the whole of it is in memory while it is read


class _Unpacked(io.RawIOBase):
    """The bytes of a compressed file, of which only so many come as any text compresses to."""

    def __init__(self, file: Any, path: Path) -> None:
        self.file, self.path, self.count = file, path, 0
        self.times = _MOST_TIMES[".json" in path.suffixes]
        self.most = max(_MUCH, self.times * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self.file.read(len(buffer))
        buffer[: len(content)] = content
        self.count += len(content)
        if self.count > self.most:
            raise DataError(_unpacks(self.path, self.times))
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()


def lines_of(path: Path, encoding: str | None, newline: str) -> Iterator[str]:
    """Read a file line by line; bytes that are no text stay in it as lone surrogates, which `flaw` finds.

    Args:
        path: of the file, whose suffix says if it is compressed.
        encoding: of a file that is not UTF-8, and whose first bytes do not say that it is UTF-16 or UTF-32.
        newline: as of `open`.

    Raises:
        DataError: for an unknown encoding, a damaged file, and one whose text is mostly in another encoding.
    """
    found = encoding
    try:
        found = _encoding(path, encoding)
        with _bytes(path) as file, io.TextIOWrapper(file, found, errors="surrogateescape", newline=newline) as text:
            yield from _watched(path, _limited(path, text), found.removesuffix("-sig").upper())
    except LookupError:
        raise DataError(f"Expected an encoding that Python knows, such as `cp1252`, but got `{encoding}`.") from None
    except UnicodeError as error:
        raise DataError(f"`{path}` is no {found}: {error}.") from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        why = "is damaged, or not what its name says" if path.suffix.lower() in COMPRESSIONS else "cannot be read"
        raise DataError(f"`{path}` {why}: {error}.") from error


def _bytes(path: Path) -> io.BufferedReader:
    if (opener := _OPENERS.get(path.suffix.lower())) is None:
        return path.open("rb")
    return io.BufferedReader(_Unpacked(opener(path), path), 1 << 16)


def check_packed(path: Path, *, whole: bool) -> None:
    """See that a file which another library unpacks becomes no longer than a text does.

    Args:
        path: of any file; one that is not packed is fine.
        whole: read a compressed text to its end for that; of an archive its list of contents is enough.

    Raises:
        DataError: for one that does, or that is damaged, and for archives that cannot be asked.
    """
    suffix = path.suffix.lower()
    if suffix in _ARCHIVES or (".tar" in path.suffixes and suffix != ".tar"):
        raise DataError(f"Expected files that are not in an archive but got `{path}`: unpack it.")
    try:
        if suffix == ".zip":
            with zipfile.ZipFile(path) as packed:  # nobody reads more of an entry than the list says
                length = sum(one.file_size for one in packed.infolist())
            if length > max(_MUCH, _MOST_TIMES[False] * path.stat().st_size):
                raise DataError(_unpacks(path, _MOST_TIMES[False]))
        elif whole and suffix in _OPENERS:
            with _bytes(path) as file:
                while file.read(1 << 20):
                    pass
    except (EOFError, OSError, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"`{path}` is damaged, or not what its name says: {error}.") from error


def _unpacks(path: Path, times: int) -> str:
    return (
        f"`{path}` unpacks to more than {times} times its size, as no text does; unpack it yourself if it is meant to."
    )


def _encoding(path: Path, given: str | None) -> str:
    with _bytes(path) as file:
        found = json.detect_encoding(file.peek(4)[:4])  # by a mark, or by the zeros of ASCII
        if found != "utf-8" or given is None:
            return found
        codecs.lookup(given)
        decoder = codecs.getincrementaldecoder(found)()
        try:
            while some := file.read(1 << 20):
                decoder.decode(some)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return given
    return found


def _limited(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    number = blank = 0
    while line := text.readline(LONGEST_LINE + 1):
        number, blank = number + 1, 0 if len(line) > 2 else blank + 1
        if blank > _MOST_BLANK:
            raise DataError(f"`{path}`, line {number}: Expected rows but there are {blank} empty lines in a row.")
        if len(line) > LONGEST_LINE:
            raise DataError(f"`{path}`, line {number}: Expected at most {LONGEST_LINE} characters in a line.")
        yield line


def _watched(path: Path, lines: Iterable[str], encoding: str) -> Iterator[str]:
    right, wrong, first = 0, 0, (0, "")
    for number, line in enumerate(lines, 1):
        if not line.isascii():
            if flaw(line) is None:
                right += 1
            else:
                first = first if wrong else (number, line)
                wrong += 1
        yield line
    if wrong > right:
        raise DataError(f"`{path}` is no {encoding}. {_readings(*first)}")


def flaw(text: str) -> int | None:
    """Find the first character that is none: a byte that could not be decoded, or half of a pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def legible(text: str) -> str:
    r"""Write bytes that could not be decoded as `\xe9`, halves of characters as `\ud83d`."""
    return _SURROGATE.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code < 0xDD00 else f"\\u{code:04x}"


def _readings(number: int, line: str) -> str:
    start = flaw(line) or 0
    some = line[max(0, start - 20) : start + 40].strip("\n\r").encode("utf-8", "surrogateescape")
    found: dict[str, str] = {}
    for encoding in _ENCODINGS:
        text = some.decode(encoding, "replace")
        if "\ufffd" not in text[:-1]:  # the last one may be cut
            found.setdefault(text, encoding)
    readings = "".join(f"\n  {encoding}: {text}" for text, encoding in found.items())
    return f"Name its encoding with `--data.encoding`, the one in which line {number} reads well:{readings}"
