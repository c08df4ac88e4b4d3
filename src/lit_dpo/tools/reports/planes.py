"""Plots with two axes. Shapes are SVG that stretches; ticks and names stand around them as text, which does not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lit_dpo.tools.reports.html import Child, Html, element

_SPREAD = 12  # from the least to the most, above which a logarithmic axis is the readable one
_LINE = 16  # pixels of a line of small text
_LETTER = 6.6  # pixels of a letter of it, on average


class Scale(NamedTuple):
    """An axis: what stands at its two ends."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return where a value stands, from 0 at the low end to 100."""
        low, high, value = (math.log10(max(one, 1e-300)) if self.log else one for one in (self.low, self.high, value))
        return round(min(100.0, max(0.0, 100 * (value - low) / (high - low))), 2)

    def ticks(self) -> list[float]:
        """Return the round numbers on it, a few of them.

        Example:
            >>> Scale(0.47, 1.02).ticks()
            [0.6, 0.8, 1.0]
        """
        if self.log:
            return _decades(self.low, self.high)
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        found = [d * 10.0**e for e in exponents for d in digits if low * 0.999 <= d * 10.0**e <= high * 1.001]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 7)]
    return found or [low, high]


def scale(values: Iterable[float], log: bool | None = None, room: float = 0.05) -> Scale | None:
    """Choose an axis that holds all values, or None where there is none to hold; what is not finite is left out.

    Args:
        values: of whatever will be drawn, intervals too.
        log: whether it is logarithmic; None lets the values say.
        room: share of it that is left free at both ends.
    """
    found = [value for value in values if math.isfinite(value)]
    if not found:
        return None
    positive = [value for value in found if value > 0]
    if log is None:
        log = len(positive) == len(found) and max(found) / min(found) > _SPREAD
    if log and positive:
        low, high = min(positive), max(positive)
        factor = max(high / low, 1.5) ** room
        return Scale(low / factor, high * factor, log=True)
    low, high = min(found), max(found)
    free = room * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - free, high + free)


def line(points: Iterable[tuple[float, float]], x: Scale, y: Scale, name: str) -> Html:
    """Draw a line through the points that are finite."""
    found = [(x.at(a), 100 - y.at(b)) for a, b in points if math.isfinite(a) and math.isfinite(b)]
    if len(found) == 1:
        return dot(*found[0], f"{name} small-dot")
    return element("path", d=_path(found), class_=f"line {name}")


def band(points: Iterable[tuple[float, float, float]], x: Scale, y: Scale, name: str) -> Html:
    """Fill from the second to the third number of the points, along the first."""
    found = [point for point in points if all(map(math.isfinite, point))]
    there = [(x.at(a), 100 - y.at(low)) for a, low, _ in found]
    back = [(x.at(a), 100 - y.at(high)) for a, _, high in reversed(found)]
    return element("path", d=_path([*there, *back]), class_=f"band {name}")


def dot(across: float, down: float, name: str) -> Html:
    """Draw a dot that stays round: a line of no length with round ends."""
    return element("path", d=f"M{across:g} {down:g}h0", class_=f"dot {name}")


def whisker(low: float, high: float, at: float, name: str, upright: bool = True) -> Html:
    """Draw an interval; all three are places from 0 to 100, of the plot."""
    a, b = ((at, low), (at, high)) if upright else ((low, at), (high, at))
    return element("path", d=_path([a, b]), class_=f"whisker {name}")


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:g} {b:g}" for a, b in points) if points else ""


