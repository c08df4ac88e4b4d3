"""The summary as files, and as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lit_dpo.tools.ablate.records import Layout, Summary

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.table import Table


def write(layout: Layout, summary: Summary, pairs: Mapping[str, pa.Table]) -> None:
    """Write what is known of all runs into the ablation's folder."""
    raise NotImplementedError


def table(summary: Summary) -> Table:
    """Make a table for a terminal."""
    raise NotImplementedError
