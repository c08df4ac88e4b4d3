"""What a measure costs: accuracy against KL, and both against what was varied in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lit_dpo.tools.ablate.records import Estimate
from lit_dpo.tools.reports.ablation.vocabulary import ACCURACY, KL, Arm, axis, colour, column, number, short
from lit_dpo.tools.reports.html import Html, element, told
from lit_dpo.tools.reports.planes import Scale, dot, figure, line, named, plane, scale, whisker

_WIDE, _NARROW, _HIGH = 940, 280, 400  # pixels: of the plot on a screen and a telephone, and its height in the style


def section(arms: Sequence[Arm]) -> Iterator[Html]:
    """Draw accuracy against KL, with the arms that none beats in both."""
    found = [one for one in arms if one.estimate(ACCURACY) and one.estimate(KL)]
    if not found:
        return
    kls, accuracies = ([one.summary.measures[key] for one in found] for key in (KL, ACCURACY))
    x, y = _scale(kls), _scale(accuracies, log=False)
    if x is None or y is None:
        return
    places = [(x.at(kl.value), 100 - y.at(accuracy.value)) for kl, accuracy in zip(kls, accuracies, strict=True)]
    best = pareto([(kl.value, accuracy.value) for kl, accuracy in zip(kls, accuracies, strict=True)])
    drawn = [line(_stairs([(kls[at].value, accuracies[at].value) for at in best], x.high), x, y, "pareto")]
    for one, kl, accuracy, (across, down) in zip(found, kls, accuracies, places, strict=True):
        drawn += _across(kl, x, down, one.colour) + _upright(accuracy, y, across, one.colour)
    drawn += [dot(*place, one.colour) for one, place in zip(found, places, strict=True)]
    said = [f"{one.number} {one.name}" for one in found]
    colours = [one.colour for one in found]
    wide = named(places, [*zip(said, colours, strict=True)], _WIDE, _HIGH, "on-wide")
    narrow = named(places, [(f"{one.number}", one.colour) for one in found], _NARROW, _HIGH, "on-narrow")
    yield element("h2", "What accuracy costs")
    yield element(
        "p",
        "The higher and the further left, the better: right on more held-out pairs, and nearer to the reference. Lines "
        "through a dot are its 95 % intervals. No arm is better in both than one on the stairs: ",
        told("; ".join(said[at] for at in best)),
        ".",
        class_="soft small",
    )
    drawn_plane = plane(
        drawn,
        x,
        y,
        "reward accuracy against KL",
        marks=[*wide, *narrow],
        names=("KL, nats per token", "accuracy"),
        class_="high",
    )
    yield element("section", drawn_plane, class_="card")


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which points none beats, by their first number: one that is lower in it and higher in the second.

    Example:
        >>> pareto([(1.0, 0.9), (0.5, 0.8), (2.0, 0.9)])
        [1, 0]
    """
    found: list[int] = []
    for at in sorted(range(len(points)), key=lambda at: (points[at][0], -points[at][1])):
        if not found or points[at][1] > points[found[-1]][1]:
            found.append(at)
    return found


def _stairs(points: list[tuple[float, float]], end: float) -> Iterator[tuple[float, float]]:
    """Go level from a point to above the next one: what is reached at each cost."""
    for (a, b), (after, _) in zip(points, [*points[1:], (end, 0.0)], strict=True):
        yield a, b
        yield after, b


def response(arms: Sequence[Arm]) -> Iterator[Html]:
    """Draw accuracy and KL against each axis of numbers, a line for each value of the others."""
    panels = [panel for name in _numeric(arms) for panel in _responses(arms, name)]
    if panels:
        yield element("h2", "What the numbers do")
        note = "Accuracy and KL over what was varied in numbers; whiskers are 95 % intervals."
        yield element("p", note, class_="soft small")
        yield element("div", *panels, class_="panels two-wide")


def _numeric(arms: Sequence[Arm]) -> list[str]:
    names = dict.fromkeys(name for one in arms for name in one.summary.axes)
    given = {name: {one.summary.axes[name] for one in arms if name in one.summary.axes} for name in names}
    return [name for name, said in given.items() if len(said) > 1 and all(number(one) is not None for one in said)]


def _responses(arms: Sequence[Arm], name: str) -> Iterator[Html]:
    lines: dict[str, list[Arm]] = {}
    for one in sorted(arms, key=lambda one: number(one.summary.axes.get(name, "")) or 0.0):
        if name in one.summary.axes:
            rest = {key: said for key, said in one.summary.axes.items() if key != name}
            lines.setdefault(short(rest) or one.summary.loss or "all", []).append(one)
    keys = [
        element("li", element("span", class_="swatch"), told(said), class_=colour(place))
        for place, said in enumerate(lines)
    ]
    legend = element("ul", *keys, class_="legend small")
    for key in (ACCURACY, KL):
        if drawn := _response(lines, name, key):
            yield figure(told(f"{column(key).title} over {axis(name)}"), drawn, legend)


def _response(lines: dict[str, list[Arm]], name: str, key: str) -> Html | None:
    there = {
        said: [(float(one.summary.axes[name]), given) for one in those if (given := one.estimate(key))]
        for said, those in lines.items()
    }
    values = sorted({at for points in there.values() for at, _ in points})
    x = scale(values, log=None if not values or min(values) <= 0 else max(values) / min(values) >= 4, room=0.08)
    y = _scale([given for points in there.values() for _, given in points], log=None if key == KL else False)
    if x is None or y is None:
        return None
    drawn = []
    for place, points in enumerate(there.values()):
        drawn.append(line([(at, given.value) for at, given in points], x, y, colour(place)))
        for at, given in points:
            drawn += _upright(given, y, x.at(at), colour(place))
            drawn.append(dot(x.at(at), 100 - y.at(given.value), f"{colour(place)} small-dot"))
    ticks = values if len(values) <= 6 else None
    return plane(drawn, x, y, f"{column(key).title} over {axis(name)}", at=ticks, names=(axis(name), ""))


def _scale(those: Sequence[Estimate], log: bool | None = None) -> Scale | None:
    """Hold the numbers, and of their intervals what does not squeeze the numbers into a corner."""
    if not those:
        return None
    values = [one.value for one in those]
    least, most = min(values), max(values)
    spread = (most - least) or abs(least) or 1.0
    low, high = least - 0.6 * spread, most + 0.6 * spread
    if log is None and least > 0:
        low = max(low, least / 2)
    if log is False:  # a share
        low, high = max(low, min(0.0, least)), min(high, max(1.0, most))
    ends = [min(high, max(low, end)) for one in those for end in one[1:] if math.isfinite(end)]
    found = scale([*values, *ends], log)
    if found and log is False and least >= 0 and most <= 1:  # no tick beyond what there can be
        return found._replace(low=max(found.low, -0.02), high=min(found.high, 1.02))
    return found


def _upright(given: Estimate, y: Scale, across: float, name: str) -> list[Html]:
    if not (math.isfinite(given.low) and math.isfinite(given.high)):
        return []
    return [whisker(100 - y.at(given.low), 100 - y.at(given.high), across, name)]


def _across(given: Estimate, x: Scale, down: float, name: str) -> list[Html]:
    if not (math.isfinite(given.low) and math.isfinite(given.high)):
        return []
    return [whisker(x.at(given.low), x.at(given.high), down, name, upright=False)]
