"""Which classes a checkpoint may name: what is there already, and is a strategy. No file says what code is imported.

A module is built again from what its checkpoint says, and that names the classes of policy, loss, reference, optimizer
and schedule by import path. Importing a module runs it, and calling what it holds runs that, so a path is taken from a
file if it is of this package or of a library of optimizers, or if the program that loads has imported it; and if it is
a class of a kind that a module has, or of the same project as the module's own class. What was given to
`load_from_checkpoint` is the caller's, and is not looked at.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from typing import Any

import torch

from lit_dpo.compat import CLASS_PATH, INSTANTIATOR
from lit_dpo.errors import ResumeError

_MOST_PARTS = 100_000
_DEEPEST = 100
_OF_TORCH = (
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.optim.lr_scheduler.ReduceLROnPlateau,
)
_LIBRARIES = ("lit_dpo", "torch.optim", "bitsandbytes.optim", "lightning.pytorch.cli", "transformers.optimization")


class _Blocked(MetaPathFinder):
    """Refuses modules that a file names and that nobody has imported."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names
        self.refused: str | None = None

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname in self.names:
            self.refused = self.names[fullname]
            raise ResumeError(_sentence(self.names[fullname], "which is not imported"))


@contextmanager
def only_known_classes(stored: Mapping[str, Any], cls: type, kinds: tuple[type, ...]) -> Iterator[None]:
    """Within it, nothing is imported because hyper-parameters of a file name it; what they name is looked at first.

    Args:
        stored: hyper-parameters of a checkpoint.
        cls: the class that is asked to load it.
        kinds: of what a module holds, besides optimizers and schedules.

    Raises:
        ResumeError: naming a class that is not taken from a file, and what to do.
    """
    blocked: dict[str, str] = {}
    own, kinds = {_project(cls)}, (*kinds, *_OF_TORCH)
    if isinstance(module := _resolve(str(stored.get(CLASS_PATH, "")))[0], type) and issubclass(module, kinds):
        own.add(_project(module))
    for key, text, is_class in _texts(stored):
        if key == INSTANTIATOR:  # Lightning has a list of its own
            continue
        found, modules = _resolve(text)
        if found is None:
            blocked |= dict.fromkeys(modules, text)
            if is_class:
                raise ResumeError(_sentence(text, "which is not imported"))
        elif (is_class or callable(found)) and not _is_known(found, kinds, own):
            raise ResumeError(_sentence(text, "which is no policy, loss, reference, optimizer or schedule"))
    finder = _Blocked(blocked)
    sys.meta_path.insert(0, finder)
    try:
        yield
    except Exception as error:  # what was refused comes back within an error of the parser
        if finder.refused is not None:
            raise ResumeError(_sentence(finder.refused, "which is not imported")) from None
        if isinstance(error, argparse.ArgumentError):
            raise ResumeError(f"What the checkpoint says of its module does not build one: {error}") from error
        raise
    finally:
        sys.meta_path.remove(finder)


def _sentence(text: str, why: str) -> str:
    return (
        f"The checkpoint names `{text}`, {why}: a file does not say what code runs. If you trust it, import the module "
        "that has it before you load, or give what it stands for to `load_from_checkpoint` (`policy=`, `loss=`, "
        "`reference=`, `optimizer=`, `lr_scheduler=`)."
    )


def _texts(stored: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Give each text that may be an import path, under which key it stands, and whether a class is meant.

    Raises:
        ResumeError: for more than a module has: one list in itself, over and over, is short in a file.
    """
    todo: list[tuple[str, Any, int]] = [("", stored, 0)]
    parts = 0
    while todo:
        key, value, depth = todo.pop()
        parts += 1
        if parts > _MOST_PARTS or depth > _DEEPEST:
            raise ResumeError("The checkpoint's hyper-parameters are larger than any module has.")
        if isinstance(value, Mapping):
            todo += [(str(name), one, depth + 1) for name, one in value.items()]
        elif isinstance(value, list | tuple | set | frozenset):
            todo += [(key, one, depth + 1) for one in value]
        elif isinstance(value, str) and _is_path(value):
            yield key, value, key in ("class_path", CLASS_PATH)


def _is_path(text: str) -> bool:
    return "." in text and all(part.isidentifier() for part in text.split("."))


def _resolve(path: str) -> tuple[Any, list[str]]:
    """Find what an import path names without importing for it; else None, and the modules that it would import."""
    names = path.split(".")
    if path.startswith(tuple(f"{one}." for one in _LIBRARIES)):
        for end in range(len(names) - 1, 0, -1):
            try:
                importlib.import_module(".".join(names[:end]))
                break
            except ImportError:
                continue
    for end in range(len(names), 0, -1):
        if (found := sys.modules.get(".".join(names[:end]))) is None:
            continue
        for name in names[end:]:
            # `getattr` of a module may import what is asked for
            attributes = vars(found) if hasattr(found, "__dict__") else {}
            found = getattr(found, name, None) if names[0] == "lit_dpo" else attributes.get(name)
            if found is None:
                break
        else:
            return found, []
        break
    modules = (".".join(names[:end]) for end in range(1, len(names) + 1))
    return None, [name for name in modules if name not in sys.modules]


def _is_known(found: Any, kinds: tuple[type, ...], own: set[str]) -> bool:
    if isinstance(found, type) and issubclass(found, kinds):
        return True
    home = str(getattr(found, "__module__", ""))
    # a module's own project may hold what only it knows of, and was imported by whoever loads it
    return home.partition(".")[0] in own - {"lit_dpo", "builtins", ""} or home == "transformers.optimization"


def _project(cls: type) -> str:
    return cls.__module__.partition(".")[0]
