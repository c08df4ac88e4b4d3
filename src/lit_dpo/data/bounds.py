"""What a chat template may take: time, memory, and how large what it asks for would be, before it is made."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2.exceptions import SecurityError

BYTES = 100_000_000
"""Of texts and lists that a template may make in one rendering, besides ten times what it is given."""

STEPS = 1_000_000
"""Rounds of loops, calls, and what these write, in one rendering."""

SECONDS = 3.0
"""Of this thread's processor time, in one rendering."""

_LARGEST_ARGUMENT = 1_000_000
_LARGEST_NUMBER = 128  # bits
_MOST_PARTS = 300_000  # of one list with all that is in it
_LOOKED_AFTER = 16  # steps: to ask for the time costs more than one
_OF_ELEMENT = 40  # bytes of a place in a list, and of what is small there
_NUMBERS = re.compile(r"\d+")


class OutOfBounds(SecurityError):  # noqa: N818 - said of a template, as `StopIteration` of a loop
    """A template that takes more than it may."""


class Budget:
    """What one rendering may still use.

    Args:
        given: bytes of what the template is given.
    """

    def __init__(self, given: int = 0) -> None:
        self.steps, self.bytes = STEPS, BYTES + 10 * given
        self.until, self.looked = time.thread_time() + SECONDS, self.steps

    def step(self, count: int) -> None:
        """Count what runs.

        Raises:
            OutOfBounds: if it is too much, or has taken too long.
        """
        self.steps -= count
        if self.steps < 0:
            raise OutOfBounds(f"the chat template takes more than {STEPS} steps")
        if self.looked - self.steps < _LOOKED_AFTER:
            return
        self.looked = self.steps
        if time.thread_time() > self.until:
            raise OutOfBounds(f"the chat template takes longer than {SECONDS:g} seconds")

    def make(self, size: float) -> None:
        """Count bytes that are about to be made.

        Raises:
            OutOfBounds: if they are too many.
        """
        self.bytes -= int(min(size, 1 << 62))
        if self.bytes < 0:
            raise OutOfBounds("the chat template makes texts or lists that are far longer than what it is given")


BUDGET: ContextVar[Budget] = ContextVar("budget")


def budget_of() -> Budget:
    """Return that of the rendering that this is a part of."""
    return BUDGET.get(None) or Budget()


def deep_size(value: Any, most: int = _MOST_PARTS) -> int:
    """Return bytes of a value with all that is in it, each as often as it is there; of too many more than any limit."""
    if isinstance(value, str):
        return sys.getsizeof(value)
    size, parts, todo = 0, 0, [value]
    while todo:
        one, parts = todo.pop(), parts + 1
        if parts > most:
            return 1 << 60
        size += sys.getsizeof(one) if isinstance(one, str | int) else _OF_ELEMENT
        if isinstance(one, Mapping):
            todo.extend(one.values())
            size += _OF_ELEMENT * len(one)
        elif isinstance(one, list | tuple | set):
            todo.extend(one)
    return size


def charged_text(value: Any) -> Any:
    """Charge for what becomes text by being written: of a list all that is in it."""
    if not isinstance(value, str):
        budget_of().make(deep_size(value))
    return value


def charged(value: Any) -> Any:
    """Charge for what was made: of a list its places alone."""
    if isinstance(value, str | list | tuple | dict):
        budget_of().make(sys.getsizeof(value) if isinstance(value, str) else _OF_ELEMENT * len(value))
    return value


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Charge for what an operator would make.

    Raises:
        OutOfBounds: if it is too much.
    """
    make = budget_of().make
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_number(left.bit_length() * max(right, 0))
    elif operator == "%" and isinstance(left, str):
        make(_formatted(left, right if isinstance(right, tuple) else (right,)))
    elif operator == "*" and isinstance(left, int) and isinstance(right, int):
        _check_number(left.bit_length() + right.bit_length())
    elif operator == "*":
        for one, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(one, str | list | tuple):
                make(max(times, 0) * deep_size(one))
    elif operator == "+" and isinstance(left, str | list | tuple):
        make(deep_size(left) + deep_size(right))


def _check_number(bits: int) -> None:
    if bits > _LARGEST_NUMBER:
        raise OutOfBounds(f"the chat template computes a number of more than {_LARGEST_NUMBER} bits")


def check_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Charge for what a call would make.

    Raises:
        OutOfBounds: if it is too much.
    """
    _check_arguments(args, kwargs)
    function = getattr(function, "__wrapped__", function)  # what Jinja makes of `str.format`
    name, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
    if name == "strftime_now":
        budget_of().make(_formatted(str(args[0]) if args else "", ()))
    elif isinstance(owner, str):
        _check_method(name, owner, args, kwargs)
    elif kwargs and isinstance(function, type):  # a namespace, which may hold another one
        budget_of().make(_OF_ELEMENT * len(kwargs))


