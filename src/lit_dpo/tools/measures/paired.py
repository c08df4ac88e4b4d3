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

    A difference is that of means over the seeds that both arms have, of each seed on the pairs that both runs have.
    Prompts are resampled and seeds are not: what is found is found for further prompts, and these seeds. There are
    2,000 resamples, and of many comparisons more, 200 for each, so that Holm's correction leaves room for small
    p-values.
    """
    chosen = [(one, other) for one, other in _chosen(arms) if one.runs.keys() & other.runs.keys()]
    resamples = max(RESAMPLES, 200 * len(chosen))
    everything = {(arm.name, seed): pairs for arm in arms for seed, pairs in arm.runs.items()}
    shared = _distributions(everything, resamples) if _alike(everything) else None
    found = []
    for one, other in chosen:
        seeds = sorted(one.runs.keys() & other.runs.keys())
        values = shared or _on_common_rows(one, other, seeds, resamples)
        if seeds := [seed for seed in seeds if (one.name, seed) in values]:
            found += _differences(one.name, other.name, seeds, values)
    return _corrected(found)


def _chosen(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    if len(arms) <= MOST_ARMS:
        return list(combinations(arms, 2))
    first = arms[0]
    best = max(arms, key=lambda arm: -math.inf if math.isnan(arm.accuracy) else arm.accuracy)
    found = [(first, other) for other in arms[1:]]
    return found + [(best, other) for other in arms if best is not first and other not in (best, first)]


_Runs = Mapping[tuple[str, int], Pairs]  # by arm and seed
_Values = dict[tuple[str, int], Floats]  # `(1 + R, 3)` each: what was seen, then resamples


def _distributions(runs: _Runs, resamples: int) -> _Values:
    """Measure runs as they are and resampled, by the same draws of all of their prompts."""
    if not runs:
        return {}
    prompts = np.unique(np.concatenate([pairs.prompts for pairs in runs.values()]))
    sums = np.zeros((len(prompts), len(runs), len(COMPARED), 2))
    for place, pairs in enumerate(runs.values()):
        measured = ratios(pairs)
        columns = np.stack([column for name in COMPARED for column in measured[name]], 1)
        own = np.searchsorted(prompts, np.unique(pairs.prompts))  # clusters come in this order
        sums[own, place] = Clusters.of(pairs.prompts).sums(columns).reshape(len(own), len(COMPARED), 2)
    flat = sums.reshape(len(prompts), -1)
    drawn = np.concatenate([flat.sum(0, keepdims=True), *resampled(flat, resamples)]).reshape(-1, *sums.shape[1:])
    with np.errstate(invalid="ignore", divide="ignore"):
        values = drawn[..., 0] / drawn[..., 1]
    return {key: values[:, place] for place, key in enumerate(runs)}


def _on_common_rows(one: Arm, other: Arm, seeds: Sequence[int], resamples: int) -> _Values:
    """Do the same for two arms, of each seed on the pairs that both runs have; a seed without any is left out."""
    rows = {}
    for seed in seeds:
        places = [{key: row for row, key in enumerate(_identified(arm.runs[seed]))} for arm in (one, other)]
        if common := sorted(places[0].keys() & places[1].keys()):
            for arm, those in zip((one, other), places, strict=True):
                rows[arm.name, seed] = arm.runs[seed].take(np.array([those[key] for key in common], dtype=np.int64))
    return _distributions(rows, resamples)


def _identified(pairs: Pairs) -> list[tuple[object, ...]]:
    return list(zip(pairs.keys, pairs.prompts.tolist(), strict=True))


def _alike(runs: _Runs) -> bool:
    """Whether all runs of a seed have the same pairs, in the same order."""
    first: dict[int, Pairs] = {}
    for (_, seed), pairs in runs.items():
        other = first.setdefault(seed, pairs)
        if pairs.keys != other.keys or not np.array_equal(pairs.prompts, other.prompts):
            return False
    return True


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
