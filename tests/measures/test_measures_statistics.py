"""Intervals and tests against tables, closed forms and known distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_dpo.tools.measures.statistics import (
    Clusters,
    bootstrap_p,
    calibration_error,
    distinct,
    holm,
    mean_over_seeds,
    percentile_interval,
    resampled,
    t_cdf,
    t_quantile,
    words,
)


@pytest.mark.parametrize(
    ("share", "degrees", "expected"),
    # Fisher and Yates, Statistical Tables, as in every textbook
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 3, 3.1824),
        (0.975, 4, 2.7764),
        (0.975, 9, 2.2622),
        (0.975, 30, 2.0423),
        (0.975, 120, 1.9799),
        (0.95, 1, 6.3138),
        (0.995, 7, 3.4995),
        (0.025, 5, -2.5706),
        (0.5, 3, 0.0),
    ],
)
def test_t_quantiles_are_those_of_the_tables(share, degrees, expected):
    assert t_quantile(share, degrees) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("degrees", [1, 2, 3, 6, 11, 40])
def test_the_t_distribution_is_the_integral_of_its_density(degrees):
    grid = np.linspace(0, 3, 20_001)
    factor = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    density = factor * (1 + grid**2 / degrees) ** (-(degrees + 1) / 2)
    inside = float(((density[1:] + density[:-1]) / 2 * np.diff(grid)).sum())
    assert t_cdf(3.0, degrees) == pytest.approx(0.5 + inside, abs=1e-8)
    assert t_cdf(-3.0, degrees) == pytest.approx(0.5 - inside, abs=1e-8)


def test_quantiles_are_symmetric_and_of_shares_alone():
    assert t_quantile(0.025, 3) == pytest.approx(-t_quantile(0.975, 3), rel=1e-12)
    with pytest.raises(ValueError, match="in \\(0, 1\\) but got 1"):
        t_quantile(1, 3)


def test_measures_that_no_resample_has_have_no_interval():
    ends = percentile_interval(np.full((9, 2), np.nan))
    assert np.isnan(ends).all()
    assert np.shape(ends) == (2, 2)


def test_a_mean_over_seeds_has_a_t_interval():
    found = mean_over_seeds([0.70, 0.74, 0.75, math.nan])  # s = 0.026458, t(2) = 4.3027
    assert found == pytest.approx((0.73, 0.73 - 0.065724, 0.73 + 0.065724), abs=1e-6)
    one = mean_over_seeds([0.7])
    assert one.value == 0.7
    assert math.isnan(one.low)


def test_holm_is_the_worked_example():
    """Four tests of Holm's procedure: 0.005·4, then 0.01·3, then 0.03·2, and 0.04·1 is not below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, math.nan, 0.9]) == pytest.approx([1.0, math.nan, 1.0], nan_ok=True)
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_holm_lies_between_no_correction_and_bonferroni(given_p):
    for p, corrected in zip(given_p, holm(given_p), strict=True):
        assert p <= corrected <= min(1, p * len(given_p)) + 1e-12


def test_clusters_are_resampled_whole():
    labels = np.array([3, 1, 3, 2])
    sums = Clusters.of(labels).sums(np.array([[1.0], [10.0], [2.0], [100.0]]))
    assert sums[:, 0].tolist() == [10.0, 100.0, 3.0]  # of 1, 2, 3
    drawn = np.concatenate([*resampled(sums, 300)])
    possible = {10 * i + 100 * j + 3 * (3 - i - j) for i in range(4) for j in range(4 - i)}
    assert set(drawn[:, 0].tolist()) == possible  # all ways to draw three of them


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Accuracy 0.7 on prompts of one to four comparisons that stand and fall together: 95 % of 200 experiments."""
    random, covered = np.random.default_rng(0), 0
    for seed in range(200):
        sizes = random.integers(1, 5, 80)
        right = np.repeat(random.random(80) < 0.7, sizes).astype(float)
        labels = np.repeat(np.arange(80), sizes)
        sums = Clusters.of(labels).sums(np.stack([right, np.ones_like(right)], 1))
        drawn = np.concatenate([*resampled(sums, 200, seed)])
        low, high = percentile_interval(drawn[:, :1] / drawn[:, 1:])
        covered += bool(low[0] <= 0.7 <= high[0])
    assert 0.91 <= covered / 200 <= 0.98  # rows as if they were independent: 0.82


def test_the_p_value_is_uniform_where_nothing_differs():
    random = np.random.default_rng(1)
    found = []
    for seed in range(200):
        differences = random.normal(size=(60, 1))
        drawn = np.concatenate([*resampled(differences, 200, seed)])[:, 0]
        found.append(bootstrap_p(drawn))
    shares = [(np.array(found) < alpha).mean() for alpha in (0.05, 0.2, 0.5)]
    assert shares == pytest.approx([0.05, 0.2, 0.5], abs=0.07)


def test_the_p_value_counts_what_was_seen():
    assert bootstrap_p(np.full(1999, 0.3)) == 2 / 2000
    assert bootstrap_p(np.zeros(1999)) == 1.0
    assert math.isnan(bootstrap_p(np.array([0.1, math.nan])))


def test_resamples_without_a_measure_are_left_out():
    values = np.array([[1.0, math.nan, math.nan], [2.0, 5.0, math.nan], [3.0, 5.0, math.nan]])
    low, high = percentile_interval(values)
    assert low == pytest.approx([1.05, 5.0, math.nan], nan_ok=True)
    assert high == pytest.approx([2.95, 5.0, math.nan], nan_ok=True)


def test_calibration_has_its_closed_forms():
    sure = math.log(3)  # confidence 3/4
    assert calibration_error(np.array([sure, sure, sure, -sure])) == pytest.approx(0)
    assert calibration_error(np.array([sure] * 3)) == pytest.approx(0.25)
    assert calibration_error(np.array([-sure] * 3)) == pytest.approx(0.75)
    assert calibration_error(np.zeros(5)) == 0  # says ½, and ½ is right
    assert calibration_error(np.array([800.0, -800.0])) == pytest.approx(0.5)
    # two bins, weighted by their pairs: (2·|0.75 − 1| + 1·|0.9 − 0|)/3
    assert calibration_error(np.array([sure, sure, -math.log(9)])) == pytest.approx((2 * 0.25 + 0.9) / 3)


def test_a_policy_that_knows_what_it_knows_is_calibrated():
    random = np.random.default_rng(0)
    z = random.normal(0, 2, 40_000)
    truth = np.where(random.random(len(z)) < 1 / (1 + np.exp(-np.abs(z))), 1, -1)
    assert calibration_error(np.abs(z) * truth) < 0.01
    assert calibration_error(3 * np.abs(z) * truth) > 0.1


def test_words_and_their_runs_are_counted():
    assert words("He said: “A-b?” 猫が好き") == ["he", "said", "a", "b", "猫", "が", "好", "き"]
    assert distinct(["a b a", "a b"], 1) == 2 / 5
    assert distinct(["a b a", "a b"], 2) == 2 / 3
    assert math.isnan(distinct(["a", ""], 2))
