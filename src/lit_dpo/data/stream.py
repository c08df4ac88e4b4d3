"""One split of prompts that are encoded as training goes: what becomes of each row that is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import attrgetter
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from lit_dpo.data.bad_rows import form
from lit_dpo.data.batch import EncodedPrompt
from lit_dpo.data.comparisons import Comparing
from lit_dpo.data.encode import PromptEncoder
from lit_dpo.data.encoding import encode_rows, read_checked
from lit_dpo.data.formats.base import Preference, Ranking, Skipped
from lit_dpo.data.formats.turns import read_row
from lit_dpo.data.reports import Ask
from lit_dpo.data.sources import Unread
from lit_dpo.data.sources.base import Row, examples_in
from lit_dpo.data.storage import stored
from lit_dpo.data.stream_order import Item, StreamOrder
from lit_dpo.data.truncation import Dropped
from lit_dpo.errors import DataError, sentence

_FIRST = 64  # rows that a digest is of


class StreamedRow(NamedTuple):
    """What became of a row.

    Attributes:
        number: its own, in `batch.indices`.
        tokens: of the prompt and all its completions; 0 for a row that was dropped.
        example: as token ids; None if it was dropped, or where only the other numbers are asked for.
        columns: numbers of its comparisons, by name.
        dropped: why, or "".
        identical: comparisons of equal completions.
        lost: completions that were too long.
        error: why the run cannot go on, or "".
    """

    number: int
    tokens: int = 0
    example: EncodedPrompt | None = None
    columns: Mapping[str, Sequence[float]] = {}
    dropped: str = ""
    identical: int = 0
    lost: int = 0
    error: str = ""


@dataclass
class PromptStream:
    """Prompts with their completions, read from their sources in an order that is a function of seed and epoch.

    Row numbers (`batch.indices`, the argument of `preference`) count the rows of the source, times the number of
    sources, plus the source's own number: with one source they are the numbers of its rows.

    Args:
        order: in which rows are read, and their sources.
        encoder: of prompts and completions.
        comparing: which completions are compared.
        drop_bad_rows: whether a row that cannot be used is counted and left out; otherwise it ends the run.
    """

    order: StreamOrder
    encoder: PromptEncoder
    comparing: Comparing
    drop_bad_rows: bool = False
    reads: list[tuple[int, int | None, str]] = field(default_factory=list)
    """Of each model that reads the rows: its token ids, the tokens of a prompt and a completion, its name."""
    ask: Ask | None = None
    """Of a loss over lists: refuses what it cannot use."""
    columns: tuple[str, ...] = ()
    """Names of the numbers that the comparisons have: those of the first rows."""
    _heads: dict[int, list[Item]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Look at the first rows."""
        self.sources, self.formats = self.order.sources, self.order.formats
        found = [self._column_names(number) for number in range(len(self.sources))]
        for source, names in zip(self.sources, found, strict=True):
            if names != found[0]:
                raise DataError(
                    f"Expected the same columns of numbers in all sources but {self.sources[0].name} has "
                    f"{', '.join(found[0]) or 'none'} and {source.name} {', '.join(names) or 'none'}."
                )
        self.columns = found[0]

    def _column_names(self, number: int) -> tuple[str, ...]:
        for item in self._first(number):
            row = read_checked(self._cells(item), self.formats[number], self.comparing)
            if not isinstance(row, Dropped):
                return tuple(self.comparing.of(row).columns)
        return ()

    # --- contents --------------------------------------------------------------------------------------------------

    def encode(self, items: Sequence[Item]) -> list[StreamedRow]:
        """Parse, read, check and encode rows; what is wrong with one is in its record, for all ranks to raise."""
        found: list[StreamedRow] = [StreamedRow(self._number(item)) for item in items]
        places = sorted(range(len(items)), key=lambda place: items[place].source)
        for number, here in groupby(places, key=lambda place: items[place].source):
            own = list(here)
            try:
                rows = self._encoded(number, [items[place] for place in own])
            except DataError as error:
                rows = [StreamedRow(found[own[0]].number, error=str(error))]
            for place, row in zip(own, rows, strict=False):
                found[place] = row
        return found

    def _encoded(self, number: int, items: Sequence[Item]) -> list[StreamedRow]:
        rows = [self._cells(item) for item in items]
        name, format = self.sources[number].name, self.formats[number]
        cells = encode_rows(rows, name, format, self.encoder, self.comparing, self.columns)
        found = []
        for place, item in enumerate(items):
            flat = cells["comparisons"][place]
            example = EncodedPrompt(
                cells["prompt_ids"][place],
                cells["completion_ids"][place],
                list(zip(flat[::2], flat[1::2], strict=True)),
            )
            dropped, bad = cells["dropped"][place], cells["bad"][place]
            if bad and not self.drop_bad_rows:
                number, at = self._number(item), self.sources[item.source].place(item.row)
                found.append(StreamedRow(number, error=f"{at}: {sentence(dropped)}"))
                continue
            row = StreamedRow(
                self._number(item),
                0 if dropped else cells["length"][place],
                None if dropped else example,
                {name: cells[stored(name)][place] for name in self.columns},
                form(dropped) if bad else dropped,
                int(cells["identical"][place] or 0) if not dropped else 0,
                cells["lost"][place],
            )
            found.append(row._replace(error=self._refused(row)))
        return found

    def _cells(self, item: Item) -> Row | Unread:
        found: Row | Unread = item.raw if item.part is not None else self.sources[item.source].cells(item.raw)
        return found

    def _refused(self, row: StreamedRow) -> str:
        """Say what a model or a loss cannot read of a row."""
        one, place = row.example, self.place(row.number)
        if one is None:
            return ""
        highest = max(map(max, [one.prompt, *one.completions]))
        length = len(one.prompt) + max(map(len, one.completions))
        for vocabulary, context, model in self.reads:
            if highest >= vocabulary or length > (context or length):
                found = f"token id {highest}" if highest >= vocabulary else f"{length} tokens"
                return f"{place}: {found}, but {model} has {vocabulary} token ids and reads {context or 'any number'}."
        if self.ask is not None and (len(one.completions), len(one.comparisons)) != (2, 1):
            counts = torch.tensor([len(one.completions)]), torch.tensor([len(one.comparisons)])
            try:
                self.ask(counts[0], torch.tensor(one.comparisons), counts[1])
            except ValueError as error:
                return f"{place}: {error}"
        return ""

    def _number(self, item: Item) -> int:
        return item.row * len(self.sources) + item.source

    def check_tokens(self, vocabulary: int, context: int | None, model: str) -> None:
        """See that a model can read the first rows, and let every other row be looked at as it is encoded.

        Raises:
            DataError: for the first row that it cannot.
        """
        self.reads.append((vocabulary, context, model))
        self.first_rows()

    def check_lists(self, ask: Ask) -> None:
        """See that a loss over lists can use the first rows, and let every other row be looked at likewise.

        Raises:
            DataError: for the first row that it refuses.
        """
        self.ask = ask
        self.first_rows()

    # --- for reports -----------------------------------------------------------------------------------------------

    def first_rows(self) -> list[StreamedRow]:
        """Encode the first rows of each source.

        Raises:
            DataError: for the first one that cannot be used.
        """
        rows = [row for number in range(len(self.sources)) for row in self.encode(self._first(number))]
        for row in rows:
            if row.error:
                raise DataError(row.error)
        return rows

    def _first(self, number: int) -> list[Item]:
        if number not in self._heads:
            self._heads[number] = list(islice(self.order.of_source(number), _FIRST))
        return self._heads[number]

    @property
    def digest(self) -> str:
        """Of what the first rows of each source say, as they are encoded, and of the sources' shares."""
        said = [[row.example, dict(row.columns), row.dropped] for row in self.first_rows()]
        text = json.dumps([said, self.order.groups, self.order.shares])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def place(self, row: int) -> str:
        """Say in which file a row is, and its number there."""
        number, source = divmod(row, len(self.sources))
        return self.sources[source].place(number)

    def preference(self, row: int) -> Preference | Ranking:
        """Read the raw preference or ranking of a row number, the first one of a row with several."""
        number, source = divmod(row, len(self.sources))
        format = self.formats[source]
        first = examples_in(self.sources[source].row(number), format)[0]
        found = first if isinstance(first, Unread) else read_row(format, first)
        if isinstance(found, Skipped | Unread):
            raise LookupError(f"Expected a row that is used but {self.place(row)} is not: {sentence(found.reason)}")
        return found

    def prompts(self, limit: int) -> list[tuple[int, list[int], Preference | Ranking]]:
        """Return up to `limit` different prompts of the first rows: row number, token ids, what the row says."""
        found = {tuple(row.example.prompt): row for row in reversed(self.first_rows()) if row.example}
        first = sorted(found.values(), key=attrgetter("number"))[:limit]
        return [(row.number, row.example.prompt, self.preference(row.number)) for row in first if row.example]


class StreamDataset(Dataset[list[StreamedRow]]):
    """A `PromptStream` for a `DataLoader`: an index is what was read of some rows, and workers encode it."""

    def __init__(self, stream: PromptStream) -> None:
        self.stream = stream

    def __getitem__(self, items: Sequence[Item]) -> list[StreamedRow]:
        return self.stream.encode(items)
