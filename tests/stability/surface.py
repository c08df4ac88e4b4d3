"""What users build on, as a text: names, arguments, options, and what is in the files that runs write.

    python tests/stability/surface.py

writes `public_api.txt` anew. One line is one thing, so that a review shows what has changed. What other libraries own
(the trainer's options, a checkpoint's parts of Lightning) is not in it, and nothing that depends on their versions.
"""

from __future__ import annotations

import argparse
import enum
import inspect
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FILE = HERE / "public_api.txt"
sys.path += [str(HERE), str(HERE.parent), str(HERE.parent / "measures")]

MODULES = (
    "lit_dpo",
    "lit_dpo.losses",
    "lit_dpo.losses.checks",
    "lit_dpo.references",
    "lit_dpo.policy",
    "lit_dpo.logps",
    "lit_dpo.metrics",
    "lit_dpo.data",
    "lit_dpo.data.formats",
    "lit_dpo.callbacks",
    "lit_dpo.callbacks.findings",
    "lit_dpo.errors",
)
"""Whose names are public; see docs/stability.md. `__all__` says which, or else what is defined there."""

SINGLE = {
    "lit_dpo.quickstart": ("style",),
    "lit_dpo.memory": ("LiveBytes",),
    "lit_dpo.tools.ablate": ("run",),
    "lit_dpo.tools.measures.judges": ("RewardModelJudge", "quickstart_judge"),
    "lit_dpo.tools.measures.table": ("pair_table",),
}
"""Names that are public in modules that are not."""

HEAD = """\
# What users build on. A program writes this file, and a test compares it: python tests/stability/surface.py
# Whoever changes a line says so in CHANGELOG.md; for what goes, docs/stability.md says when it may.
"""


def text(walked: Any) -> str:
    """All of it.

    Args:
        walked: what commands have left, by `walk.py`.
    """
    import walk

    parts = {
        "names and arguments": names(),
        "options of commands": options(),
        **walk.described(walked),
    }
    return HEAD + "".join(
        f"\n## {title}\n\n" + "".join(f"{line}\n" for line in lines) for title, lines in parts.items()
    )


def differences(before: str, now: str) -> list[str]:
    """Lines that went and lines that came."""
    old, new = before.splitlines(), now.splitlines()
    return [f"- {line}" for line in old if line not in set(new)] + [f"+ {line}" for line in new if line not in set(old)]


def things(given: str) -> set[str]:
    """What there is, by name, with its arguments, and without their types and defaults, which may change.

    Example:
        >>> sorted(things("## names\\n\\nf(a: dict[str, int], *, b: int = 1) -> None\\n"))
        ['names: f', 'names: f(a)', 'names: f(b)']
    """
    section, found = "", set()
    for line in given.splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line and not line.startswith("#"):
            name = re.split(r"\(| = | of | is | -> |: |, ", line)[0]
            found.add(f"{section}: {name}")
            found |= {f"{section}: {name}({argument})" for argument in _ARGUMENT.findall(line.partition("(")[2])}
    return found


# what a type holds is in brackets, after a colon
_ARGUMENT = re.compile(r"(?:^|, |\*)(?!\*)(\w+)(?=: |, |\)| = )")


def unsaid(before: str, now: str, changelog: str) -> list[str]:
    """Names that are gone since a release, and that no line of a section `### Removed` after it speaks of.

    Args:
        before: the list of that release.
        now: the present one.
        changelog: the part of it that is newer than the release.
    """
    removed = "\n".join(re.findall(r"^### Removed\n(.*?)(?=^##|\Z)", changelog, re.DOTALL | re.MULTILINE))
    bullets = re.split(r"^- ", removed, flags=re.MULTILINE)
    gone = things(before) - things(now)
    # what is of a class that went is not named again
    gone = {
        one for one in gone if not any(one != other and one.startswith((f"{other}(", f"{other}.")) for other in gone)
    }
    last = {one: re.split(r"[. ]", one.partition("(")[0])[-1] for one in gone}
    words = {one: [name, *_ARGUMENT_OF.findall(one)] for one, name in last.items()}
    return sorted(
        one for one in gone if not any(all(f"`{word}`" in bullet for word in words[one]) for bullet in bullets)
    )


_ARGUMENT_OF = re.compile(r"\((\w+)\)$")


# ---- names ----


def names() -> list[str]:
    first: dict[int, str] = {}
    chosen = dict.fromkeys(MODULES) | SINGLE
    return [line for module, names in chosen.items() for line in _of_module(import_module(module), names, first)]


