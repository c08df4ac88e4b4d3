"""Rows that were right and are broken in every way: cut, flipped, with keys and values that nobody expects."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

HUGE = "huge number"  # stands for more digits than Python parses
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    5,
    0.5,
    float("nan"),
    float("inf"),
    10**400,
    HUGE,
    "",
    " ",
    "text",
    "\ud83d",
    "\x00\x1f",
    "[" * 3000,
    '{"role": "user", "content": ' * 300,
    "[" * 300 + "]" * 300,
    '{"a":' * 150 + "1" + "}" * 150,
    [],
    {},
    [None],
    [[]],
    [{}],
    [{"role": "user"}],
    [{"role": 5, "content": "x"}],
    [{"role": "assistant", "content": None}],
    [{"role": "assistant", "content": [{"type": "image_url"}]}],
    {"role": ["user"], "content": {"a": 1}},
    {"text": None, "rank": None},
    "a" * 3000,
]


def mutated(rng: random.Random, row: dict[str, Any]) -> str:
    """Return the text of a row that is broken in one or two ways, on one line."""
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 2)):
        _change(rng, row)
    text = json.dumps(row)
    if "\\ud" not in text and rng.random() < 0.5:
        text = json.dumps(row, ensure_ascii=False)
    text = text.replace(f'"{HUGE}"', "9" * 5000)
    if rng.random() < 0.2:
        text = rng.choice([_cut, _flipped, _with_control, _twice, _nested])(rng, text)
    return text.replace("\n", " ").replace("\r", " ") or "x"


def _change(rng: random.Random, row: dict[str, Any]) -> None:
    holder: Any = row
    while rng.random() < 0.6:  # the deeper ones
        inner = [one for one in _values(holder) if isinstance(one, dict | list) and one]
        if not inner:
            break
        holder = rng.choice(inner)
    keys: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    if not keys:
        return
    key = rng.choice(keys)
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        other = rng.choice(keys)
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == 2 and isinstance(holder, dict):
        holder[rng.choice(["system", "tools", "role", "weight", "", "a`b"])] = copy.deepcopy(rng.choice(VALUES))
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))


def _values(holder: Any) -> list[Any]:
    return list(holder.values()) if isinstance(holder, dict) else list(holder)


def _cut(rng: random.Random, text: str) -> str:
    return text[: rng.randrange(1, len(text))]


def _flipped(rng: random.Random, text: str) -> str:
    place = rng.randrange(len(text))
    return text[:place] + rng.choice('"{}[],:\\ x0é\u2028') + text[place + 1 :]


def _with_control(rng: random.Random, text: str) -> str:
    place = rng.randrange(len(text))
    return text[:place] + rng.choice("\x00\x01\x1f\x7f\t") + text[place:]


def _twice(rng: random.Random, text: str) -> str:
    return text.replace("{", '{"prompt": "x", "prompt": "y", ', 1)


def _nested(rng: random.Random, text: str) -> str:
    levels = rng.choice([150, 250, 900, 3000])
    return text[:-1] + ', "deep": ' + "[" * levels + "]" * levels + "}"
