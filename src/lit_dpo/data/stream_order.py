"""The order in which the rows of a stream are read: a function of seed and epoch that can be taken up anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np

from lit_dpo.data.formats.base import PreferenceFormat
from lit_dpo.data.mixture import interleave
from lit_dpo.data.sources.base import examples_in
from lit_dpo.data.streaming import StreamSource
from lit_dpo.errors import DataError


class Item(NamedTuple):
    """What was read of a row, before it is parsed.

    Attributes:
        source: its number.
        row: its number there.
        part: which example of the row, where a row may hold several.
        raw: what was read, or the cells of the example, or why there are none.
    """

    source: int
    row: int
    part: int | None
    raw: Any


@dataclass
class StreamOrder:
    """What is read of the sources of a stream, epoch by epoch.

    The rows of a source are taken in blocks, one after another, and each block is shuffled. So any place of an epoch
    can be found again: rows before it are read, not parsed, and nothing that was shuffled has to be kept. Rows far from
    each other never meet: files that are sorted should be shuffled once.

    Of a mixture, an epoch ends once each source has been gone through; those that end earlier begin anew, in another
    order. Its proportions are those of the rows that are read, of which some may be dropped.

    Args:
        sources: of the rows.
        formats: of each; some find several examples in a row.
        groups: numbers of the sources that are read one after another; several groups are a mixture.
        shares: of the groups.
        shuffle_buffer: rows of a block.
        seed: of the order.
        shuffle: whether blocks are shuffled.
    """

    sources: list[StreamSource]
    formats: list[PreferenceFormat]
    groups: list[list[int]]
    shares: list[float]
    shuffle_buffer: int
    seed: int = 0
    shuffle: bool = True
    _sizes: dict[int, int] = field(default_factory=dict)  # rows of groups that were gone through

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the order."""
        return {"sources": len(self.sources), "shares": self.shares, "buffer": self.shuffle_buffer}

    def __str__(self) -> str:
        """Say what is read."""
        names = ", ".join(one.name for one in self.sources)
        return f"streamed from {names} in blocks of {self.shuffle_buffer} rows; what is dropped is said after an epoch"

    def items(self, epoch: int, start: int = 0) -> Iterator[Item]:
        """Yield what is read in an epoch, without its first `start` examples."""
        if len(self.groups) == 1:
            yield from self._pass(0, epoch, 0, start)
            return
        drawn = Counter(islice(interleave(self.shares), start))
        passes = [self._passes(number, epoch, drawn[number]) for number in range(len(self.groups))]
        through = [start > 0 and drawn[number] >= self._size(number) for number in range(len(self.groups))]
        for number in islice(interleave(self.shares), start, None):
            if all(through):
                return
            item, ends = next(passes[number])
            through[number] |= ends
            yield item

    def _passes(self, group: int, epoch: int, start: int) -> Iterator[tuple[Item, bool]]:
        """Yield what is read of a group, pass after pass, and whether its first pass is over with it."""
        first, start = divmod(start, self._size(group)) if start else (0, 0)
        for number in count(first):
            items = self._pass(group, epoch, number, start)
            last = next(items, None)
            if last is None:
                raise DataError(f"{self.sources[self.groups[group][0]].name} gave no rows when it was read again.")
            while last is not None:
                following = next(items, None)
                yield last, number > 0 or following is None
                last = following
            start = 0

    def _pass(self, group: int, epoch: int, number: int, start: int) -> Iterator[Item]:
        """Yield what is read of a group once, block by block, without the first `start` examples."""
        items = self._read(group)
        seen = 0
        for block in count():
            rows = list(islice(items, self.shuffle_buffer))
            if not rows:
                self._sizes[group] = seen
                return
            seen += len(rows)
            if seen <= start:
                continue
            key = [self.seed, epoch, group, number, block]
            places = np.arange(len(rows))
            if self.shuffle:
                places = np.random.Generator(np.random.PCG64(key)).permutation(places)
            for place in places[max(0, start - seen + len(rows)) :]:
                yield rows[place]

    def _read(self, group: int) -> Iterator[Item]:
        for number in self.groups[group]:
            yield from self.of_source(number)

    def of_source(self, number: int) -> Iterator[Item]:
        """Yield what is read of a source, as it lies there."""
        source, format = self.sources[number], self.formats[number]
        several = type(format).examples is not PreferenceFormat.examples
        for row, raw in enumerate(source.read()):
            if not several:
                yield Item(number, row, None, raw)
                continue
            for part, cells in enumerate(examples_in(source.cells(raw), format)):
                yield Item(number, row, part, cells)

    def _size(self, group: int) -> int:
        """Examples of a group; it is read once if nobody knows."""
        if group not in self._sizes:
            self._sizes[group] = sum(1 for _ in self._read(group))
        return self._sizes[group]