def _of_module(module: Any, names: tuple[str, ...] | None, first: dict[int, str]) -> Iterator[str]:
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    for name in names or sorted(getattr(module, "__all__", own)):
        value, path = getattr(module, name), f"{module.__name__}.{name}"
        if name.startswith("_") or inspect.ismodule(value):
            continue
        if id(value) in first and (inspect.isclass(value) or callable(value)):
            yield f"{path} is {first[id(value)]}"
            continue
        first[id(value)] = path
        if inspect.isclass(value):
            yield from _of_class(path, value)
        elif inspect.isroutine(value):
            yield _signature(path, value)
        else:
            yield path


def _of_class(path: str, value: type) -> Iterator[str]:
    bases = [base.__name__ for base in value.__bases__ if base.__module__.startswith("lit_dpo")]
    yield f"{path} of {', '.join(bases)}" if bases else path
    if issubclass(value, enum.Enum):
        yield from (f"{path}.{one.name}" for one in value)
        return
    if (value.__init__ is not object.__init__ or hasattr(value, "_fields")) and not issubclass(value, Exception):
        for one in _parameters(value):
            yield f"{path}({_written(one)})"
    fields = (*getattr(value, "_fields", ()), *getattr(value, "__dataclass_fields__", ()))
    theirs = {name for base in value.__mro__ if not base.__module__.startswith("lit_dpo") for name in vars(base)}
    for name, member in sorted(vars(value).items()):
        if name.startswith("_") or name in fields or name in theirs:  # a hook of Lightning's is its own
            continue
        if isinstance(member, staticmethod | classmethod):
            member = member.__func__
        if isinstance(member, property) or not hasattr(member, "__get__"):  # what a class says of itself, by name
            yield f"{path}.{name}"
        elif inspect.isfunction(member):
            yield _signature(f"{path}.{name}", member)


def _signature(path: str, value: Any) -> str:
    returned = inspect.signature(value).return_annotation
    given = ", ".join(map(_written, _parameters(value)))
    return f"{path}({given})" + (f" -> {returned}" if isinstance(returned, str) else "")


def _parameters(value: Any) -> list[inspect.Parameter]:
    given = inspect.signature(value).parameters.values()
    return [one for one in given if one.name not in ("self", "cls") and not one.name.startswith("_")]


def _written(one: inspect.Parameter) -> str:
    """As in the source: what is by name alone has `*` before it."""
    star = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**", one.KEYWORD_ONLY: "*, "}.get(one.kind, "")
    said = f": {one.annotation}" if isinstance(one.annotation, str) else ""
    if one.default is one.empty:
        return f"{star}{one.name}{said}"
    of_code = inspect.isroutine(one.default) or inspect.isclass(one.default)
    return f"{star}{one.name}{said} = {'<' + one.default.__name__.strip('<>') + '>' if of_code else repr(one.default)}"


# ---- options ----


class _Caught(Exception):
    pass


def options() -> list[str]:
    """Of each command, without those of `trainer`, `model` and `data`: these are the arguments of their classes."""
    from unittest.mock import patch

    from lit_dpo.commands import COMMANDS, FIRST, TOOLS
    from lit_dpo.parser import Parser
    from lit_dpo.tools.ablate.configuring import FitCLI

    def catch(self: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        raise _Caught(self)

    found = [f"lit-dpo {name}" for name in (*COMMANDS, *TOOLS)]
    found += [f"lit-dpo fit {option}" for option, *_ in FIRST]  # those that the help shows first
    found += _of_parser("fit", FitCLI()._parser("fit"))
    for name in TOOLS:
        main = import_module(f"lit_dpo.tools.{name}").main
        with (
            patch.object(argparse.ArgumentParser, "parse_known_args", catch),
            patch.object(Parser, "parse_args", catch),
        ):
            try:
                main([])
            except _Caught as caught:
                found += _of_parser(name, caught.args[0])
    return sorted(set(found))


def _of_parser(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        dest = action.dest.partition(".")[0]
        if dest in ("help", "trainer", "model", "data", "optimizer", "lr_scheduler", "print_config", "print_shtab"):
            continue
        if dest not in ("config", "ckpt_path", "weights_only", "seed_everything"):  # Lightning's
            default = "" if action.default in (None, argparse.SUPPRESS) else f" = {_plain(action.default)}"
            choices = f" of {{{','.join(map(str, action.choices))}}}" if action.choices else ""
            for option in action.option_strings or [action.dest]:
                yield f"lit-dpo {name} {option}{default}{choices}"


def _plain(value: object) -> str:
    return repr(str(value)) if isinstance(value, Path) else repr(value)


if __name__ == "__main__":
    import walk

    with tempfile.TemporaryDirectory() as folder:
        found = text(walk.walk(Path(folder)))
    for path in [FILE] if walk.released() else [FILE, walk.KEPT / FILE.name]:
        path.write_text(found, encoding="utf-8", newline="\n")
        print(f"{path} is written. Say in CHANGELOG.md what has changed.")
