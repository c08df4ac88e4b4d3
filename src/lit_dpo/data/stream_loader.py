"""Batches of a stream: every rank knows which rows every other one trains on, so that all make the same steps."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any, NamedTuple

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DistributedSampler, SequentialSampler

from lit_dpo.data.batch import CompletionBatch, collate
from lit_dpo.data.loader import TrainLoader
from lit_dpo.data.stream import PromptStream, StreamDataset, StreamedRow
from lit_dpo.data.stream_order import Item
from lit_dpo.errors import DataError, ResumeError

_AT_ONCE = 64
"""Rows of a rank that are tokenised between two times that ranks tell each other which they have kept."""
_REMEMBERED = 4096
"""Batches of which the loader knows where in the stream they began: as many as are accumulated, at the least."""


class StepLimits(NamedTuple):
    """What a step has room for.

    Attributes:
        ranks: how many share it.
        prompts: most of them, on each rank. None: as many as fit.
        max_tokens: most of them, on each rank. None: no limit.
    """

    ranks: int = 1
    prompts: int | None = None
    max_tokens: int | None = None


class ChunkSampler(DistributedSampler[Any], SequentialSampler):
    """Yields this rank's part of what is read, for workers to encode; the rank at `position % ranks` has a row.

    Every rank reads all rows, and parses and tokenises its own. It is a `DistributedSampler` and a `SequentialSampler`
    for the reason that `PromptSampler` is.

    Args:
        stream: what is read.
        rank: which part to yield.
        num_replicas: number of ranks.

    Attributes:
        pending: what was read for each chunk that was yielded, of all ranks, with the position of its first row.
    """

    def __init__(self, stream: PromptStream, rank: int, num_replicas: int) -> None:
        self.stream, self.rank, self.num_replicas = stream, rank, num_replicas
        self.pending: deque[tuple[int, tuple[Item, ...]]] = deque()
        self.position = (0, 0)

    def __len__(self) -> int:
        raise TypeError("Expected nobody to ask for the length of a stream: it is known at its end.")

    def __iter__(self) -> Iterator[list[Item]]:  # type: ignore[override]
        """Yield parts, from the loaded position on."""
        self.pending.clear()
        epoch, first = self.position
        order = self.stream.order.items(epoch, first)
        while items := tuple(islice(order, _AT_ONCE * self.num_replicas)):
            self.pending.append((first, items))
            yield list(items[(self.rank - first) % self.num_replicas :: self.num_replicas])
            first += len(items)

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the loader knows where it is."""