def plane(
    shapes: Iterable[Html],
    x: Scale,
    y: Scale | None,
    label: str,
    *,
    marks: Iterable[Html] = (),
    at: Sequence[float] | None = None,
    names: tuple[str, str] = ("", ""),
    class_: str = "",
) -> Html:
    """Put shapes between axes.

    Args:
        shapes: in a square from 0 to 100, downwards.
        x: the axis below.
        y: the axis at the left; None where the rows of the plot say what they are.
        label: of the plot, for those who do not see it.
        marks: texts inside of it, which place themselves.
        at: ticks of the axis below, where they are not round numbers.
        names: of the two axes.
        class_: for the style.
    """
    across = [(tick, x.at(tick)) for tick in (x.ticks() if at is None else at)]
    upwards = [(tick, y.at(tick)) for tick in y.ticks()] if y else []
    grid = [element("path", d=f"M{place:g} 0v100", class_="grid") for _, place in across]
    grid += [element("path", d=f"M0 {100 - place:g}h100", class_="grid") for _, place in upwards]
    svg = element(
        "svg", *grid, *shapes, viewBox="0 0 100 100", preserveAspectRatio="none", role="img", aria_label=label
    )
    ticks = [element("span", written(tick), class_="tick x", style=f"left:{place:g}%") for tick, place in across]
    ticks += [element("span", written(tick), class_="tick y", style=f"top:{100 - place:g}%") for tick, place in upwards]
    said = [element("span", name, class_=f"name {axis}") for name, axis in zip(names, "xy", strict=True) if name]
    return element("div", svg, *ticks, *marks, *said, class_=f"plane {class_}".strip())


def written(tick: float) -> str:
    """Write a round number.

    Example:
        >>> written(1500.0), written(0.05), written(2e-6)
        ('1,500', '0.05', '2e−06')
    """
    whole = abs(tick) >= 1000 and tick == round(tick) and abs(tick) < 1e7
    return (f"{tick:,.0f}" if whole else f"{tick:g}").replace("-", "−")


def figure(title: Child, *children: Html, note: Child = "") -> Html:
    """Put a title over a plot."""
    said = [element("span", note, class_="soft small")] if note else []
    return element("figure", element("figcaption", title, *said), *children)


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


_SIDES = {"right": (9, 0), "left": (-9, 0), "above": (0, -15), "below": (0, 15)}
_CORNERS = {("right", -13): 7, ("right", 13): 7, ("left", -13): -7, ("left", 13): -7}


def named(
    points: Sequence[tuple[float, float]],
    names: Sequence[tuple[str, str]],
    width: float,
    height: float,
    class_: str,
) -> list[Html]:
    """Write names next to dots so that none covers a dot or another name; one that has no room is left out.

    Args:
        points: where the dots are, from 0 to 100, downwards.
        names: of them, with the class of a colour; the first ones have the first choice.
        width: of the plot in pixels, at least.
        height: of it.
        class_: for the style.
    """
    taken = [_around(a * width / 100, b * height / 100) for a, b in points]
    frame = _Box(-6, -12, width + 6, height + 6)
    found = []
    for (a, b), (name, colour) in zip(points, names, strict=True):
        for side, across, down in _choices():
            box = _box(a * width / 100 + across, b * height / 100 + down, side, len(name) * _LETTER + 4)
            inside = box.left >= frame.left and box.right <= frame.right and box.top >= frame.top
            if inside and box.bottom <= frame.bottom and not any(box.meets(other) for other in taken):
                taken.append(box)
                style = f"left:{a:g}%;top:{b:g}%;margin:{down:g}px 0 0 {across:g}px"
                found.append(element("span", name, class_=f"mark {side} {class_} {colour}", style=style))
                break
    return found


def _choices() -> Iterable[tuple[str, float, float]]:
    yield from ((side, across, down) for (side, down), across in _CORNERS.items())  # off lines that cross at a dot
    yield from ((side, *place) for side, place in _SIDES.items())
    yield from (("above", 0, -30), ("below", 0, 30))


def _around(a: float, b: float) -> _Box:
    return _Box(a - 6, b - 6, a + 6, b + 6)


def _box(a: float, b: float, side: str, width: float) -> _Box:
    left = {"right": a, "left": a - width}.get(side, a - width / 2)
    return _Box(left, b - _LINE / 2, left + width, b + _LINE / 2)


__all__ = ["Scale", "band", "dot", "figure", "line", "named", "plane", "scale", "whisker", "written"]
