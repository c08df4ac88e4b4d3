"""What losses ask of their arguments: each check passes, or is a sentence that names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any


def number(name: str, value: object, expected: str, holds: Callable[[Any], bool]) -> None:
    """Check that an argument is a finite number for which something holds; a string or a truth value is no number.

    Args:
        name: of the argument.
        value: that it has.
        expected: what the error says after the name.
        holds: what is asked of the number.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and holds(value)):
        raise ValueError(f"Expected `{name}` {expected} but got {value!r}.")


def positive(name: str, value: object) -> None:
    """Check that an argument is a finite number > 0.

    Example:
        >>> positive("beta", "0.1")
        Traceback (most recent call last):
        ValueError: Expected `beta` > 0 but got '0.1'.
    """
    number(name, value, "> 0", lambda given: given > 0)


def not_negative(name: str, value: object) -> None:
    """Check that an argument is a finite number >= 0."""
    number(name, value, ">= 0", lambda given: given >= 0)


def whole(name: str, value: object, least: int) -> None:
    """Check that an argument is a whole number, at least a given one.

    Raises:
        ValueError: if it is not.

    Example:
        >>> whole("top", 1.5, 1)
        Traceback (most recent call last):
        ValueError: Expected `top` to be a whole number >= 1 but got 1.5.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"Expected `{name}` to be a whole number >= {least} but got {value!r}.")


def in_range(name: str, value: object, interval: str) -> None:
    """Check that an argument is a number of an interval; a square bracket takes its end in, a round one does not.

    Example:
        >>> in_range("tau", 0, "(0, 1]")
        Traceback (most recent call last):
        ValueError: Expected `tau` in (0, 1] but got 0.
    """
    low, high = map(float, interval[1:-1].split(","))
    ends = {low} if interval.startswith("[") else set()
    ends |= {high} if interval.endswith("]") else set()
    number(name, value, f"in {interval}", lambda given: low < given < high or given in ends)


def one_of(name: str, value: object, *choices: str) -> None:
    """Check that an argument is one of some names.

    Raises:
        ValueError: if it is not.

    Example:
        >>> one_of("scale", "ln", "log", "linear")
        Traceback (most recent call last):
        ValueError: Expected `scale` to be "log" or "linear" but got 'ln'.
    """
    if value not in choices:
        *first, last = (f'"{choice}"' for choice in choices)
        raise ValueError(f"Expected `{name}` to be {', '.join(first)} or {last} but got {value!r}.")


def flag(name: str, value: object) -> None:
    """Check that an argument is true or false.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, bool):
        raise ValueError(f"Expected `{name}` to be true or false but got {value!r}.")
