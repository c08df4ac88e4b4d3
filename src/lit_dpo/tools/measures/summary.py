"""From tables of pairs and results to measures, intervals and paired tests; nothing else is looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_dpo.tools.ablate.records import ArmSummary, Estimate, Result, RunSummary, Summary
from lit_dpo.tools.measures.definitions import measure as definition
from lit_dpo.tools.measures.paired import Arm, compared
from lit_dpo.tools.measures.pairs import Pairs, ratios, read
from lit_dpo.tools.measures.statistics import (
    Clusters,
    Floats,
    calibration_sums,
    distinct,
    mean_over_seeds,
    percentile_interval,
    resampled,
    words,
)

if TYPE_CHECKING:
    import pyarrow as pa

_BINS = 40


def summarise(results: Sequence[Result], pairs: Mapping[str, pa.Table]) -> Summary:
    """Summarise runs: measures of each, means over the seeds of each arm, paired tests between arms.

    The same numbers for the same results and tables, to the last digit, in whatever order they come and were made: what
    is drawn is drawn from a fixed seed. Where one run says nothing of how a number varies (`distinct_1`, `seconds`),
    the ends of its interval are NaN.

    Args:
        results: of all runs, failed ones too.
        pairs: by run, what `pair_table` made of it. A run without has the measures of its result alone.
    """
    done = [one for one in results if one.status == "done"]
    tables = {one.name: read(pairs[one.name]) for one in done if one.name in pairs}
    runs = [RunSummary(one, _of_run(one, tables.get(one.name))) for one in done]
    by_arm = _arms(runs)
    arms = [_arm(name, those) for name, those in by_arm.items()]
    accuracy = {arm.name: arm.measures["reward_accuracy"].value for arm in arms if "reward_accuracy" in arm.measures}
    to_compare = [
        Arm(
            name,
            accuracy[name],
            {run.result.seed: tables[run.result.name] for run in those if run.result.name in tables},
        )
        for name, those in by_arm.items()
        if name in accuracy
    ]
    every = [tables[one.name] for one in done if one.name in tables]
    return Summary(
        runs=runs,
        failed=[one for one in results if one.status == "failed"],
        arms=arms,
        comparisons=compared(to_compare),
        losses=list(dict.fromkeys(name[5:] for one in every for name in one.numbers if name.startswith("loss/"))),
        margins=_histograms({arm.name: [table.margins for table in arm.runs.values()] for arm in to_compare}),
        pairs=len({key for one in every for key in one.keys}),
        prompts=len({prompt for one in every for prompt in one.prompts.tolist()}),
    )


def _of_run(result: Result, pairs: Pairs | None) -> dict[str, Estimate]:
    return {**({} if pairs is None else of_pairs(pairs)), **_of_completions(result), **_of_training(result)}


def of_pairs(pairs: Pairs) -> dict[str, Estimate]:
    """Measure a run on its held-out pairs, with 95 % intervals by resampling prompts."""
    measured = ratios(pairs)
    columns = [column for ratio in measured.values() for column in ratio]
    errors = calibration_sums(pairs.numbers["beta"] * pairs.margins)
    stacked = np.concatenate([np.stack(columns, 1), errors, np.ones((len(errors), 1))], 1)
    sums = Clusters.of(pairs.prompts).sums(stacked)
    count = 2 * len(measured)
    seen = _values(sums.sum(0, keepdims=True), count)[0]
    drawn = np.concatenate([_values(part, count) for part in resampled(sums)])
    low, high = percentile_interval(drawn)
    names = [*measured, "calibration_error"]
    return {
        name: Estimate(float(seen[place]), float(low[place]), float(high[place])) for place, name in enumerate(names)
    }


def _values(sums: Floats, count: int) -> Floats:
    """`(R, K)` measures of `(R, …)` sums: ratios first, then the calibration error."""
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may have no pair of a source
        measured = sums[:, 0:count:2] / sums[:, 1:count:2]
        error = np.abs(sums[:, count:-1]).sum(1, keepdims=True) / sums[:, -1:]
    found: Floats = np.concatenate([measured, error], 1)
    return found


def _of_completions(result: Result) -> dict[str, Estimate]:
    rows = result.completions
    if not rows:
        return {}
    texts = [str(row["policy"]) for row in rows]
    found = {
        "completion_length": _mean(np.array([float(len(words(text))) for text in texts])),
        "distinct_1": _alone(distinct(texts, 1)),
        "distinct_2": _alone(distinct(texts, 2)),
    }
    judged = [float(row["judged"]) for row in rows if row.get("judged") is not None]
    return {**found, "judged_better": _mean(np.array(judged))} if judged else found


def _of_training(result: Result) -> dict[str, Estimate]:
    speed = result.tokens / result.seconds if result.seconds else math.nan
    return {
        "seconds": _alone(result.seconds),
        "tokens_per_second": _alone(speed),
        "peak_memory": _alone(float(result.peak_memory or math.nan)),
    }


def _mean(values: Floats) -> Estimate:
    """Mean over prompts, with its interval by resampling them."""
    sums = values[:, None]
    drawn = np.concatenate([*resampled(sums)]) / len(values)
    low, high = percentile_interval(drawn)
    return Estimate(float(values.mean()), float(low[0]), float(high[0]))


def _alone(value: float) -> Estimate:
    """Return a number of which one run knows no interval."""
    return Estimate(float(value), math.nan, math.nan)


# ---- arms ----


def _arms(runs: Sequence[RunSummary]) -> dict[str, list[RunSummary]]:
    """Put runs together that differ in their seed alone, in the order of the first of each."""
    found: dict[str, list[RunSummary]] = {}
    for run in runs:
        found.setdefault(arm_name(run.result), []).append(run)
    return found


def arm_name(result: Result) -> str:
    """Name the arm of a run: what is varied, without the seed.

    Example:
        >>> arm_name(Result("loss=ipo,beta=0.1,seed=1", {"loss": "ipo", "beta": "0.1"}, 1, "done"))
        'loss=ipo,beta=0.1'
        >>> arm_name(Result("seed=1", {}, 1, "done"))
        'base'
    """
    return ",".join(f"{axis}={value}" for axis, value in result.axes.items()) or "base"


def _arm(name: str, runs: Sequence[RunSummary]) -> ArmSummary:
    names = dict.fromkeys(measure for run in runs for measure in run.measures)
    measures = {}
    for measure in names:
        values = [run.measures[measure] for run in runs if measure in run.measures]
        over = values[0] if len(values) == 1 else mean_over_seeds([one.value for one in values])
        measures[measure] = definition(measure).possible(over)
    first = runs[0].result
    return ArmSummary(name, first.axes, first.loss, [run.result.seed for run in runs], measures)


def _histograms(margins: Mapping[str, Sequence[Floats]]) -> dict[str, dict[str, Any]]:
    """Of each arm's margins, all seeds together; the bins of all are the same, 0 is a border, and the ends are open."""
    finite = {name: [one[np.isfinite(one)] for one in those] for name, those in margins.items()}
    every = np.concatenate([np.zeros(0), *(one for those in finite.values() for one in those)])
    if not len(every):
        return {}
    low, high = np.quantile(every, [0.005, 0.995])
    low, high = min(low, 0.0), max(high, 0.0)
    width = (high - low) / _BINS or 1.0
    edges = width * np.arange(math.floor(low / width), math.ceil(high / width) + 1)
    return {
        name: {
            "edges": edges.tolist(),
            "counts": np.histogram(np.clip(np.concatenate(those), edges[0], edges[-1]), edges)[0].tolist(),
        }
        for name, those in finite.items()
        if those
    }
