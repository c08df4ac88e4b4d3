"""Plots as SVG. They hold shapes only, which may be stretched; what they say in words stands around them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lit_dpo.tools.reports.html import Html, element

_BINS = 40
_HEIGHT = 100


def histogram(series: Mapping[str, NDArray[np.int64]], label: str) -> tuple[Html, int]:
    """Draw how often each length is there, a second series downwards; what is longer than 99 % is in the last bin.

    Args:
        series: one or two lengths, by the name of their colour.
        label: of the plot.

    Returns:
        The plot, and the length at its right end.
    """
    every = np.concatenate([*series.values()])
    end = max(1, int(np.ceil(np.percentile(every, 99))))
    edges = np.linspace(0, end, min(_BINS, end) + 1)
    counts = {name: np.histogram(np.minimum(those, end), edges)[0] for name, those in series.items()}
    most = max(1, *(int(one.max()) for one in counts.values()))
    room = _HEIGHT / len(counts)
    bars = [
        _bar(place, room * count / most, room, name, down=number > 0)
        for number, (name, those) in enumerate(counts.items())
        for place, count in enumerate(those)
    ]
    return _plot(len(edges) - 1, *bars, label=label, class_="plot tall"), end


def _bar(place: int, height: float, middle: float, name: str, down: bool) -> Html:
    top = middle if down else middle - height
    return element("rect", x=place + 0.06, y=round(top, 2), width=0.88, height=round(height, 2), class_=name)


def interval(low: float, middle: float, high: float, threshold: float, label: str) -> Html:
    """Draw an accuracy between 0.4 and 1 with its interval, chance and the threshold."""

    def at(share: float) -> float:
        return round(_HEIGHT * (min(1.0, max(0.4, share)) - 0.4) / 0.6, 2)

    return _plot(
        _HEIGHT,
        element("rect", x=0, y=48, width=_HEIGHT, height=4, class_="track"),
        element("rect", x=at(low), y=38, width=max(0.5, at(high) - at(low)), height=24, class_="interval"),
        element("rect", x=at(0.5) - 0.2, y=0, width=0.4, height=_HEIGHT, class_="chance"),
        element("rect", x=at(threshold) - 0.2, y=0, width=0.4, height=_HEIGHT, class_="threshold"),
        element("rect", x=at(middle) - 0.6, y=20, width=1.2, height=60, class_="middle"),
        label=label,
        class_="plot thin",
    )


def bar(share: float, label: str, name: str = "bar") -> Html:
    """Draw a share of a line."""
    width = round(_HEIGHT * min(1.0, max(0.0, share)), 2)
    track = element("rect", x=0, y=0, width=_HEIGHT, height=_HEIGHT, class_="track")
    filled = element("rect", x=0, y=0, width=width, height=_HEIGHT, class_=name)
    return _plot(_HEIGHT, track, filled, label=label, class_="plot line")


def _plot(width: float, *shapes: Html, label: str, class_: str) -> Html:
    return element(
        "svg",
        *shapes,
        viewBox=f"0 0 {width:g} {_HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
        class_=class_,
    )
