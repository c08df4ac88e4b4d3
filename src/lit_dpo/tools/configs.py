"""`lit-dpo configs`: the shipped configuration files, and a copy of them to work with."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import lit_dpo
from lit_dpo.errors import LitDPOError
from lit_dpo.writing import written_whole


def main(args: Sequence[str]) -> None:
    """Run `lit-dpo configs`.

    Args:
        args: the command line after `configs`.

    Raises:
        LitDPOError: if the folder to copy to is there, or the disk refuses.
    """
    parser = argparse.ArgumentParser(
        prog="lit-dpo configs", description="List the configuration files that come with lit_dpo, or copy them."
    )
    copy = parser.add_subparsers(dest="command").add_parser("copy", help="copy them into a new folder")
    copy.add_argument("directory", nargs="?", type=Path, default=Path("configs"), help="default: %(default)s")
    given = parser.parse_args(args)
    if given.command == "copy":
        copy_to(given.directory)
        print(f"lit-dpo fit --config {given.directory / 'quickstart.yaml'}")
        return
    for file in sorted(folder().rglob("*.yaml"), key=lambda file: (len(file.relative_to(folder()).parts), file)):
        print(file)


def folder() -> Path:
    """Where they lie: within the package in a wheel, next to `src` in a checkout."""
    package = Path(lit_dpo.__file__).parent
    return next(place for place in (package / "configs", package.parents[1] / "configs") if place.is_dir())


def copy_to(directory: Path) -> None:
    """Copy all of them, whole or not at all, and over nothing.

    Raises:
        LitDPOError: if something is there, or the disk refuses.
    """
    if directory.exists():
        raise LitDPOError(f"Expected a new folder to copy `configs` to but {directory} is there: name another.")
    with written_whole(directory) as fresh:
        shutil.copytree(folder(), fresh)