class StreamLoader(TrainLoader):
    """Training batches of a stream, packed from the rows that are kept.

    A step takes rows in the order of the stream: each goes to the rank that has encoded it, or, if that has no room, to
    the one with most; the step ends before the first row for which no rank has room. So batches are full whatever is
    dropped, every row is on one rank, and where a step begins is one number. What a rank gets of another's rows it
    encodes again: some percent, or, with `max_tokens`, more.

    The last rows of an epoch are shared as evenly as they can be. If there are fewer than ranks, the step before gives
    some of its own; or, if it has no more than one for each rank, it takes them, one more than there is room for on
    some ranks. There, if `max_tokens` leaves no room, a row may sit out.

    Args:
        stream: of the rows.
        limits: of a step.
        rank: of this process.
        pin_memory: lay batches out where a CUDA device can fetch them.
        options: of a `DataLoader`.

    Attributes:
        starts: for recent batches, by number in the epoch, the position at which they began.
        ended: whether the epoch has no more batches.
    """

    def __init__(
        self,
        stream: PromptStream,
        limits: StepLimits,
        rank: int = 0,
        pin_memory: bool = False,
        **options: Any,
    ) -> None:
        if options.get("num_workers"):
            # it has run in this process by now, and would warn of every fork
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        sampler = ChunkSampler(stream, rank, limits.ranks)
        super().__init__(StreamDataset(stream), sampler=sampler, collate_fn=_as_it_is, **options)
        self.stream, self.limits, self.rank, self.pins = stream, limits, rank, pin_memory
        self.starts: dict[int, int] = {}

    def notes(self, accumulate: int) -> dict[str, Any]:
        """Return where recent batches began."""
        return {
            "starts": {
                number: start for number, start in self.starts.items() if number >= self.batches - accumulate - 1
            }
        }

    def batches_of(self, state: Mapping[str, Any]) -> int:
        """Return the batches of the epoch in which a checkpoint stands, at whose end it was written."""
        return int(state["batches"])

    def _pass(self) -> Iterator[CompletionBatch]:
        assert isinstance(self.sampler, ChunkSampler)
        if self.batches and self.batches not in self.starts:
            raise ResumeError(f"Expected to know where batch {self.batches} of the stream began but nobody noted it.")
        begun = self.batches
        self.starts = {begun: self.starts[begun] if begun else 0}
        self.sampler.position = (self.epoch, self.starts[begun])
        seen, before, step = _Seen(self.starts[begun]), None, _Step(self.limits)
        for rows in self._fetched():
            for place in self._places(*self.sampler.pending.popleft(), rows, seen):
                if not step.take(place):
                    if before:
                        yield self._batch(before, step.start)
                    before, step = step, _Step(self.limits)
                    step.take(place)
        if not begun and seen.kept < self.limits.ranks:
            count = f"{seen.kept or 'no'} row{'s' * (seen.kept > 1)} of {seen.read}"
            raise DataError(f"train: {count} is left for {self.limits.ranks} ranks{seen.reasons}.")
        whole = before.rows if before else []
        last = _last(self.limits, whole, step.rows)
        for one, following in zip_longest(last, last[1:]):
            yield self._batch(one, following.start if following else seen.position)
        seen.report(self.epoch)

    def _places(self, first: int, items: Sequence[Item], rows: list[StreamedRow], seen: _Seen) -> Iterator[_Place]:
        """Yield the rows that are kept of what was read, given those that this rank has encoded."""
        ranks = self.limits.ranks
        told = [row._replace(example=None, columns={}) for row in rows]
        everybody: list[list[StreamedRow] | None] = [told] * ranks
        if ranks > 1:
            dist.all_gather_object(everybody, told)
        own, others = iter(rows), [iter(part or ()) for part in everybody]
        for position, item in enumerate(items, first):
            owner = position % ranks
            row = next(others[owner])
            whole = next(own) if owner == self.rank else None
            if row.error:
                raise DataError(row.error)
            seen.note(row)
            if row.tokens > (self.limits.max_tokens or row.tokens):
                raise DataError(
                    f"{self.stream.place(row.number)}: Expected prompts of up to `max_tokens`={self.limits.max_tokens} "
                    f"tokens (with all completions) but this has {row.tokens}. Raise `--data.max_tokens`, or lower "
                    "`--data.max_length`."
                )
            if row.tokens:
                yield _Place(position, item, row.tokens, whole)

    def _batch(self, step: _Step, following: int) -> CompletionBatch:
        """Lay this rank's part of a step out, and remember where the following one begins."""
        self.starts[self.batches + 1] = following
        self.starts.pop(self.batches - _REMEMBERED, None)
        own = step.parts[self.rank]
        missing = iter(self.stream.encode([place.item for place in own if place.row is None]))
        rows = [place.row or next(missing) for place in own]
        examples = [row.example for row in rows if row.example is not None]
        batch = collate(
            examples,
            [row.number for row in rows for _ in (row.example.comparisons if row.example else ())],
            {name: [one for row in rows for one in row.columns[name]] for name in self.stream.columns},
        )
        return _pinned(batch) if self.pins else batch


class _Place(NamedTuple):
    """A row that is kept.

    Attributes:
        position: in the epoch.
        item: what was read.
        tokens: of the prompt and all its completions.
        row: as it was encoded, on the rank that did so.
    """

    position: int
    item: Item
    tokens: int
    row: StreamedRow | None


