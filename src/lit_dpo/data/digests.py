"""What cached rows depend on: the bytes that were read, and the code that read them."""

from __future__ import annotations

import functools
import hashlib
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

_VERSIONS = ("datasets", "pyarrow", "tokenizers", "transformers")
_EMPTY = types.CellType()


def content_digest(files: Iterable[Path]) -> str:
    """Of every byte of some files, in order, about a tenth of a second per gigabyte.

    Paths and times do not count: `rsync -t` and `cp -p` put other bytes under the same ones. Nobody gains by making a
    file that collides with another, which a slower digest would be for.
    """
    import xxhash

    digest = hashlib.blake2b(digest_size=20)
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, xxhash.xxh3_128).digest())
    return digest.hexdigest()


def code_digest(*things: Any, own: Sequence[type] = ()) -> str:
    """Of functions and classes as they are loaded, with all that they use; of libraries the versions alone.

    It is the compiled code, not a file's text, that counts: a file may have been edited since it was imported, and a
    notebook has none. What code reads from elsewhere (a file, the network) is not seen.

    Args:
        things: functions and classes.
        own: classes whose package is read too, even if it is installed as a library is.
    """
    walk = _Walk({"lit_dpo", "__main__", *(one.__module__.partition(".")[0] for one in own)})
    lines = [*map(version, _VERSIONS), *(line for thing in (*things, *own) for line in walk.lines(thing))]
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()


class _Walk:
    """Lines that are equal for equal code, in any process; what was seen gives none the second time."""

    def __init__(self, own: set[str]) -> None:
        self.libraries = _libraries() - own
        self.seen: dict[int, Any] = {}  # kept, so that no other thing gets its id

    def lines(self, thing: object) -> list[str]:
        found: list[str] = []
        self._add(thing, found.append)
        return found

    def _add(self, thing: object, add: Callable[[str], None]) -> None:
        if isinstance(thing, str | bytes | int | float | complex | None):
            add(repr(thing))
        elif isinstance(thing, re.Pattern):  # its repr is cut
            add(f"{thing.pattern!r} {thing.flags}")
        elif id(thing) not in self.seen:
            self.seen[id(thing)] = thing
            self._inside(thing, add)

    def _all(self, things: Iterable[Any], add: Callable[[str], None]) -> None:
        for thing in things:
            self._add(thing, add)

    def _inside(self, thing: object, add: Callable[[str], None]) -> None:
        if isinstance(thing, types.CodeType):
            add(_code(thing))
        elif isinstance(thing, set | frozenset):  # in an order of their own in each process
            found: list[str] = []
            self._all(thing, found.append)
            for line in sorted(found):
                add(line)
        elif isinstance(thing, Mapping):
            self._all((one for item in thing.items() for one in item), add)
        elif isinstance(thing, list | tuple):
            self._all(thing, add)
        elif not isinstance(thing, types.FunctionType | type) and (inner := _unwrapped(thing)):
            add(type(thing).__qualname__)
            self._all(inner, add)
        elif self._of_a_library(thing):
            add(f"{thing.__module__} {getattr(thing, '__qualname__', type(thing).__qualname__)}")
        elif isinstance(thing, types.FunctionType):
            self._function(thing, add)
        elif isinstance(thing, type):
            add(thing.__qualname__)
            for name, value in vars(thing).items():
                if callable(value) or _unwrapped(value) or not name.startswith("__"):
                    add(name)
                    self._add(value, add)
            self._all(thing.__bases__, add)
        else:
            self._all((type(thing), getattr(thing, "__dict__", None)), add)

    def _function(self, thing: types.FunctionType, add: Callable[[str], None]) -> None:
        self._all((thing.__code__, thing.__defaults__, thing.__kwdefaults__), add)
        self._all((cell.cell_contents for cell in thing.__closure__ or () if cell != _EMPTY), add)
        names = _names(thing.__code__)
        for name in names:
            value = thing.__globals__.get(name)
            if not isinstance(value, types.ModuleType):
                add(name)
                self._add(value, add)
            elif not self._is_library(value.__name__):  # `helpers.clean(…)`: both names are there
                self._all((getattr(value, inner, None) for inner in names), add)

    def _of_a_library(self, thing: object) -> bool:
        name = getattr(thing, "__module__", None)
        return isinstance(name, str) and self._is_library(name)

    def _is_library(self, module: str) -> bool:
        return module.partition(".")[0] in self.libraries


@functools.lru_cache(maxsize=4096)
def _code(code: types.CodeType) -> str:
    """Say what a function's code and that within it do; it cannot change, so that it is said once in a process."""
    lines = [f"{code.co_code!r} {code.co_names} {code.co_varnames}"]
    for constant in code.co_consts:  # each by itself: whether two equal ones are one object differs between processes
        lines += [_code(constant)] if isinstance(constant, types.CodeType) else _Walk(set()).lines(constant)
    return "\n".join(lines)


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """List in order what a function's code and that within it name."""
    inner = (one for one in code.co_consts if isinstance(one, types.CodeType))
    return tuple(sorted({*code.co_names}.union(*map(_names, inner))))


def _unwrapped(thing: object) -> list[Any]:
    """Find the functions behind a property, a static or cached one, a partial."""
    found = [getattr(thing, name, None) for name in ("fget", "__func__", "func", "__wrapped__")]
    if isinstance(thing, functools.partial):
        found += [thing.args, thing.keywords]
    return [one for one in found if one is not None]


@functools.cache
def version(name: str) -> str:
    """Return the version of an installed library; its metadata are read once in a process."""
    return metadata.version(name)


@functools.cache
def _libraries() -> frozenset[str]:
    """List the names of what lies where packages are installed, and of what comes with Python."""
    folders = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    installed = (path.name.partition(".")[0] for folder in folders if folder.is_dir() for path in folder.iterdir())
    return frozenset({"builtins", *sys.stdlib_module_names, *installed})
