"""The configuration files that come along: where they lie, and what each is, in a line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from lit_dpo.errors import LitDPOError
from lit_dpo.names import did_you_mean, nearest

_PACKAGE = Path(__file__).parent
_END = re.compile(r"(?<!\beq)\. ")  # of a sentence, not of `eq. 7`


def folder() -> Path:
    """Where they lie: within the package in a wheel, next to `src` in a checkout."""
    return next(place for place in (_PACKAGE / "configs", _PACKAGE.parents[1] / "configs") if place.is_dir())


def files() -> list[Path]:
    """All of them: whole experiments, then the fragments of each kind."""
    return sorted(folder().rglob("*.yaml"), key=lambda file: (len(file.relative_to(folder()).parts), file))


def fragment(kind: str, name: str) -> Path:
    """Find a fragment by its short name: a shipped one, or a file of one's own.

    Args:
        kind: the folder: `losses`, `references`, `models`, `data` or `trainers`; empty for whole experiments.
        name: such as `ipo`, `ipo.yaml`, `losses/ipo.yaml` or `configs/losses/ipo.yaml`; or the path of a file that is
            there, which comes first.

    Returns:
        The file's path.

    Raises:
        LitDPOError: if there is none; it names the nearest ones.

    >>> fragment("losses", "ipo").name
    'ipo.yaml'
    >>> fragment("losses", "ipp")
    Traceback (most recent call last):
    lit_dpo.errors.LitDPOError: Expected a file or one of `lit-dpo configs` for losses but got 'ipp': did you mean ipo?
    """
    if name.endswith((".yaml", ".yml", ".json")) and Path(name).is_file():
        return Path(name)
    stem = name.removesuffix(".yaml").removeprefix("configs/").removeprefix(f"{kind}/")
    place = folder() / kind
    there = {path.stem: path for path in place.glob("*.yaml")}
    if stem in there:
        return there[stem]
    raise LitDPOError(
        f"Expected a file or one of `lit-dpo configs` for {kind or 'experiments'} but got {name!r}"
        f"{did_you_mean(nearest(stem.rpartition('/')[2], there)) or '.'}"
    )


def described(file: Path) -> str:
    """Say what a file is, in one line: its first comment, or the first sentence of the class that it names."""
    first = next(_comment(file.read_text(encoding="utf-8")), "")
    if first:
        return first
    named = [line.partition(":")[2].strip() for line in _lines(file) if line.startswith("class_path:")]
    return _sentence(*named[0].rsplit(".", 1)) if named else ", ".join(_lines(file))


def _comment(text: str) -> Iterator[str]:
    """Give the first sentence of the comment that a file begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    if lines:
        yield _first_sentence(" ".join(lines))


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def _sentence(module: str, name: str) -> str:
    """Read it from the source, as importing a class takes seconds: a list is of fifty."""
    for path in _sources(module, name):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return _first_sentence(ast.get_docstring(node) or "")
    return name


def _sources(module: str, name: str) -> Iterator[Path]:
    """Try the file that the name of a class suggests, then all others of its room."""
    room = _PACKAGE.joinpath(*module.split(".")[1:])
    likely = [path for path in sorted(room.glob("*.py")) if path.stem in name.lower()]
    yield from likely
    yield from (path for path in sorted(room.rglob("*.py")) if path not in likely)


def _first_sentence(text: str) -> str:
    """Up to its full stop, on one line."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return _END.split(paragraph)[0].rstrip(".:")
