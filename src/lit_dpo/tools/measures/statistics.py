"""Intervals, tests and counts, in NumPy: what a number of an ablation is worth.

Held-out comparisons of one prompt are not independent, so that whatever is resampled here is prompts, with all their
comparisons: the cluster bootstrap. Every measure is a ratio of two sums over comparisons, or a function of such sums,
so that a resample costs one product of matrices for all measures of all runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_dpo.tools.ablate.records import Estimate

RESAMPLES = 2000
"""Of an interval: its ends then move by about a fortieth of its width from one seed to another."""
CALIBRATION_BINS = 10
_CHUNK = 4_000_000  # numbers of resampling at a time, 32 MB

Floats = NDArray[np.float64]


class Clusters(NamedTuple):
    """Which rows belong together: those of one prompt.

    Attributes:
        order: `(N,)` rows, cluster after cluster.
        starts: `(P,)` where each cluster begins in that order.
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, labels: NDArray[np.int64]) -> Clusters:
        """Make them of `(N,)` labels: rows with the same one belong together.

        Example:
            >>> Clusters.of(np.array([7, 3, 7])).sums(np.array([[1.0], [10.0], [100.0]])).tolist()
            [[10.0], [101.0]]
        """
        order = np.argsort(labels, kind="stable")
        ordered = labels[order]
        first = np.r_[True, ordered[1:] != ordered[:-1]] if len(labels) else np.zeros(0, bool)
        return cls(order, np.flatnonzero(first))

    def sums(self, values: Floats) -> Floats:
        """`(P, K)` sums over each cluster of `(N, K)` values."""
        found: Floats = np.add.reduceat(values[self.order], self.starts, axis=0)
        return found


def resampled(sums: Floats, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[Floats]:
    """Draw clusters with replacement, as many as there are, and add up what is drawn.

    Args:
        sums: `(P, K)` of each cluster.
        resamples: how many times.
        seed: the same draws for the same `P`, whatever `K` is: what is compared is compared on the same draws.

    Yields:
        `(R, K)` sums over all of a resample, some resamples at a time.
    """
    clusters = len(sums)
    random = np.random.Generator(np.random.PCG64(seed))
    at_once = max(1, _CHUNK // max(clusters, 1))
    for first in range(0, resamples, at_once):
        count = min(at_once, resamples - first)
        drawn = np.empty((count, clusters))
        for row in drawn:
            row[:] = np.bincount(random.integers(clusters, size=clusters), minlength=clusters)
        yield drawn @ sums


def percentile_interval(values: Floats) -> tuple[Floats, Floats]:
    """Return the ends of the 95 % percentile interval of `(R, K)` resampled values, `(K,)` each.

    Resamples in which a measure does not exist (NaN), as without a pair of some source, are left out; if it exists in
    none, there is no interval.
    """
    missing = np.isnan(values)
    kept = ~missing.all(0)
    found = np.full((2, values.shape[1]), np.nan)
    quantile = np.nanquantile if missing[:, kept].any() else np.quantile
    if kept.any():
        found[:, kept] = quantile(values[:, kept], [0.025, 0.975], axis=0)
    return found[0], found[1]


def bootstrap_p(differences: Floats) -> float:
    """Two-sided p-value of the hypothesis that a difference is 0, from its `(R,)` bootstrap distribution.

    Twice the smaller share of resamples at or beyond 0, each count with the one that was seen (+1), so that it is never
    0 (Davison and Hinkley 1997, section 4.2): p = min(1, 2·(1 + min(#{d ≤ 0}, #{d ≥ 0}))/(R + 1)).

    Example:
        >>> bootstrap_p(np.array([0.2, 0.1, 0.3])), bootstrap_p(np.array([-1.0, 1.0, 2.0, 3.0]))
        (0.5, 0.8)
    """
    if np.isnan(differences).any():
        return math.nan
    smaller = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (1 + smaller) / (len(differences) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values of several tests for there being several (Holm 1979): the chance of any false one stays below α.

    The smallest of m is multiplied by m, the next by m − 1, and so on; each is at least the one before, at most 1. NaN
    is no test, and stays.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03, 0.005])]
        [0.03, 0.06, 0.06, 0.02]
    """
    given = np.asarray(p_values, dtype=np.float64)
    tests = np.flatnonzero(~np.isnan(given))
    order = tests[np.argsort(given[tests], kind="stable")]
    found = given.copy()
    steps = given[order] * np.arange(len(order), 0, -1)
    found[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return [float(p) for p in found]


def t_cdf(t: float, degrees: int) -> float:
    """P(T ≤ t) of Student's distribution with a whole number of degrees of freedom.

    The finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4, exact but for rounding.

    Args:
        t: any number.
        degrees: of freedom. Expected ≥ 1.
    """
    if degrees < 1:
        raise ValueError(f"Expected `degrees` >= 1 but got {degrees}.")
    theta = math.atan2(abs(t), math.sqrt(degrees))
    sine, squared = math.sin(theta), math.cos(theta) ** 2
    odd = degrees % 2
    term = total = 0.0 if degrees == 1 else math.cos(theta) if odd else 1.0
    for step in range(2 + odd, degrees - 1, 2):
        term *= squared * (step - 1) / step
        total += term
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return 0.5 + math.copysign(inside / 2, t)


def t_quantile(share: float, degrees: int) -> float:
    """Return the t with P(T ≤ t) = `share`, by bisection of `t_cdf`.

    Args:
        share: expected in (0, 1).
        degrees: of freedom. Expected ≥ 1.

    Example:
        >>> round(t_quantile(0.975, 1), 4), round(t_quantile(0.975, 4), 4)
        (12.7062, 2.7764)
    """
    if not 0 < share < 1:
        raise ValueError(f"Expected `share` in (0, 1) but got {share}.")
    low, high = -1.0, 1.0
    while t_cdf(low, degrees) > share:
        low *= 2
    while t_cdf(high, degrees) < share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_cdf(middle, degrees) < share else (low, middle)
    return (low + high) / 2


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of some runs, with the 95 % t interval: m ± t(0.975, n − 1)·s/√n.

    Args:
        values: one of each seed; those that are NaN are left out. Of fewer than two there is no interval (NaN).

    Example:
        >>> [round(end, 3) for end in mean_over_seeds([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484]
    """
    there = np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)
    if len(there) < 2:
        return Estimate(float(there[0]) if len(there) else math.nan, math.nan, math.nan)
    mean = float(there.mean())
    half = t_quantile(0.975, len(there) - 1) * float(there.std(ddof=1)) / math.sqrt(len(there))
    return Estimate(mean, mean - half, mean + half)


