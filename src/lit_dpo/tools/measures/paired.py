"""Tests of differences between arms, on the same pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from lit_dpo.tools.ablate.records import Comparison, Estimate
from lit_dpo.tools.measures.pairs import Pairs, ratios
from lit_dpo.tools.measures.statistics import (
    RESAMPLES,
    Clusters,
    Floats,
    bootstrap_p,
    holm,
    percentile_interval,
    resampled,
)

COMPARED = ("reward_accuracy", "reward_accuracy_normalized", "kl")
"""Measures that arms are compared by: few, as each further test takes power from all."""
MOST_ARMS = 12
"""Of more arms not every one is compared with every other, but each with the first and with the best."""


class Arm(NamedTuple):
    """Pairs of an arm's runs, by seed, and its accuracy."""

    name: str
    accuracy: float
    runs: Mapping[int, Pairs]


def compared(arms: Sequence[Arm]) -> list[Comparison]:
    """Compare arms by `COMPARED`, each two, or of more than `MOST_ARMS` each with the first and the most accurate one.

    A difference is that of means over the seeds that both arms have, on the pairs that both have. Prompts are resampled
    and seeds are not: what is found is found for further prompts, and these seeds. There are 2,000 resamples, and of
    many comparisons more, 200 for each, so that Holm's correction leaves room for small p-values.
    """
    chosen = [(one, other) for one, other in _chosen(arms) if one.runs.keys() & other.runs.keys()]
    resamples = max(RESAMPLES, 200 * len(chosen))
    found = []
    everything = {(arm.name, seed): pairs for arm in arms for seed, pairs in arm.runs.items()}
    shared = _distributions(everything, resamples) if _same_rows(list(everything.values())) else None
    for one, other in chosen:
        seeds = sorted(one.runs.keys() & other.runs.keys())
        values = shared or _on_common_rows(one, other, seeds, resamples)
        if values is not None:
            found += _differences(one.name, other.name, seeds, values)
    return _corrected(found)


def _chosen(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    if len(arms) <= MOST_ARMS:
        return list(combinations(arms, 2))
    first = arms[0]
    best = max(arms, key=lambda arm: -math.inf if math.isnan(arm.accuracy) else arm.accuracy)
    found = [(first, other) for other in arms[1:]]
    return found + [(best, other) for other in arms if best is not first and other not in (best, first)]


_Values = dict[tuple[str, int], Floats]  # by arm and seed: `(1 + R, 3)`, what was seen, then resamples


def _distributions(runs: Mapping[tuple[str, int], Pairs], resamples: int) -> _Values:
    """Measures of runs on the same rows, as they are and resampled, by the same draws."""
    if not runs:
        return {}
    columns = []
    for pairs in runs.values():
        measured = ratios(pairs)
        columns += [column for name in COMPARED for column in measured[name]]
    sums = Clusters.of(next(iter(runs.values())).prompts).sums(np.stack(columns, 1))
    drawn = np.concatenate([sums.sum(0, keepdims=True), *resampled(sums, resamples)])
    parts = drawn.reshape(len(drawn), len(runs), len(COMPARED), 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = parts[..., 0] / parts[..., 1]
    return {key: values[:, place] for place, key in enumerate(runs)}


def _on_common_rows(one: Arm, other: Arm, seeds: Sequence[int], resamples: int) -> _Values | None:
    """Do the same for two arms on the pairs that all of their runs have; None if there are none."""
    runs = {(arm.name, seed): arm.runs[seed] for arm in (one, other) for seed in seeds}
    common = set.intersection(*(set(_identified(pairs)) for pairs in runs.values()))
    if not common:
        return None
    rows = {}
    for key, pairs in runs.items():
        places = {name: place for place, name in enumerate(_identified(pairs)) if name in common}
        rows[key] = pairs.take(np.array([places[name] for name in sorted(common)], dtype=np.int64))
    return _distributions(rows, resamples)


def _identified(pairs: Pairs) -> list[tuple[object, ...]]:
    return list(zip(pairs.keys, pairs.prompts.tolist(), strict=True))


def _same_rows(runs: Sequence[Pairs]) -> bool:
    return all(pairs.keys == runs[0].keys and np.array_equal(pairs.prompts, runs[0].prompts) for pairs in runs[1:])


def _differences(one: str, other: str, seeds: Sequence[int], values: _Values) -> list[Comparison]:
    mean = [np.mean([values[arm, seed] for seed in seeds], axis=0) for arm in (one, other)]
    differences = mean[0] - mean[1]
    low, high = percentile_interval(differences[1:])
    return [
        Comparison(
            name,
            one,
            other,
            Estimate(float(differences[0, place]), float(low[place]), float(high[place])),
            bootstrap_p(differences[1:, place]),
            math.nan,
        )
        for place, name in enumerate(COMPARED)
    ]


def _corrected(found: Sequence[Comparison]) -> list[Comparison]:
    """Order by measure, and correct within each."""
    done = []
    for name in COMPARED:
        those = [one for one in found if one.measure == name]
        corrected = holm([one.p for one in those])
        done += [one._replace(p_holm=p) for one, p in zip(those, corrected, strict=True)]
    return done
