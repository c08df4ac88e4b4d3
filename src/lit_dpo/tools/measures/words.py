"""How numbers are said, wherever an ablation says them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lit_dpo.tools.ablate.records import ArmSummary, Comparison, Estimate, Summary

ALPHA = 0.05


def said(value: float) -> str:
    """Write a number for people: three decimals, of large ones three digits, of none a dash.

    Example:
        >>> said(0.81234), said(-12.3456), said(123456.0), said(0.0000123), said(float("nan"))
        ('0.812', '-12.3', '123,456', '1.2e-05', '–')
    """
    if not math.isfinite(value):
        return "–" if math.isnan(value) else str(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.1e}" if 0 < size < 0.0005 else f"{value:.3f}"


def with_interval(estimate: Estimate) -> str:
    """Write a number and its interval.

    Example:
        >>> with_interval(Estimate(0.8, 0.75, 0.85)), with_interval(Estimate(3.0, float("nan"), float("nan")))
        ('0.800 [0.750, 0.850]', '3.000')
    """
    if math.isnan(estimate.low):
        return said(estimate.value)
    return f"{said(estimate.value)} [{said(estimate.low)}, {said(estimate.high)}]"


def p_value(p: float) -> str:
    """Write a p-value.

    Example:
        >>> p_value(0.0404), p_value(0.0004)
        ('p = 0.040', 'p < 0.001')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def ordered(summary: Summary) -> Sequence[ArmSummary]:
    """Arms, the most accurate first; those without a number last."""

    def accuracy(arm: ArmSummary) -> float:
        found = arm.measures.get("reward_accuracy")
        return -math.inf if found is None or math.isnan(found.value) else found.value

    return sorted(summary.arms, key=lambda arm: -accuracy(arm))


def differ(comparison: Comparison) -> bool:
    """Whether a paired test tells two arms apart, at 5 % after Holm."""
    return comparison.p_holm < ALPHA


def sentence(comparison: Comparison) -> str:
    """Say what a paired test found, of two arms that differ.

    Example:
        >>> found = Comparison("reward_accuracy", "ipo", "dpo", Estimate(0.031, 0.010, 0.052), 0.002, 0.004)
        >>> sentence(found)
        'ipo is better than dpo by 0.031 [0.010, 0.052], p = 0.004 after Holm'
        >>> sentence(found._replace(measure="kl", difference=Estimate(-0.031, -0.052, -0.010)))
        'dpo is further from the reference than ipo by 0.031 [0.010, 0.052], p = 0.004 after Holm'
    """
    one, other, difference = comparison.arm, comparison.other, comparison.difference
    if difference.value < 0:
        one, other = other, one
        difference = Estimate(-difference.value, -difference.high, -difference.low)
    word = "is further from the reference than" if comparison.measure == "kl" else "is better than"
    return f"{one} {word} {other} by {with_interval(difference)}, {p_value(comparison.p_holm)} after Holm"