class _Step:
    """The rows of one step, by rank."""

    def __init__(self, limits: StepLimits) -> None:
        self.limits = limits
        self.parts: list[list[_Place]] = [[] for _ in range(limits.ranks)]

    def take(self, place: _Place) -> bool:
        """Take the next row, unless no rank has room for it."""
        owner = place.position % self.limits.ranks
        ranks = sorted(range(self.limits.ranks), key=lambda rank: (rank != owner, self._load(rank), rank))
        rank = next((rank for rank in ranks if self._fits(rank, place)), None)
        if rank is not None:
            self.parts[rank].append(place)
        return rank is not None

    @property
    def rows(self) -> list[_Place]:
        """Its rows, in the order of the stream."""
        return sorted(place for part in self.parts for place in part)

    @property
    def start(self) -> int:
        """The position of its first row."""
        return self.rows[0].position

    def even_out(self) -> None:
        """Share the rows as evenly as they fit, so that every rank has some."""
        while True:
            most, least = max(self.parts, key=len), min(self.parts, key=len)
            moved = next((one for one in reversed(most) if self._fits(self.parts.index(least), one)), None)
            if len(most) - len(least) < 2 or moved is None:
                return
            most.remove(moved)
            least.append(moved)

    def _fits(self, rank: int, place: _Place) -> bool:
        _, prompts, tokens = self.limits
        part = self.parts[rank]
        enough = tokens is None or sum(one.tokens for one in part) + place.tokens <= tokens
        return enough and (prompts is None or len(part) < prompts)

    def _load(self, rank: int) -> int:
        part = self.parts[rank]
        return len(part) if self.limits.max_tokens is None else sum(one.tokens for one in part)


def _last(limits: StepLimits, whole: list[_Place], rest: list[_Place]) -> list[_Step]:
    """Make the last steps of an epoch, in which each rank has a row.

    Args:
        limits: of a step.
        whole: rows of a step.
        rest: those that follow.
    """
    if rest and len(rest) < limits.ranks:  # the step before gives some, or takes them
        rows = [*whole, *rest]
        least = limits.ranks if len(rows) >= 2 * limits.ranks else 0
        whole, rest = rows[: len(rows) - least], rows[len(rows) - least :]
    steps = []
    for part in (whole, rest):
        room = limits
        if limits.prompts is not None and len(part) > limits.prompts * limits.ranks:
            room = limits._replace(prompts=limits.prompts + 1)
        step = _Step(room)
        for place in part:
            step.take(place)
        step.even_out()
        steps += [step] if part else []
    return steps


class _Seen:
    """What an epoch's rows have come to, on all ranks."""

    def __init__(self, position: int) -> None:
        self.position, self.read, self.kept = position, 0, 0
        self.dropped: Counter[str] = Counter()
        self.identical = self.lost = 0

    def note(self, row: StreamedRow) -> None:
        self.position, self.read, self.kept = self.position + 1, self.read + 1, self.kept + (row.tokens > 0)
        self.identical, self.lost = self.identical + row.identical, self.lost + row.lost
        if row.dropped:
            self.dropped[row.dropped] += 1

    @property
    def reasons(self) -> str:
        said = "; ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        return f": {said}" if said else ""

    def report(self, epoch: int) -> None:
        if not self.read:  # a run that had nothing left to do in this epoch
            return
        line = f"train: epoch {epoch}: {self.read} rows read, {self.kept} kept"
        line += f", dropped{self.reasons}" if self.dropped else ""
        line += f"; {self.lost} completions dropped, too long" if self.lost else ""
        line += f"; {self.identical} comparisons of equal completions, which teach nothing" if self.identical else ""
        rank_zero_info(line)


def _pinned(batch: CompletionBatch) -> CompletionBatch:
    """Pin what moves to the device."""
    return batch._replace(
        input_ids=batch.input_ids.pin_memory(),
        position_ids=batch.position_ids.pin_memory(),
        columns={name: column.pin_memory() for name, column in batch.columns.items()},
    )


def _as_it_is(rows: list[StreamedRow]) -> list[StreamedRow]:
    return rows
