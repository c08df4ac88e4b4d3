"""What was measured along the way: small multiples, with bands over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from lit_dpo.tools.ablate.records import Result
from lit_dpo.tools.reports.ablation.vocabulary import Arm, axis
from lit_dpo.tools.reports.html import Html, element, told
from lit_dpo.tools.reports.planes import Scale, band, figure, line, plane, scale

_POINTS = 80  # of a curve; more are not seen
_PANELS = {
    "reward_accuracy": "reward accuracy",
    "reward_margin": "reward margin",
    "chosen_reward": "reward of chosen",
    "rejected_reward": "reward of rejected",
}
_STAGES = {"train": "training", "val": "validation"}


class Point(NamedTuple):
    """A step of a curve, over the seeds that have a row there."""

    step: float
    mean: float
    low: float
    high: float


class Curve(NamedTuple):
    """An arm's measure over steps."""

    arm: Arm
    points: list[Point]
    dashed: bool = False


def over_seeds(runs: Sequence[Result], name: str) -> list[Point]:
    """Return the mean over seeds, the lowest and the highest at each step that was logged."""
    rows: dict[float, list[float]] = {}
    for run in runs:
        for step, value in _thinned([(row["step"], row[name]) for row in run.curves if name in row and "step" in row]):
            if math.isfinite(value):
                rows.setdefault(step, []).append(value)
    return [Point(step, sum(those) / len(those), min(those), max(those)) for step, those in sorted(rows.items())]


def _thinned(rows: list[tuple[float, float]]) -> Iterable[tuple[float, float]]:
    """Take means of neighbours where there are too many rows to be seen."""
    many = math.ceil(len(rows) / _POINTS)
    for start in range(0, len(rows), max(1, many)):
        part = rows[start : start + many]
        yield part[-1][0], sum(value for _, value in part) / len(part)


def section(arms: Sequence[Arm]) -> Iterator[Html]:
    """Draw the losses, a plot for each loss, and then what compares between losses."""
    steps = scale((row["step"] for arm in arms for run in arm.runs for row in run.curves if "step" in row), False, 0.02)
    panels = [] if steps is None else [*_losses(arms, steps), *_measures(arms, steps)]
    if not panels:
        return
    yield element("h2", "Curves")
    note = "Means over seeds; a band goes from the lowest to the highest seed. Point at a name to bring its lines out."
    yield element("p", note, class_="soft small")
    yield legend(arms)
    yield element("div", *panels, class_="panels")


def legend(arms: Sequence[Arm]) -> Html:
    """Name the colours; an arm that is pointed at stands out in all plots."""
    keys = [
        element("li", element("span", class_="swatch"), f"{one.number} ", told(one.name), class_=one.colour, tabindex=0)
        for one in arms
    ]
    return element("ul", *keys, class_="legend arms small")


def _losses(arms: Sequence[Arm], steps: Scale) -> Iterator[Html]:
    """Draw training and validation in one plot: what lies between them is what was learnt by heart."""
    for loss in dict.fromkeys(_loss(one) for one in arms):
        mine = [one for one in arms if _loss(one) == loss]
        train = [Curve(one, over_seeds(one.runs, "train/loss")) for one in mine]
        val = [Curve(one, over_seeds(one.runs, "val/loss"), dashed=True) for one in mine]
        yield from _panel(f"loss: {loss}" if loss else "loss", [*train, *val], steps, "dashed: validation", log=None)


def _loss(arm: Arm) -> str:
    """Return the kind of its loss: where the loss is varied, whatever else is varied of it."""
    return next((said for name, said in arm.summary.axes.items() if axis(name) == "loss"), arm.summary.loss)


def _measures(arms: Sequence[Arm], steps: Scale) -> Iterator[Html]:
    for name, title in _PANELS.items():
        for stage, said in _STAGES.items():
            yield from _panel(title, [Curve(one, over_seeds(one.runs, f"{stage}/{name}")) for one in arms], steps, said)


def _panel(title: str, curves: Sequence[Curve], x: Scale, note: str, log: bool | None = False) -> Iterator[Html]:
    points = [point for curve in curves for point in curve.points]
    y = scale((value for point in points for value in point[1:]), log=log)
    if y is None:
        return
    drawn = []
    for curve in reversed(curves):  # the best arm is drawn last, above the others
        colour = f"{curve.arm.colour} dashed" if curve.dashed else curve.arm.colour
        if len(curve.arm.runs) > 1:
            drawn.append(band(((one.step, one.low, one.high) for one in curve.points), x, y, colour))
        drawn.append(line(((one.step, one.mean) for one in curve.points), x, y, colour))
    yield figure(told(title), plane(drawn, x, y, f"{title} over steps, {note}", names=("step", "")), note=note)
