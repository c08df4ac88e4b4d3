"""Formats: how a row of a file becomes a preference. One file per way people store them; extend by subclassing."""

from lit_dpo.data.formats.base import Message, Preference, PreferenceFormat, Ranking
from lit_dpo.data.formats.rankings import Rankings
from lit_dpo.data.formats.triples import Triples

__all__ = ["Message", "Preference", "PreferenceFormat", "Ranking", "Rankings", "Triples"]
