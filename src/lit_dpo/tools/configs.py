"""`lit-dpo configs`: the shipped configuration files, one of them, and a copy of all to work with."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from lit_dpo.errors import LitDPOError
from lit_dpo.names import did_you_mean, nearest
from lit_dpo.shipped import described, files, folder, fragment
from lit_dpo.writing import written_whole

__all__ = ["copy_to", "folder", "fragment", "main", "named"]


def main(args: Sequence[str]) -> None:
    """Run `lit-dpo configs`.

    Args:
        args: the command line after `configs`.

    Raises:
        LitDPOError: if no file has the name, if the folder to copy to is there, or if the disk refuses.
    """
    parser = argparse.ArgumentParser(
        prog="lit-dpo configs",
        description="List the configuration files that come with lit_dpo, print one, or copy them all.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="{show,copy}")
    show = commands.add_parser("show", help="print one of them", allow_abbrev=False)
    show.add_argument("name", help="such as quickstart, ipo or losses/ipo.yaml")
    copy = commands.add_parser("copy", help="copy them into a new folder", allow_abbrev=False)
    copy.add_argument("directory", nargs="?", type=Path, default=Path("configs"), help="default: %(default)s")
    given = parser.parse_args(args)
    if given.command == "copy":
        copy_to(given.directory)
        print(f"lit-dpo fit --config {given.directory / 'quickstart.yaml'}")
    elif given.command == "show":
        file = named(given.name)
        print(f"# {file}\n{file.read_text(encoding='utf-8')}", end="")
    else:
        _list()


def named(name: str) -> Path:
    """Find one by its path within the folder, or by its name where only one file has it.

    Raises:
        LitDPOError: if there is none; whole experiments come before fragments of the same name.
    """
    there = {str(file.relative_to(folder()).with_suffix("")): file for file in files()}
    stem = name.removesuffix(".yaml").removeprefix("configs/")
    if stem in there:
        return there[stem]
    short = {path.rpartition("/")[2]: path for path in reversed(there)}
    if stem in short:
        return there[short[stem]]
    likely = [short.get(one, one) for one in nearest(stem, [*short, *there])]
    raise LitDPOError(f"Expected one of `lit-dpo configs` but got {name!r}{did_you_mean(dict.fromkeys(likely)) or '.'}")


def copy_to(directory: Path) -> None:
    """Copy all of them, whole or not at all, and over nothing.

    Raises:
        LitDPOError: if something is there, or the disk refuses.
    """
    if directory.exists():
        raise LitDPOError(f"Expected a new folder to copy `configs` to but {directory} is there: name another.")
    with written_whole(directory, new=True) as fresh:
        shutil.copytree(folder(), fresh)


def _list() -> None:
    """Say where they are, and of each what it is; one line each, cut at the width of a terminal."""
    print(f"{folder()}/")
    width = shutil.get_terminal_size((10_000, 0)).columns  # piped, a line is as long as it is
    for file in files():
        name = str(file.relative_to(folder()))
        print(f"  {name:<26} {described(file)}"[:width].rstrip())
