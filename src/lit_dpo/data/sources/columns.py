"""Which columns rows have, and which of them are read."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lit_dpo.data.sources.base import RowSource
from lit_dpo.errors import DataError

_INDEX = re.compile(r"\s*|Unnamed: \d+(\.\d+)?|__index_level_\d+__")


def is_index(name: str) -> bool:
    """Whether a column is a number of the row that pandas writes next to the data."""
    return _INDEX.fullmatch(name) is not None


def with_columns(source: RowSource, columns: Sequence[str] | None, optional: Sequence[str] = ()) -> RowSource:
    """Return the source with the needed columns alone, and those of the optional ones that it has.

    Raises:
        DataError: if one is missing, with those there are, or if there is no row.
    """
    there = source.rows.column_names
    missing = [name for name in columns or () if name not in there]
    if missing:
        other = next((name for name in there if name not in (columns or ())), None)
        advice = (
            f"Name the columns with the format's options, such as `--data.format.prompt {other}`."
            if other
            else "Rows of another layout need another `--data.format`."
        )
        raise DataError(
            f"{source.name}: expected the columns {quoted(columns or ())} but {quoted(missing)} is missing; it has "
            f"{quoted(there)}. {advice}"
        )
    if len(source.rows) == 0:
        raise DataError(f"{source.name} has no rows.")
    if columns is None:
        names = [name for name in there if not is_index(name)]
        return source if names == there or not names else source._replace(rows=source.rows.select_columns(names))
    kept = dict.fromkeys([*columns, *(name for name in optional if name in there)])
    return source._replace(rows=source.rows.select_columns(list(kept)))


def quoted(names: Sequence[str]) -> str:
    """Write names in back-ticks."""
    return ", ".join(f"`{name}`" for name in names)
