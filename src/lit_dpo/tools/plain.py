"""Text of data and models for a terminal."""

from __future__ import annotations

from lit_dpo.callbacks.texts import shown


def plain(text: str, encoding: str | None) -> str:
    """Leave out what steers a terminal, and what its encoding does not have."""
    return str(shown(text, encoding or "utf-8").plain)
