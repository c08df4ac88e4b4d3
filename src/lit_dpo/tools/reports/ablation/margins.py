"""How each arm's margins are spread over the held-out pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lit_dpo.tools.reports.ablation.vocabulary import ACCURACY, Arm, column, estimated
from lit_dpo.tools.reports.html import Html, element, told
from lit_dpo.tools.reports.planes import Scale, plane

_KEPT = (0.005, 0.995)  # of all margins, between which the plots reach


def section(margins: Mapping[str, Mapping[str, Any]], arms: Sequence[Arm]) -> Iterator[Html]:
    """Draw a histogram of each arm, all over the same axis."""
    found = [(arm, _read(margins[arm.summary.name])) for arm in arms if arm.summary.name in margins]
    found = [(arm, (edges, counts)) for arm, (edges, counts) in found if counts.sum() > 0]
    if not found:
        return
    x = _axis([histogram for _, histogram in found])
    yield element("h2", "Margins")
    yield element(
        "p",
        "How many held-out pairs have which margin: by how many nats chosen's log-ratio is above rejected's, "
        "without β. Left of 0 a pair is ranked wrong. The axis leaves out the half percent at each end.",
        class_="soft small",
    )
    rows = [_row(arm, *histogram, x, last=place == len(found) - 1) for place, (arm, histogram) in enumerate(found)]
    yield element("section", *rows, class_="card ridges")


def _read(given: Mapping[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return np.asarray(given["edges"], float), np.nan_to_num(np.asarray(given["counts"], float))


def _axis(histograms: Sequence[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]) -> Scale:
    """Reach from the lowest margins to the highest ones, and over 0."""
    ends = [_quantiles(edges, counts) for edges, counts in histograms]
    low, high = min(0.0, *(end for end, _ in ends)), max(0.0, *(end for _, end in ends))
    free = 0.03 * (high - low) or 1.0
    return Scale(low - free, high + free)


def _quantiles(edges: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> tuple[float, float]:
    shares = np.cumsum(counts) / counts.sum()
    first, last = np.searchsorted(shares, _KEPT)
    return float(edges[first]), float(edges[min(last + 1, len(edges) - 1)])


def _row(arm: Arm, edges: np.ndarray[Any, Any], counts: np.ndarray[Any, Any], x: Scale, last: bool) -> Html:
    density = counts / np.maximum(np.diff(edges), 1e-12)
    heights = 100 * density / density.max()
    sides = {"rejected": edges[1:] <= 0, "chosen": edges[:-1] >= 0}
    sides["prompt"] = ~(sides["rejected"] | sides["chosen"])  # a bin that 0 is in
    inside = (edges[1:] > x.low) & (edges[:-1] < x.high)
    drawn = [_bars(edges, np.where(where & inside, heights, 0), x, name) for name, where in sides.items()]
    drawn.append(element("path", d=f"M{x.at(0):g} 0v100", class_="zero"))
    given = arm.estimate(ACCURACY)
    said, _ = estimated(given, column(ACCURACY))
    label = element("div", element("span", f"{arm.number} ", class_="soft"), told(arm.name), class_="small wrap")
    right = element("div", said if given else "", class_="small soft right")
    plot = plane(drawn, x, None, f"margins of {arm.name}", names=("margin, nats" if last else "", ""), class_="ridge")
    return element("div", label, plot, right, class_="ridge-row last" if last else "ridge-row")


def _bars(edges: np.ndarray[Any, Any], heights: np.ndarray[Any, Any], x: Scale, name: str) -> Html:
    parts = [
        f"M{x.at(float(left)):g} 100V{100 - height:.4g}H{x.at(float(right)):g}V100z"
        for left, right, height in zip(edges, edges[1:], heights, strict=False)
        if height > 0
    ]
    return element("path", d="".join(parts), class_=name)
