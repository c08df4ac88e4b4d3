"""From scores to what is to be done: which labels to look at again, which pairs teach nothing, which stay hard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_dpo.tools.audit.dynamics import Numbers, Scores

FLIPPED, EASY, UNMOVED, HARD, NONE = "flipped", "easy", "unmoved", "hard", ""

MEANINGS: Mapping[str, str] = {
    FLIPPED: "likely labelled the wrong way round: training disagrees with the label more than with any other",
    EASY: "teaches nothing: the reference tells it apart already, and it has hardly a gradient from the start",
    UNMOVED: "teaches nothing: its margin stays where it began, whatever is trained",
    HARD: "hard or ambiguous: training goes back and forth",
}
"""What each verdict says."""

_LITTLE = 0.1
"""Of an equal share of the gradient, or of a usual margin: nothing to speak of."""

_FAR = 2.5
"""Standard deviations: of normal numbers 0.6 % are so far below the others."""


class Judged(NamedTuple):
    """The comparisons in the order in which they are to be looked at.

    Attributes:
        scores: of all comparisons.
        order: `(N,)` places in the scores, the most suspicious first.
        verdicts: `(N,)` of each comparison, in the order of the scores; "" where there is nothing to say.
        top: the share of the ranking that is looked at.
    """

    scores: Scores
    order: NDArray[np.int64]
    verdicts: NDArray[np.str_]
    top: float

    def of(self, verdict: str) -> NDArray[np.int64]:
        """Places of those with a verdict, in the order in which they are to be looked at."""
        found: NDArray[np.int64] = self.order[self.verdicts[self.order] == verdict]
        return found


def judge(scores: Scores, top: float = 0.1) -> Judged:
    """Rank the comparisons and give verdicts.

    Args:
        scores: of all comparisons.
        top: share of the ranking that may be called flipped, and share of the rest that may be called hard.
    """
    order = np.lexsort((scores.row, scores.confidence))
    count = len(order)
    first = np.zeros(count, bool)
    first[order[: round(top * count)]] = True
    # a label that training agrees with on the whole is not flipped, however few are worse; but what is learned by heart
    # is agreed with in the end: it was wrong before, and stands out
    flipped = first & ((scores.confidence < 0.5) | (_stands_out(scores.confidence) & (scores.correctness < 1)))
    usual = np.median(np.abs(scores.area))
    unmoved = (
        ~flipped
        & (scores.times > 1)
        & (np.abs(scores.area) < _LITTLE * usual)
        & (np.abs(scores.last_margin) < _LITTLE * usual)
    )
    # without a reference there is none that could have known
    easy = (scores.reference_margin > 0) & (scores.correctness == 1) & (scores.gradient < _LITTLE)
    rest = ~(flipped | unmoved | easy)
    wavering = np.flatnonzero(rest)[np.argsort(-scores.variability[rest], kind="stable")]
    hard = np.zeros(count, bool)
    hard[wavering[: round(top * count)]] = True
    hard &= (scores.correctness < 1) & (scores.times > 1)
    verdicts = np.select([flipped, unmoved, easy, hard], [FLIPPED, UNMOVED, EASY, HARD], NONE)
    return Judged(scores, order, verdicts, top)


def _stands_out(values: Numbers) -> NDArray[np.bool_]:
    """Which are far below the others: by the median and the deviations from it, which few outliers do not move."""
    middle = np.median(values)
    spread = 1.4826 * np.median(np.abs(values - middle))  # a standard deviation, of normal numbers
    return np.asarray(values < middle - _FAR * spread)


def weights(judged: Judged, given: Mapping[str, float]) -> Numbers:
    """`(N,)` what each comparison's loss is to be multiplied by; 1 where its verdict is given none."""
    return np.asarray([given.get(str(verdict), 1.0) for verdict in judged.verdicts], np.float64)
