"""Versions of the formats of files that are read back: older ones are read, a newer one is refused in a sentence.

A number goes up when an older release could not read a new file, or would read it as something else. A field that is
added changes no number: readers take what they know. Caches have none here: theirs is a part of the key, so that one of
another version is never found.
"""

from __future__ import annotations

from lit_dpo.errors import VersionError

CHECKPOINT = 1
"""Of `.ckpt`, in `lit_dpo.version`, and of `lit_dpo.json` next to an adapter."""

DYNAMICS = 1
"""Of `dynamics.parquet`, in its schema's metadata."""

ABLATION = 1
"""Of `ablation.json`, and of the runs' files in the same folder."""

ENVIRONMENT = 1
"""Of `environment.json` in a run's directory."""


def check_version(found: object, newest: int, file: object) -> None:
    """See that a file can be read.

    Args:
        found: the version that the file says. None: it says none, and is as old as the first.
        newest: that is known here.
        file: for the message.

    Raises:
        VersionError: for a newer one, or what is no version.

    Example:
        >>> check_version(1, 1, "last.ckpt")
        >>> check_version(2, 1, "last.ckpt")
        Traceback (most recent call last):
        lit_dpo.errors.VersionError: last.ckpt was written by a newer lit_dpo: its format is 2, and this release reads \
up to 1. Update lit_dpo (`pip install -U lit_dpo`), or use the release that wrote it.
    """
    if found is None:
        return
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise VersionError(f"Expected the version of a format, 1 to {newest}, in {file} but got {found!r:.40}.")
    if found > newest:
        raise VersionError(
            f"{file} was written by a newer lit_dpo: its format is {found}, and this release reads up to {newest}. "
            "Update lit_dpo (`pip install -U lit_dpo`), or use the release that wrote it."
        )
