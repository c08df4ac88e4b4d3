"""Can one look at a single feature tell the chosen completion from the rejected one? Then a model learns that."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_dpo.data.doctor.findings import Example, Finding, found, percent
from lit_dpo.data.doctor.rows import Facts

FOLDS = 5
_Z = 1.959964  # of a normal distribution's 95 %
_SMOOTHING = 1.0


class Shortcut(NamedTuple):
    """How well a classifier of one feature tells the sides of a comparison, on prompts that it has not seen.

    Attributes:
        name: of the feature.
        accuracy: share of comparisons that it tells right; those that it cannot tell count half.
        low: lower end of the accuracy's 95 % interval, by Wilson.
        high: its upper end.
        comparisons: that were told, the sample's size.
        sign: what it goes by, in words.
    """

    name: str
    accuracy: float
    low: float
    high: float
    comparisons: int
    sign: str


def shortcuts(facts: Facts) -> list[Shortcut]:
    """Measure each feature by itself, in five folds: what is told was not learned from, nor was another of its prompt.

    Of a feature with names (a first word) the classifier learns how much oftener each is on the chosen side; of length,
    whether the longer or the shorter completion is chosen.
    """
    differ = _differing(facts)
    folds = np.array([facts.rows[row].normal % FOLDS for row in facts.row_of_comparison[differ].tolist()], np.int64)
    ones = facts.completions
    features: dict[str, Sequence[Hashable]] = {
        "first-word": [one.first for one in ones],
        "last-character": [one.last for one in ones],
        "outer-blank": [one.blank for one in ones],
        "script": [one.script for one in ones],
        "refusal": ["refuses" if one.refuses else "" for one in ones],
    }
    chosen, rejected = facts.chosen[differ], facts.rejected[differ]
    found = [_by_length(np.array([one.letters for one in ones], np.int64), chosen, rejected, folds)]
    return found + [_by_name(name, values, chosen, rejected, folds) for name, values in features.items()]


def shortcut_findings(facts: Facts, measured: Sequence[Shortcut]) -> Iterator[Finding]:
    """Make a finding of each."""
    for one in measured:
        name = "length-bias" if one.name == "length" else f"shortcut-{one.name}"
        count = round(one.accuracy * one.comparisons)
        interval = f"{percent(one.low)} to {percent(one.high)} on unseen prompts"
        detail = f"{interval}; {one.sign}" if one.sign else interval
        finding = found(name, count, one.comparisons, _longest_gap(facts) if one.name == "length" else (), low=one.low)
        yield finding._replace(share=one.accuracy, detail=detail)


def _differing(facts: Facts) -> NDArray[np.int64]:
    """Leave out comparisons of equal completions."""
    keys = np.array([one.key for one in facts.completions], np.int64)
    return np.flatnonzero(keys[facts.chosen] != keys[facts.rejected]) if len(keys) else np.zeros(0, np.int64)


def _longest_gap(facts: Facts) -> Iterator[Example]:
    letters = np.array([one.letters for one in facts.completions], np.int64)
    gaps = letters[facts.chosen] - letters[facts.rejected]
    for comparison in np.argsort(-np.abs(gaps), kind="stable")[:8].tolist():
        note = f"the chosen completion has {gaps[comparison]:+,} characters"
        yield Example(facts.place(int(facts.row_of_comparison[comparison])), note)


def _by_length(
    letters: NDArray[np.int64], chosen: NDArray[np.int64], rejected: NDArray[np.int64], folds: NDArray[np.int64]
) -> Shortcut:
    longer = np.sign(letters[chosen] - letters[rejected])
    scores = np.zeros(len(chosen))
    for fold in range(FOLDS):
        there = folds == fold
        scores[there] = longer[there] * (np.sign(longer[~there].sum()) or 1)
    decided = longer[longer != 0]
    sign = ""
    if len(decided):
        correlation = rank_correlation(letters[chosen], letters[rejected])
        sign = f"the chosen one is longer in {percent((decided > 0).mean())}, rank correlation {correlation:+.2f}"
    return _shortcut("length", scores, sign)


def _by_name(
    name: str,
    values: Sequence[Hashable],
    chosen: NDArray[np.int64],
    rejected: NDArray[np.int64],
    folds: NDArray[np.int64],
) -> Shortcut:
    numbers: dict[Hashable, int] = {}
    codes = np.array([numbers.setdefault(one, len(numbers)) for one in values], np.int64)
    better, worse = codes[chosen], codes[rejected]
    scores = np.zeros(len(chosen))
    for fold in range(FOLDS):
        there = folds == fold
        weights = _log_odds(better[~there], worse[~there], len(numbers))
        scores[there] = weights[better[there]] - weights[worse[there]]
    return _shortcut(name, scores, _sign([*numbers], better, worse))


def _log_odds(better: NDArray[np.int64], worse: NDArray[np.int64], size: int) -> NDArray[np.float64]:
    """How much oftener each value is chosen than rejected; where both have it, it tells nothing."""
    apart = better != worse
    chosen, rejected = (np.bincount(those[apart], minlength=size) for those in (better, worse))
    odds: NDArray[np.float64] = np.log((chosen + _SMOOTHING) / (rejected + _SMOOTHING))
    return odds


def _sign(names: Sequence[Hashable], better: NDArray[np.int64], worse: NDArray[np.int64]) -> str:
    """Say which value tells most."""
    apart = better != worse
    if not apart.any():
        return ""
    chosen, rejected = (np.bincount(those[apart], minlength=len(names)) for those in (better, worse))
    gaps = np.where([name == "" for name in names], -1, np.abs(chosen - rejected))  # "none" says less than another
    most = int(gaps.argmax())
    name = f"`{names[most]}`" if names[most] else "none"
    return f"{name} is chosen {chosen[most]:,} times, rejected {rejected[most]:,} times"


def _shortcut(name: str, scores: NDArray[np.float64], sign: str) -> Shortcut:
    """Count what is told right: the chosen completion has the higher score."""
    told = len(scores)
    right = float((scores > 0).sum() + 0.5 * (scores == 0).sum())
    low, high = wilson(right, told)
    return Shortcut(name, right / told if told else 0.5, low, high, told, sign)


def wilson(right: float, of: int) -> tuple[float, float]:
    """Return the 95 % interval of a share.

    Example:
        >>> [round(end, 3) for end in wilson(8, 10)]
        [0.49, 0.943]
    """
    if not of:
        return 0.0, 1.0
    share, square = right / of, _Z**2 / of
    middle, width = share + square / 2, _Z * math.sqrt(share * (1 - share) / of + square / (4 * of))
    return max(0.0, (middle - width) / (1 + square)), min(1.0, (middle + width) / (1 + square))


def rank_correlation(chosen: NDArray[np.int64], rejected: NDArray[np.int64]) -> float:
    """Return Spearman's correlation of a number with being chosen, over all sides; equal numbers share their rank.

    Example:
        >>> round(rank_correlation(np.array([5, 6, 7]), np.array([1, 2, 3])), 3)
        0.878
    """
    values = np.concatenate([chosen, rejected])
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[codes]
    role = np.repeat([1.0, 0.0], len(chosen))
    if ranks.std() == 0:
        return 0.0
    return float(np.corrcoef(ranks, role)[0, 1])
