"""Rows of JSON: one object per line, a list of objects, or an object that holds such a list or the columns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from lit_dpo.data.sources.store import Line
from lit_dpo.data.sources.text import flaw, legible
from lit_dpo.errors import DataError

DEEPEST = 200
"""Levels of lists and objects in a row: what reads it calls itself once or twice for each, and Python stops at 1000."""

_SPACE = " \t\r\n"
_LIST = re.compile(r"\[\s*(\{|$)")
_BLANK = re.compile(r"[ \t\r\n]*")
_MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LOOKED_AT = 100
_DECODER = json.JSONDecoder()


def json_lines(lines: Iterable[str], notes: list[str]) -> Iterator[Line]:
    """Read an object per line; blank lines are none. A file that begins as a list of objects does is read as one."""
    lines = iter(lines)
    numbered = ((number, line.strip(_SPACE)) for number, line in enumerate(lines, 1))
    filled = ((number, line) for number, line in numbered if line)
    first, line = next(filled, (0, ""))
    if _LIST.match(line):
        return _elements("".join(["\n" * (first - 1), line, "\n", *lines]), first - 1, whole=True)
    return (checked(text, number) for number, text in chain([(first, line)] if line else [], filled))


def json_document(lines: Iterable[str], notes: list[str]) -> Iterator[Line]:
    """Read a file of one value, which is in memory while it is read; or one object per line.

    An object with a list of objects in `data`, or in one of its keys, stands for these; one of equally long lists, or
    of objects with the same numbers as keys, for columns, as pandas writes them.

    Raises:
        DataError: if the file ends too early, or several keys hold lists of rows.
    """
    text = "".join(lines)
    start = _blank(text, 0)
    if text[start : start + 1] == "[":
        return _elements(text, start, whole=True)
    members = _members(text, start)
    if members is None:
        lines = text.split("\n")
        if all(checked(line, 0).reason for line in lines[:_LOOKED_AT] if line.strip(_SPACE)):
            _end(text, start)  # it may be one object, of which a part is missing
        return json_lines(lines, notes)
    key = _rows_key(text, members)
    if key is not None:
        notes.append(f"rows are those of `{key}`")
        return _elements(text, members[key][0])
    columns = _columns(text, members)
    if columns is not None:
        names, rows = [*columns], zip(*columns.values(), strict=True)
        return (checked(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False), 0) for row in rows)
    return iter([checked(text.strip(), text.count("\n", 0, start) + 1)])


# --- a row -----------------------------------------------------------------------------------------------------------


def checked(text: str, line: int) -> Line:
    """Parse the text of a row, and see that it is one object that can be read again."""
    if not text.isascii() and (place := flaw(text)) is not None:
        return _refused(text, line, f"line {line} holds a byte that is no text, {legible(text[place])}")
    try:
        row = _ROWS.decode(text)
    except json.JSONDecodeError as error:
        at = f"line {line + error.lineno - 1}" if line else "it"
        return _refused(text, line, f"{at} is no JSON: {error.msg} (character {error.colno})")
    except RecursionError:
        return _refused(text, line, _TOO_DEEP)
    except ValueError as error:  # a key twice, a number of more than 4300 digits
        return _refused(text, line, str(error).partition("; ")[0])
    if not isinstance(row, dict):
        return _refused(text, line, f"line {line}: expected an object {{…}} but got {type(row).__name__}")
    if text.count("[") + text.count("{") > DEEPEST and _depth(row) > DEEPEST:
        return _refused(text, line, _TOO_DEEP)
    if _SURROGATE.search(text) and flaw(json.dumps(row, ensure_ascii=False)) is not None:
        return _refused(text, line, "it holds half of a character, a lone surrogate such as `\\ud83d`")
    return Line(text, line, row)


_TOO_DEEP = f"Expected lists and objects in at most {DEEPEST} levels but it is nested deeper"


def _refused(text: str, line: int, reason: str) -> Line:
    return Line(legible(text), line, reason=legible(reason))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Expected each key once in an object but `{twice}` is there twice")
    return found


_ROWS = json.JSONDecoder(object_pairs_hook=_object)


def _depth(value: Any) -> int:
    """Count levels, without calling itself."""
    level, depth = [value], 0
    while level:
        inner = chain.from_iterable(one.values() if isinstance(one, dict) else one for one in level)
        level, depth = [one for one in inner if isinstance(one, dict | list)], depth + 1
    return depth


# --- documents -------------------------------------------------------------------------------------------------------


def _elements(text: str, start: int, *, whole: bool = False) -> Iterator[Line]:
    """Find the elements of the list that begins at `start`; a broken one ends where its brackets do."""
    place, line = start + 1, text.count("\n", 0, start) + 1
    counted = start
    while text[(place := _blank(text, place)) : place + 1] != "]":
        end = _end(text, place)
        line, counted = line + text.count("\n", counted, place), place
        yield checked(text[place:end], line)
        place = _blank(text, end)
        if text[place : place + 1] == ",":
            place += 1
        elif text[place : place + 1] != "]":
            raise _broken(text, place, "expected `,` or `]` after an element of the list")
    if whole and (place := _blank(text, place + 1)) < len(text):
        raise _broken(text, place, "expected nothing after the list")


def _members(text: str, start: int) -> dict[str, tuple[int, int]] | None:
    """Find where the values of an object begin and end; None if the text is not one whole object."""
    if text[start : start + 1] != "{":
        return None
    found, place = dict[str, tuple[int, int]](), start + 1
    try:
        while text[(place := _blank(text, place)) : place + 1] != "}":
            key, place = _DECODER.raw_decode(text, place)
            place = _blank(text, place)
            if not isinstance(key, str) or text[place : place + 1] != ":":
                return None
            first = _blank(text, place + 1)
            found[key] = (first, _end(text, first))
            place = _blank(text, found[key][1])
            if text[place : place + 1] == ",":
                place += 1
    except (ValueError, RecursionError):  # `DataError` is one
        return None
    return found if _blank(text, place + 1) == len(text) else None


def _end(text: str, start: int) -> int:
    """Find the end of the value that begins at `start`."""
    try:
        return _DECODER.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        depth = 0
    for mark in _MARKS.finditer(text, start):
        sign = mark[0]
        if depth == 0 and sign in ("]", "}", ","):
            return mark.start()
        depth += (sign in ("[", "{")) - (sign in ("]", "}"))
        if depth == 0 and sign in ("]", "}"):
            return mark.end()
    raise _broken(text, start, "what begins here does not end")


def _broken(text: str, place: int, reason: str) -> DataError:
    return DataError(f"line {text.count(chr(10), 0, place) + 1} is no JSON: {reason}")


def _blank(text: str, place: int) -> int:
    found = _BLANK.match(text, place)
    return found.end() if found else place


def _rows_key(text: str, members: Mapping[str, tuple[int, int]]) -> str | None:
    """Name the key that holds the rows; none if the object is a row itself, or columns."""
    found = [key for key, (start, _) in members.items() if _holds_rows(text, start)]
    if "data" in found or len(found) < 2:
        return "data" if "data" in found else next(iter(found), None)
    raise DataError(
        f"several keys hold a list of objects, {', '.join(map('`{}`'.format, found))}: write each to a file of its own"
    )


def _holds_rows(text: str, start: int) -> bool:
    """Whether a value is a list of objects that are no messages, by the first one."""
    first = _blank(text, start + 1)
    if text[start] != "[" or text[first : first + 1] != "{":
        return False
    row = checked(text[first : _end(text, first)], 0)
    return not {"role", "from"} & {*row.names}


def _columns(text: str, members: Mapping[str, tuple[int, int]]) -> dict[str, list[Any]] | None:
    """Return the columns that an object consists of, if it does."""
    of_lists = all(text[start] == "[" for start, _ in members.values())
    of_objects = all(text[start] == "{" for start, _ in members.values())
    if len(members) < 2 or not (of_lists or of_objects):
        return None
    try:
        found = {key: json.loads(text[start:end]) for key, (start, end) in members.items()}
    except (ValueError, RecursionError):
        return None
    if of_lists:
        ordered = {key: list(value) for key, value in found.items()}
        messages = any(isinstance(cell, dict) for column in ordered.values() for cell in column)
        return ordered if not messages and len({*map(len, ordered.values())}) == 1 else None
    keys = [*next(iter(found.values()))]
    if not all([*column] == keys for column in found.values()) or not all(key.isdigit() for key in keys):
        return None
    return {key: list(value.values()) for key, value in found.items()}
