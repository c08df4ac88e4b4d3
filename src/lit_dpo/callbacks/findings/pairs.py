"""Rules that look at held-out pairs, or at those of an epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lit_dpo.callbacks.findings.base import Finding, History, Rule


@dataclass(frozen=True)
class Overfitting(Rule):
    """The margin of the training pairs grows while held-out pairs are told apart worse.

    Args:
        validations: for how many of them the accuracy stands below its best.
        errors: by how many standard errors.
    """

    when = "pairs"
    validations: int = 2
    errors: float = 2.0

    def __call__(self, seen: History) -> Finding | None:
        """Compare the last validations with the best one before them."""
        values = [row.get("reward_accuracy", math.nan) for row in seen.validations]
        last, before = values[-self.validations :], values[: -self.validations]
        if not before or not seen.validated or not seen.moved("reward_margin") > 0:
            return None
        best = max(before)
        error = math.sqrt(max(best * (1 - best), 0.25 / seen.validated) / seen.validated)
        if not all(value < best - self.errors * error for value in last):
            return None
        return Finding(
            f"accuracy on {seen.validated} held-out pairs fell from {best:.3f} to {last[-1]:.3f} while the margin in "
            f"training rose to {seen.now('reward_margin'):.3g}",
            "the policy learns the pairs by heart",
            "the checkpoint of the best validation, fewer epochs, or more pairs",
        )


@dataclass(frozen=True)
class MarginOutliers(Rule):
    """One pair is told apart unlike all others.

    Args:
        limit: of the distance to the median, in interquartile ranges.
        pairs: needed to say so.
    """

    when = "pairs"
    limit: float = 25.0
    pairs: int = 32

    def __call__(self, seen: History) -> Finding | None:
        """Look at the last pairs."""
        if seen.pairs is None or len(seen.pairs.margins) < self.pairs:
            return None
        margins = seen.pairs.margins
        low, middle, high = np.percentile(margins, [25, 50, 75])
        furthest = margins[np.abs(margins - middle).argmax()]
        if not abs(furthest - middle) > self.limit * (high - low) > 0:
            return None
        return Finding(
            f"one margin of {len(margins)} is {furthest:.3g}, and half of them lie between {low:.3g} and {high:.3g}",
            "means of margin and loss, and perhaps the gradient, are this pair's",
            "a look at it (`lit-dpo predict` lists margins by row): is it cut, empty or in another language? "
            "`--trainer.gradient_clip_val 1.0` limits what it does",
        )


@dataclass(frozen=True)
class LengthDrift(Rule):
    """Length is what is learnt: margins follow it, or sampled completions grow or shrink.

    Args:
        correlation: of margin and difference in length, in absolute value.
        pairs: needed to say so.
        ratio: of the mean length of sampled completions to that before training, or the other way round.
    """

    when = "pairs"
    correlation: float = 0.85
    pairs: int = 32
    ratio: float = 2.5

    def __call__(self, seen: History) -> Finding | None:
        """Look at the last pairs, and at what was sampled."""
        remedy = "a loss that takes length out (`SimPOLoss`, `LDDPOLoss`, `RDPOLoss`), or pairs of more equal lengths"
        if len(seen.lengths) > 1:
            first, *_, last = seen.lengths.values()
            if max(first, last) > self.ratio * min(first, last):
                return Finding(
                    f"sampled completions have {last:.0f} characters on average and had {first:.0f}",
                    "length may be what is learnt",
                    remedy,
                )
        if seen.pairs is None or len(seen.pairs.margins) < self.pairs:
            return None
        if not (np.ptp(seen.pairs.margins) > 0 and np.ptp(seen.pairs.longer) > 0 and seen.compared):
            return None
        found = float(np.corrcoef(seen.pairs.margins, seen.pairs.longer)[0, 1])
        if not abs(found) > self.correlation:
            return None
        return Finding(
            f"margins go with the difference in length, correlation {found:+.2f} over {len(seen.pairs.margins)} pairs",
            "length may be all that is told apart",
            remedy,
        )