def calibration_sums(margins: Floats) -> Floats:
    """`(N, 10)` what each pair adds to the bins of the expected calibration error.

    How sure the policy is of the side that it prefers is c = σ(|z|), from ½ to 1, of z = β·Δ; it is right if z > 0, and
    half right if z = 0. Bins are of equal width in c, so that they are the same for every run, however many pairs are
    in them. The numbers of bin b add up to n_b·(confidence − accuracy of the bin).

    Args:
        margins: `(N,)` z.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = np.where(margins == 0, 0.5, margins > 0)
    places = np.clip((confidence - 0.5) * 2 * CALIBRATION_BINS, 0, CALIBRATION_BINS - 1)
    bins = np.where(np.isnan(places), 0, places).astype(np.int64)
    found = np.zeros((len(margins), CALIBRATION_BINS))
    found[np.arange(len(margins)), bins] = confidence - right
    return found


def calibration_error(margins: Floats) -> float:
    """Return the expected calibration error of σ(z) (ECE, Naeini et al. 2015): Σ_b n_b/N·|accuracy − confidence|.

    It is in [0, 1]. See `calibration_sums`. Of few pairs it is too large, as every bin's noise counts as an error.

    Example:
        >>> calibration_error(np.array([np.log(3.0)] * 4)), calibration_error(np.log(3.0) * np.array([1, 1, 1, -1]))
        (0.25, 0.0)
    """
    return float(np.abs(calibration_sums(margins).sum(0)).sum() / len(margins))


_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


def words(text: str) -> list[str]:
    """Words of a text, in lower case, without punctuation; in Chinese and Japanese, which write no spaces, characters.

    Example:
        >>> words("It's a dog. 你好")
        ['it', 's', 'a', 'dog', '你', '好']
    """
    return _WORD.findall(text.lower())


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of different ones among all runs of `n` words (distinct-n, arXiv 1510.03055); NaN if there are none.

    A policy that says the same to everybody has a low one. It falls with the amount of text: compare equal numbers of
    completions of equal length limits.

    Example:
        >>> distinct(["a dog ran", "a dog sat"], 1), distinct(["a dog ran", "a dog sat"], 2)
        (0.6666666666666666, 0.75)
    """
    grams = [gram for text in texts for gram in _grams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def _grams(given: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(given[start:] for start in range(n)), strict=False))
