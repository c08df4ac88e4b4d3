"""A run's table of pairs as arrays, and the sums that its measures are ratios of."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_dpo.tools.measures.statistics import Floats

if TYPE_CHECKING:
    import pyarrow as pa


class Pairs(NamedTuple):
    """The rows of a table of pairs, `(N,)` each.

    Attributes:
        keys: which comparison a row is, in any run: set, source, row in the data set, how many before it have these.
        prompts: numbers of the prompts; the same one is the same prompt.
        numbers: all other columns, float64.
        sources: where each is from.
    """

    keys: list[tuple[Any, ...]]
    prompts: NDArray[np.int64]
    numbers: dict[str, Floats]
    sources: NDArray[Any]

    @property
    def chosen(self) -> Floats:
        """Δ_w = log π − log π_ref of the chosen completion, nats."""
        return self.numbers["chosen_logps"] - self.numbers["reference_chosen_logps"]

    @property
    def rejected(self) -> Floats:
        """Δ_l, of the rejected completion."""
        return self.numbers["rejected_logps"] - self.numbers["reference_rejected_logps"]

    @property
    def margins(self) -> Floats:
        """Δ = Δ_w − Δ_l."""
        return self.chosen - self.rejected

    @property
    def normalized(self) -> Floats:
        """Δ_w/n_w − Δ_l/n_l, nats per token."""
        return self.chosen / self.numbers["chosen_length"] - self.rejected / self.numbers["rejected_length"]

    def take(self, rows: NDArray[np.int64]) -> Pairs:
        """Return some of the rows."""
        numbers = {name: column[rows] for name, column in self.numbers.items()}
        return Pairs([self.keys[row] for row in rows.tolist()], self.prompts[rows], numbers, self.sources[rows])


def read(table: pa.Table) -> Pairs:
    """Take the arrays out of a table that `pair_table` made, or of one run's rows of `pairs.parquet`.

    Rows come in the order of their keys, whatever the table's is: sums are then the same to the last digit.
    """
    texts = {name: table.column(name).to_pylist() for name in ("set", "source")}
    indices = table.column("index").to_pylist()
    seen: Counter[tuple[Any, ...]] = Counter()
    keys = []
    for row in zip(texts["set"], texts["source"], indices, strict=True):
        keys.append((*row, seen[row]))
        seen[row] += 1
    taken = {"set", "source", "index", "prompt", "run"}
    numbers = {
        name: table.column(name).to_numpy().astype(np.float64) for name in table.column_names if name not in taken
    }
    prompts, sources = table.column("prompt").to_numpy().astype(np.int64), np.array(texts["source"], object)
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return Pairs(keys, prompts, numbers, sources).take(np.array(order, dtype=np.int64))


Ratio = tuple[Floats, Floats]


def ratios(pairs: Pairs) -> dict[str, Ratio]:
    """By name of a measure, what each row adds to the numerator and to the denominator, `(N,)` each.

    A measure is the sum of the one over the sum of the other; `calibration_error` alone is not among them.
    """
    numbers, one = pairs.numbers, np.ones(len(pairs.prompts))
    chosen, margins, normalized = pairs.chosen, pairs.margins, pairs.normalized
    chosen_length, tokens = numbers["chosen_length"], numbers["chosen_length"] + numbers["rejected_length"]
    found = {
        "reward_accuracy": (_wins(margins), one),
        "reward_accuracy_normalized": (_wins(normalized), one),
        "margin": (margins, one),
        "margin_per_token": (normalized, one),
        "kl": (numbers["chosen_kl"] + numbers["rejected_kl"], tokens),
        "displacement": (chosen, chosen_length),
        "displaced": (_share(chosen < 0, chosen), one),
        **{name: (column, one) for name, column in numbers.items() if name.startswith(("loss/", "weight/"))},
    }
    for name, rows in _groups(pairs).items():
        inside = rows.astype(np.float64)
        found[f"reward_accuracy/{name}"] = (np.where(rows, _wins(margins), 0.0), inside)
    return found


def _wins(values: Floats) -> Floats:
    """1 above 0, ½ at 0, NaN where there is no number: such a pair is neither won nor lost."""
    return np.where(np.isnan(values), np.nan, (values > 0) + 0.5 * (values == 0))


def _share(yes: NDArray[np.bool_], of: Floats) -> Floats:
    return np.where(np.isnan(of), np.nan, yes)


def _groups(pairs: Pairs) -> dict[str, NDArray[np.bool_]]:
    """Which rows are of a source, if there are several, and of which length; groups without a row are left out."""
    found = {}
    different = sorted(set(pairs.sources.tolist()))
    if len(different) > 1:
        found = {f"source={source}": pairs.sources == source for source in different}
    chosen, rejected = pairs.numbers["chosen_length"], pairs.numbers["rejected_length"]
    total = chosen + rejected
    first, second = np.quantile(total, [1 / 3, 2 / 3]) if len(total) else (0.0, 0.0)
    found |= {
        "length=chosen_shorter": chosen < rejected,
        "length=equal": chosen == rejected,
        "length=chosen_longer": chosen > rejected,
        "length=short": total <= first,
        "length=medium": (total > first) & (total <= second),
        "length=long": total > second,
    }
    return {name: rows for name, rows in found.items() if rows.any()}
