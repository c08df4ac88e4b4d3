"""The nearest of the known names to one that nobody knows, for errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHORTEST = 0.6  # of difflib's ratio; below it a guess is noise


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Name those that may be meant, the likeliest first.

    Args:
        name: what was typed.
        known: what there is.
        count: how many at most.

    Returns:
        Names that differ in upper and lower case alone come first, then by how alike they are, then those that hold
        `name` or that it holds, such as `lr_scheduler` for `scheduler`.

    >>> nearest("IPOLos", ["DPOLoss", "IPOLoss", "SimPOLoss"])[0]
    'IPOLoss'
    >>> nearest("cdpo", ["CDPOLoss"])
    ['CDPOLoss']
    >>> nearest("xyz", ["DPOLoss"])
    []
    """
    by_lower = {one.lower(): one for one in known}  # of two that differ in case, one will do
    typed = name.lower()
    alike = difflib.get_close_matches(typed, by_lower, n=count, cutoff=_SHORTEST)
    # the one that is equal is the shortest that begins so
    within = [
        one for one in sorted(by_lower, key=len) if min(len(typed), len(one)) > 2 and (typed in one or one in typed)
    ]
    found = dict.fromkeys([*(one for one in within if one.startswith(typed)), *alike, *within])
    return [by_lower[one] for one in list(found)[:count]]


def did_you_mean(names: Iterable[str]) -> str:
    """Write the names as the end of a sentence, or nothing where there are none.

    >>> did_you_mean(["DPOLoss", "IPOLoss"])
    ': did you mean DPOLoss or IPOLoss?'
    >>> did_you_mean([])
    ''
    """
    *first, last = [*names] or [""]
    return f": did you mean {', '.join(first) + ' or ' * bool(first)}{last}?" if last else ""