def _check_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    for one in (*args, *kwargs.values()):
        if isinstance(one, int | float) and abs(one) > _LARGEST_ARGUMENT:
            raise OutOfBounds(f"the chat template gives a number above {_LARGEST_ARGUMENT} to a function")
        if isinstance(one, int):
            budget_of().make(abs(one) * _OF_ELEMENT)


def _check_method(name: str, owner: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    make = budget_of().make
    if name == "replace" and len(args) > 1:
        make(_replaced(owner, args[0], args[1]))
    elif name == "join" and args and isinstance(args[0], list | tuple | dict | str):
        make(deep_size(args[0]) + len(args[0]) * len(owner))
    elif name == "join" and args:  # of what is computed as it is asked for, and how much of that is not known
        raise OutOfBounds("the chat template joins what is no list: write `|list` after it")
    elif name in ("format", "format_map"):
        values = tuple(args) + tuple(kwargs.values())
        make(_formatted(owner, values))
    elif name == "translate" and args:
        longest = max((len(one) for one in dict(args[0]).values() if isinstance(one, str)), default=1)
        make(len(owner) * longest)
    elif name == "expandtabs":
        tab = next((one for one in (*args, *kwargs.values()) if isinstance(one, int)), 8)
        make(len(owner) + owner.count("\t") * abs(tab))
    else:
        make(len(owner) if name in ("split", "rsplit", "splitlines") else 0)


def _replaced(text: Any, old: Any, new: Any) -> float:
    text, old, new = str(text), str(old), str(new)
    times = text.count(old) if len(new) > len(old) else 0
    return (len(text) + times * (len(new) - len(old))) * (1 if (text + new[:1]).isascii() else 4)


def _formatted(text: str, values: Sequence[Any]) -> float:
    """At most so much comes of a format: widths, and each value in each of its places."""
    widths = sum(int(one) if len(one) < 10 else 1 << 60 for one in _NUMBERS.findall(text))
    places = text.count("%") + text.count("{")
    stars = sum(abs(one) for one in values if isinstance(one, int)) * text.count("*")
    return float(len(text) + widths + stars + places * sum(map(deep_size, values)))


def checked_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a filter that looks at what it is given, and counts what it gives."""
    if hasattr(function, "unchecked"):
        return function
    at = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context, or the like, stands first

    @wraps(function)  # with the mark that says what stands first
    def checked(*args: Any, **kwargs: Any) -> Any:
        budget_of().step(1)
        value, rest = (args[at] if len(args) > at else None), args[at + 1 :]
        _check_arguments(rest, kwargs)
        if name in ("replace", "join", "format", "indent", "tojson", "string", "upper", "lower", "escape", "e"):
            args = (*args[:at], value := _known(value), *rest)
            budget_of().make(_filtered_size(name, value, rest, kwargs))
        return charged(function(*args, **kwargs))

    checked.unchecked = function  # type: ignore[attr-defined]
    return checked


def _known(value: Any) -> Any:
    """Make a list of what is computed as it is asked for, so that its size is known."""
    return value if hasattr(value, "__len__") or not hasattr(value, "__next__") else charged(list(value))


def _filtered_size(name: str, value: Any, rest: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    size, more = deep_size(value), [*rest, *kwargs.values()]
    if name == "replace" and len(more) > 1:
        return _replaced(value, more[0], more[1])
    if name == "format":
        return _formatted(str(value), more)
    longest = max((len(one) for one in more if isinstance(one, str)), default=0)
    widest = max((abs(one) for one in more if isinstance(one, int)), default=0)
    if name == "join":
        return size + longest * (len(value) if hasattr(value, "__len__") else 1)
    if name == "indent":
        return size + (longest + widest) * (1 + str(value).count("\n"))
    if name == "tojson":  # each element on a line of its own, as far in as it is deep
        return size * (1 + (longest + widest) * math.log2(2 + size) if more else 1)
    return size
