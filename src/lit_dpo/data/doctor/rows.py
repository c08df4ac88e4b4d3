"""The rows of a table as text, looked at once: a few numbers each, so that a million of them fit in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_dpo.data.comparisons import Comparing
from lit_dpo.data.doctor.near import NearDuplicates
from lit_dpo.data.doctor.texts import Reader, TextFacts, key, normalized, scripts, words_of, written
from lit_dpo.data.formats.base import Preference, PreferenceFormat, Ranking, Skipped
from lit_dpo.data.formats.implicit import HUMAN, ImplicitPrompt, Transcripts
from lit_dpo.data.formats.turns import read_row
from lit_dpo.data.sources import Unread
from lit_dpo.data.sources.base import OF_A_ROW
from lit_dpo.data.storage import ROW_NUMBERS, counts_of, ragged, values_of
from lit_dpo.data.table import PromptTable


class RowFacts(NamedTuple):
    """Of a row.

    Attributes:
        number: of the row in its table.
        prompt: 64 bits of a hash of the prompt, with its template arguments.
        normal: likewise, without case, blanks and punctuation; equal for what a person would call the same prompt.
        says: likewise, of the prompt, the completions, what is compared and its numbers.
        control: a control token that the prompt has as text; empty if there is none.
        replaced: whether the prompt has U+FFFD.
        early: whether two whole conversations differ before their last turn.
        ranked: pairs of completions that have scores or ranks.
        tied: of these, equal ones.
    """

    number: int
    prompt: int
    normal: int
    says: int
    control: str
    replaced: bool
    early: bool
    ranked: int
    tied: int


@dataclass
class Facts:
    """What the rows of a table say.

    Attributes:
        table: of the rows.
        rows: those that prefer something.
        completions: of these, row after row.
        row_of: `(C,)` for each completion the place of its row among `rows`.
        chosen: `(B,)` for each comparison the place of its better completion among `completions`.
        rejected: `(B,)` likewise of the other one.
        filled: by column, rows in which it holds something.
        near: pairs of row numbers, of one that is nearly a duplicate and of the earlier one; None if nobody looked.
    """

    table: PromptTable
    rows: list[RowFacts] = field(default_factory=list)
    completions: list[TextFacts] = field(default_factory=list)
    row_of: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    chosen: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    rejected: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    filled: Counter[str] = field(default_factory=Counter)
    near: list[tuple[int, int]] | None = None

    @property
    def row_of_comparison(self) -> NDArray[np.int64]:
        """`(B,)` for each comparison the place of its row among `rows`."""
        return self.row_of[self.chosen]

    def place(self, row: int) -> str:
        """Say where the row at a place among `rows` is."""
        return self.table.place(self.rows[row].number)


def raw_rows(table: PromptTable) -> Iterator[tuple[int, PreferenceFormat, Mapping[str, Any]]]:
    """Go through all rows that can be read: their numbers, what reads them, their cells."""
    rows = (
        (format, row) for source, format in zip(table.sources, table.formats, strict=True) for row in source.rows.each()
    )
    return ((number, format, row) for number, (format, row) in enumerate(rows) if not isinstance(row, Unread))


def looked_at(table: PromptTable) -> NDArray[np.bool_]:
    """Which rows belong to this table: used ones, and dropped ones; not those of a part that is held out."""
    wanted = np.zeros(sum(len(source.rows) for source in table.sources), np.bool_)
    if table.is_merged:
        numbers = table.encoded.data.column(ROW_NUMBERS)
        wanted[ragged(values_of(numbers), counts_of(numbers), table.rows)] = True
    else:
        wanted[table.rows] = True
        wanted[: table.total] |= table.facts("length") == 0
    return wanted


def read(table: PromptTable, comparing: Comparing, reader: Reader, near: NearDuplicates | None = None) -> Facts:
    """Look at all rows of a table.

    Args:
        table: of the rows.
        comparing: says what is compared.
        reader: looks at texts.
        near: finds rows that are nearly the same. None: nobody looks for them.
    """
    found, wanted = Facts(table), looked_at(table)
    row_of: list[int] = []
    compared: list[tuple[int, int]] = []
    for number, format, cells in raw_rows(table):
        if not wanted[number]:
            continue
        found.filled.update(name for name, cell in cells.items() if cell not in (None, "", []))
        row = _preference(format, cells)
        if row is None:
            continue
        start, place = len(found.completions), len(found.rows)
        pairs = comparing.of(row).comparisons
        prompt, texts = written(row.prompt), [written(one) for one in _completions(row)]
        words = [words_of(one) for one in texts]
        asked = scripts(prompt).keys()
        found.completions += [reader.facts(one, those, asked) for one, those in zip(texts, words, strict=True)]
        row_of += [place] * len(texts)
        compared += [(start + better, start + worse) for better, worse in pairs]
        facts = _row_facts(number, row, pairs, reader, prompt)._replace(early=_parts_early(format, cells))
        found.rows.append(facts)
        if near is not None:
            near.add(number, facts.says, words_of(prompt), words)
    found.row_of = np.array(row_of, np.int64)
    found.chosen, found.rejected = np.array(compared, np.int64).reshape(-1, 2).T
    found.near = None if near is None else near.pairs
    return found


def read_prompts(table: PromptTable) -> list[RowFacts]:
    """Look at the prompts of a table only."""
    wanted, reader = looked_at(table), Reader()
    rows = ((number, _preference(format, cells)) for number, format, cells in raw_rows(table) if wanted[number])
    return [_row_facts(number, row, (), reader, written(row.prompt)) for number, row in rows if row is not None]


def _preference(format: PreferenceFormat, cells: Mapping[str, Any]) -> Preference | Ranking | None:
    try:
        row = read_row(format, cells)
    except OF_A_ROW:  # a bad row that is left out, and counted elsewhere
        return None
    return None if isinstance(row, Skipped) else row


def _completions(row: Preference | Ranking) -> Sequence[Any]:
    return (row.chosen, row.rejected) if isinstance(row, Preference) else row.completions


def _row_facts(
    number: int, row: Preference | Ranking, comparisons: Sequence[tuple[int, int]], reader: Reader, prompt: str
) -> RowFacts:
    asked = [row.prompt, dict(row.template)] if row.template else row.prompt
    given = key(asked)
    values = [] if isinstance(row, Preference) else [*(row.scores or row.ranks or ())]
    tied = sum(one == other for one, other in combinations(values, 2)) if len(set(values)) < len(values) else 0
    numbers = {name: str(value) for name, value in row.columns.items()}
    return RowFacts(
        number=number,
        prompt=given,
        normal=key(normalized(prompt)),
        says=key([given, *_completions(row), [list(pair) for pair in comparisons], numbers]),
        control=reader.control(prompt),
        replaced="\ufffd" in prompt,
        early=False,
        ranked=len(values) * (len(values) - 1) // 2,
        tied=tied,
    )


def _parts_early(format: Any, cells: Mapping[str, Any]) -> bool:
    if not isinstance(format, ImplicitPrompt | Transcripts):
        return False
    one, other = (_turns(cells.get(name)) for name in (format.chosen, format.rejected))
    return one[:-1] != other[:-1]


def _turns(cell: Any) -> list[Any]:
    """Return the turns of a whole conversation as they are written."""
    if isinstance(cell, str):
        before, *parts = HUMAN.split(cell)
        return list(zip(parts[::2], parts[1::2], strict=True)) or [before]
    if not isinstance(cell, list):
        return []
    return [(one.get("role", one.get("from")), one.get("content", one.get("value"))) for one in cell]
