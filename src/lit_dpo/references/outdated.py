"""What is said of a cache that is not read because it was filled under other versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_VERSIONS = ("version", "torch", "transformers", "peft", "bitsandbytes", "liger-kernel")


def outdated(folder: Path, identity: Mapping[str, Any]) -> str:
    """Say that there are log-probs of the same reference, computed by other versions; nothing where there are none.

    Args:
        folder: of the cache that is used, next to others.
        identity: what its numbers depend on.
    """
    here = _flat(identity)
    for file in sorted(folder.parent.glob("*/reference.json")):
        there: dict[str, Any] = {}
        with suppress(OSError, ValueError, TypeError):  # somebody else's
            there = _flat(json.loads(file.read_text(encoding="utf-8")))
        changed = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        if changed and all(name.rpartition(".")[2] in _VERSIONS for name in changed):
            said = ", ".join(f"{name.rpartition('.')[2]} {there.get(name)} (here {here.get(name)})" for name in changed)
            return f"; that in {file.parent} is of {said}, rounds differently and is not read: this one is filled anew"
    return ""


def _flat(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in dict(given).items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
