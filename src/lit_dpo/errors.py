"""Errors that say what was expected, what came, and what to do."""

from __future__ import annotations

import re

# C0 but for tab and newline, DEL, C1, marks that turn the direction of text, separators, and letters that do not show
STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""What text of data, models and files could do to a terminal, or hide in one."""


class LitDPOError(Exception):
    """Something the user can put right. The command line prints it without a traceback and exits with 1."""


class DataError(LitDPOError, ValueError):
    """Preference data that cannot be used: names the file, the row and the field."""


class PolicyError(LitDPOError, ValueError):
    """A model, adapter or quantisation that cannot be loaded as asked."""


class TrainingError(LitDPOError, RuntimeError):
    """A run that would compute something else than what was asked for."""


class ResumeError(LitDPOError, RuntimeError):
    """A checkpoint that does not continue the run it is given to."""


class VersionError(LitDPOError, RuntimeError):
    """A file of a format that a newer release has made."""


class AblationError(LitDPOError, ValueError):
    """An ablation that cannot be made as it is asked for."""


class UnsupportedAttentionError(LitDPOError, NotImplementedError):
    """An attention argument that the pair attention does not implement, and will not ignore."""


class Explanation(str):
    """A sentence about an error that a library raised, as the error's note: the command prints it alone."""


def explanation(error: BaseException) -> str | None:
    """Return the sentence that was noted on an error, if there is one.

    Example:
        >>> error = RuntimeError("code 12")
        >>> error.add_note(Explanation("The memory is used up."))
        >>> explanation(error)
        'The memory is used up.'
    """
    found = [note for note in getattr(error, "__notes__", ()) if isinstance(note, Explanation)]
    return str(found[-1]) if found else None


def first_line(error: BaseException) -> str:
    """Return what a library's error begins with."""
    return str(error).strip().split("\n")[0]


def sentence(text: str) -> str:
    """Return text that ends as a sentence does.

    Example:
        >>> sentence("It has no prompt"), sentence("It has none.")
        ('It has no prompt.', 'It has none.')
    """
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."


def printable(text: str) -> str:
    """Return text, which may be a stranger's, without what steers a terminal: a file's name and an error hold some."""
    return STEERING.sub("", text)
