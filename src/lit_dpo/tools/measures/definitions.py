"""Every measure of an ablation, defined once: for the report, the documentation and whoever reads a column."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from lit_dpo.tools.ablate.records import Estimate


class Measure(NamedTuple):
    """What a number is.

    Attributes:
        name: of the column.
        unit: of its values.
        formula: over held-out comparisons. Δ_w and Δ_l are log π − log π_ref of the chosen and the rejected completion,
            sums over its n_w and n_l tokens in nats, Δ = Δ_w − Δ_l.
        better: which direction is, or `neither`.
        says: what it is for, in words.
        least: that it can be; a share is at most 1.
    """

    name: str
    unit: str
    formula: str
    better: Literal["higher", "lower", "neither"]
    says: str
    least: float = -math.inf

    def possible(self, estimate: Estimate) -> Estimate:
        """Cut an interval off where there are no values: that of a mean over two seeds may go far beyond.

        Example:
            >>> measure("reward_accuracy").possible(Estimate(0.75, -0.9, 2.4))
            Estimate(value=0.75, low=0.0, high=1.0)
        """
        most = 1.0 if self.unit == "share" else math.inf
        least = 0.0 if self.unit == "share" else self.least
        value, low, high = estimate  # NaN, where there is no interval, stays
        return Estimate(value, least if low < least else low, most if high > most else high)


MEASURES = (
    Measure(
        "reward_accuracy",
        "share",
        "mean of [Δ > 0] + ½·[Δ = 0]",
        "higher",
        "how often the chosen completion has gained more, against the reference, than the rejected one",
    ),
    Measure(
        "reward_accuracy_normalized",
        "share",
        "mean of [Δ_w/n_w > Δ_l/n_l], ties ½",
        "higher",
        "the same per token: what is left of the accuracy if length may not help",
    ),
    Measure("margin", "nats", "mean of Δ", "higher", "by how much the chosen completion has gained more"),
    Measure("margin_per_token", "nats per token", "mean of Δ_w/n_w − Δ_l/n_l", "higher", "the same per token"),
    Measure(
        "kl",
        "nats per token",
        "Σ ½·(log π − log π_ref)² over all tokens of both completions / their number",
        "lower",
        "how far the policy has moved from the reference on these texts: the price of the accuracy",
        0.0,
    ),
    Measure(
        "displacement",
        "nats per token",
        "Σ Δ_w / Σ n_w",
        "higher",
        "what became of the chosen completions: below 0 they are less likely than before (likelihood displacement)",
    ),
    Measure(
        "displaced", "share", "mean of [Δ_w < 0]", "lower", "how many chosen completions are less likely than before"
    ),
    Measure(
        "calibration_error",
        "share",
        "Σ_b n_b/N·|accuracy_b − confidence_b| over 10 bins of confidence σ(β·|Δ|), of equal width in [½, 1]",
        "lower",
        "how wrong σ(βΔ) is as a probability that the policy orders a pair rightly (ECE)",
    ),
    Measure("completion_length", "words", "mean over sampled completions", "neither", "how much the policy says", 0.0),
    Measure(
        "distinct_1",
        "share",
        "different words / words, of all sampled completions",
        "higher",
        "how varied its words are",
    ),
    Measure(
        "distinct_2",
        "share",
        "different pairs of words / pairs of words, of all sampled completions",
        "higher",
        "how varied its phrases are",
    ),
    Measure(
        "judged_better",
        "share",
        "mean over sampled completions of 1, ½ or 0",
        "higher",
        "how often the judge finds the policy's completion better than the reference's",
    ),
    Measure("seconds", "seconds", "of `fit`", "lower", "what training took", 0.0),
    Measure("tokens_per_second", "tokens per second", "trained tokens / seconds", "higher", "how fast it trained", 0.0),
    Measure("peak_memory", "bytes", "most that was in use", "lower", "what it needed", 0.0),
)

_FAMILIES = (
    Measure(
        "loss/",
        "the loss's",
        "mean of this loss over comparisons, of one over lists of its prompt's value",
        "lower",
        "what the policy is worth to this loss, whatever it was trained with",
    ),
    Measure(
        "weight/",
        "the loss's, per nat",
        "mean of |∂L/∂ log π| over the tokens of a chosen completion, then over comparisons",
        "neither",
        "how hard this loss would still pull: for DPO β·σ(−βΔ)",
        0.0,
    ),
    Measure(
        "reward_accuracy/source=",
        "share",
        "`reward_accuracy` of the comparisons of one source or set",
        "higher",
        "where it is right",
    ),
    Measure(
        "reward_accuracy/length=",
        "share",
        "`reward_accuracy` of pairs whose chosen completion is shorter, of equal length, or longer; and of thirds of "
        "all pairs by n_w + n_l (short, medium, long)",
        "higher",
        "whether it is right, or only prefers long completions",
    ),
)


def measure(name: str) -> Measure:
    """Define a measure, also one of a family, such as `loss/ipo`.

    Raises:
        KeyError: if there is none of this name.

    Example:
        >>> measure("kl").unit, measure("loss/ipo").better
        ('nats per token', 'lower')
    """
    for one in MEASURES:
        if one.name == name:
            return one
    for one in _FAMILIES:
        if name.startswith(one.name) and len(name) > len(one.name):
            return one._replace(name=name)
    raise KeyError(name)


def families() -> tuple[Measure, ...]:
    """Return those that stand for several columns, `loss/NAME` for instance."""
    return tuple(one._replace(name=f"{one.name}NAME") for one in _FAMILIES)
