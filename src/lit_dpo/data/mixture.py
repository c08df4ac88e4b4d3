"""Several sources in given proportions, which hold at every point of the order and not only on average."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_dpo.errors import DataError

_MOST_TIMES = 100


def weighted_sources(source: Any) -> list[tuple[Any, float]] | None:
    """Return the sources of a mixture with their shares, which add up to 1; None for what is no mixture.

    Args:
        source: a mapping from names to numbers, or a list of pairs of a source and a number.

    Raises:
        DataError: for weights that are not finite numbers above 0.

    Example:
        >>> weighted_sources({"a.jsonl": 3, "b.jsonl": 1})
        [('a.jsonl', 0.75), ('b.jsonl', 0.25)]
        >>> weighted_sources(["a.jsonl", "b.jsonl"])
    """
    if isinstance(source, Mapping):
        if hasattr(source, "column_names") or not any(_is_number(weight) for weight in source.values()):
            return None  # splits, or sets
        pairs = list(source.items())
    elif isinstance(source, list | tuple) and source and all(_is_pair(one) for one in source):
        pairs = [tuple(one) for one in source]
    else:
        return None
    for one, weight in pairs:
        if not _is_number(weight) or not math.isfinite(weight) or weight <= 0:
            raise DataError(f"Expected a finite weight > 0 for each source but got {weight!r} for {_called(one)}.")
    total = math.fsum(weight for _, weight in pairs)
    return [(one, weight / total) for one, weight in pairs]


def _is_number(weight: object) -> bool:
    return isinstance(weight, int | float) and not isinstance(weight, bool)


def _is_pair(one: object) -> bool:
    return isinstance(one, tuple) and len(one) == 2 and _is_number(one[1])


def _called(source: object) -> str:
    return source if isinstance(source, str) else f"the {type(source).__name__}"


def names(source: Any) -> list[str]:
    """Return what the sources of a mixture are called."""
    return [_called(one) for one, _ in weighted_sources(source) or ()]


def interleave(shares: Sequence[float]) -> Iterator[int]:
    """Yield numbers of sources without end; each one's count is always within 1 of its share.

    Tijdeman's rule (The chairman assignment problem, Discrete Mathematics 32, 1980): of those sources that are due, the
    one that has to come soonest. After any `t` steps, and for any source of `k` > 1 with the share `p`, its count
    differs from `p t` by at most 1 - 1 / (2 k - 2); so within any window from `t` to `u` it is less than 2 off.

    Args:
        shares: of the sources; they add up to 1.

    Example:
        >>> [*islice(interleave([0.5, 0.25, 0.25]), 8)]
        [0, 1, 2, 0, 0, 1, 2, 0]
    """
    count, numbers = len(shares), range(len(shares))
    early = 1 / (2 * count - 2) if count > 1 else 1.0
    counts = [0] * count
    step = 0
    while True:
        step += 1
        owed = [share * step - there for share, there in zip(shares, counts, strict=True)]
        # the tolerance is for rounding: in exact numbers some source is always due
        due = [n for n in numbers if owed[n] >= early - 1e-9] or [*numbers]
        chosen = min(due, key=lambda n: (1 - early - owed[n]) / shares[n])
        counts[chosen] += 1
        yield chosen


class Mixture:
    """The order of a mixture: an epoch shows every row at least once, and rows of smaller sources again.

    Each time that a source has been gone through, it begins anew in another permutation. An epoch is as short as it can
    be for this, rounded up to whole batches.

    Args:
        of: `(N,)` for each row the number of its source.
        shares: of the sources; they add up to 1.
        multiple: what the length of an epoch shall be a multiple of.
        names: of the sources.

    Raises:
        DataError: for a source of which no row is left, or whose share is so small that an epoch would have no end.

    Attributes:
        pattern: for each place of an epoch the number of its source, see `interleave`.

    Example:
        >>> mixture = Mixture(np.array([0, 0, 0, 1]), [0.75, 0.25])
        >>> mixture.pattern.tolist()
        [0, 0, 1, 0]
    """

    def __init__(
        self, of: NDArray[np.int64], shares: Sequence[float], multiple: int = 1, names: Sequence[str] = ()
    ) -> None:
        self.members = [np.flatnonzero(of == number) for number in range(len(shares))]
        self.names = names or [f"source {number}" for number in range(len(shares))]
        for name, rows in zip(self.names, self.members, strict=True):
            if not len(rows):
                raise DataError(f"train: no rows are left of {name}, a source of the mixture.")
        least = max(math.ceil(len(rows) / share) for rows, share in zip(self.members, shares, strict=True))
        if least > _MOST_TIMES * len(of):
            rare = max(range(len(shares)), key=lambda number: len(self.members[number]) / shares[number])
            raise DataError(
                f"Expected shares with which an epoch, in which every row comes, has at most {_MOST_TIMES} times as "
                f"many prompts as there are rows, {len(of)}, but it would have {least}: raise the share of "
                f"{self.names[rare]}, which has {len(self.members[rare])} of them."
            )
        # by then each is through, or one place short of it
        found = np.fromiter(islice(interleave(shares), least + 2 * len(shares) + multiple), np.int16)
        through = max(np.flatnonzero(found == n)[len(rows) - 1] + 1 for n, rows in enumerate(self.members))
        self.pattern = found[: -(-int(through) // multiple) * multiple]
        self._places = [np.flatnonzero(self.pattern == number) for number in range(len(shares))]

    @property
    def size(self) -> int:
        """Rows of an epoch."""
        return len(self.pattern)

    @property
    def times(self) -> list[float]:
        """How many times an epoch goes through each source."""
        return [len(places) / len(rows) for places, rows in zip(self._places, self.members, strict=True)]

    def __str__(self) -> str:
        """Say what an epoch is."""
        rows = sum(map(len, self.members))
        said = ", ".join(f"{name} {time:.3g} times" for name, time in zip(self.names, self.times, strict=True))
        return f"an epoch of the mixture has {self.size} prompts, so that each of the {rows} comes once or more: {said}"

    def permutation(self, random: np.random.Generator) -> NDArray[np.int64]:
        """`(size,)` rows in the order of an epoch."""
        order = np.empty(self.size, np.int64)
        for places, rows in zip(self._places, self.members, strict=True):
            passes = [random.permutation(rows) for _ in range(-(-len(places) // len(rows)))]
            order[places] = np.concatenate(passes)[: len(places)]
        return order

    def sorted(
        self,
        order: NDArray[np.int64],
        lengths: NDArray[np.int64],
        batch_size: int,
        run: int,
        random: np.random.Generator,
    ) -> NDArray[np.int64]:
        """Let batches hold rows of similar length, each source for itself: every place keeps its source.

        Args:
            order: of rows; whole batches.
            lengths: of all rows.
            batch_size: of all ranks together.
            run: batches within which rows are sorted; their batches then get them in a random order.
            random: draws it.
        """
        found = order.copy()
        for start in range(0, len(order), run * batch_size):
            here = order[start : start + run * batch_size]
            turns = random.permutation(len(here) // batch_size).repeat(batch_size)
            for number in range(len(self.members)):
                places = np.flatnonzero(self.pattern[start : start + len(here)] == number)
                rows = here[places]
                # the batch whose turn is first gets the shortest
                found[start + places[turns[places].argsort(kind="stable")]] = rows[lengths[rows].argsort(kind="stable")]
        return found
