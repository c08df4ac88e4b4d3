"""Text of data and models for a terminal."""

from __future__ import annotations

from lit_dpo.callbacks.completions import _shown


def plain(text: str, encoding: str | None) -> str:
    """Leave out what steers a terminal, and what its encoding does not have."""
    return str(_shown(text, encoding or "utf-8").plain)
