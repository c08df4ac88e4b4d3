"""Arms in numbers: the table, groups of pairs, and every loss on every arm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lit_dpo.tools.ablate.records import Estimate, Summary
from lit_dpo.tools.reports.ablation.vocabulary import COLUMNS, MISSING, Arm, Column, column, estimated, figures, value
from lit_dpo.tools.reports.html import Child, Html, element, table, told

GROUPS = {"source": "reward_accuracy/source=", "length": "reward_accuracy/length="}
_TITLES = {
    "source": ("Accuracy by source", "On the pairs of each source, or set."),
    "length": (
        "Accuracy by length",
        "On pairs whose chosen completion is shorter than the rejected one, equally long, or longer; and on the thirds "
        "of all pairs by the length of both. Right only where the chosen one is longer is a preference for length.",
    ),
}
_TWO = (
    " Two seeds say little of how much seeds matter: by Student's t their interval is 12.7 standard errors to each "
    "side. The paired tests below, on the same pairs, tell more."
)


def overview(arms: Sequence[Arm]) -> Iterator[Html]:
    """Put the arms under each other, with what was measured of each."""
    shown = [one for one in COLUMNS if any(arm.estimate(one.key) for arm in arms)]
    columns: list[Child] = ["arm", element("th", "seeds", class_="number")]
    columns += [element("th", one.title, class_="number") for one in shown]
    best = {one.key: _best([arm.estimate(one.key) for arm in arms], one) for one in shown}
    rows = [
        [_name(arm), _cell(f"{len(arm.summary.seeds)}"), *(_measured(arm, one, best[one.key]) for one in shown)]
        for arm in arms
    ]
    yield element("h2", "Arms")
    yield element(
        "p",
        "By accuracy. Means over seeds; below each its 95 % interval, over seeds or, where there is one seed, over "
        "prompts. The best of a column is bold. Point at a number for more of its digits."
        + (_TWO if any(len(arm.summary.seeds) == 2 for arm in arms) else ""),
        class_="soft small",
    )
    yield element("section", table(columns, rows), class_="card pinned")


def _name(arm: Arm, loss: bool = True) -> Html:
    parts: list[Child] = [
        element("span", class_="swatch"),
        element("span", f"{arm.number}", class_="rank"),
        told(arm.name),
    ]
    if loss and arm.loss:
        parts.append(told(arm.loss, class_="soft small under"))
    return element("td", *parts, class_=f"{arm.colour} who")


def _cell(*children: Child, **attributes: str | float) -> Html:
    return element("td", *children, **{"class_": "number", **attributes})


def _measured(arm: Arm, one: Column, best: float) -> Html:
    given = arm.estimate(one.key)
    if given is None:
        return _cell(MISSING)
    said, interval = estimated(given, one)
    number = element("b", said) if given.value == best else said
    parts: list[Child] = [number, *([element("span", interval, class_="soft under")] if interval else [])]
    return _cell(*parts, title=_exact(given), data_measure=one.key)


def _exact(given: Estimate) -> str:
    return f"{given.value!r}" + ("" if math.isnan(given.low + given.high) else f" ({given.low!r} to {given.high!r})")


def _best(given: Sequence[Estimate | None], one: Column) -> float:
    found = [each.value for each in given if each is not None]
    if not one.better or len({*found}) < 2:  # where all are equal, none is the best
        return math.nan
    return one.better * max(one.better * each for each in found)


def groups(arms: Sequence[Arm]) -> Iterator[Html]:
    """Put the accuracy on each source of pairs, and on each bucket of lengths, under each other."""
    for kind, prefix in GROUPS.items():
        names = dict.fromkeys(key for arm in arms for key in arm.summary.measures if key.startswith(prefix))
        shown = [column(key, key.removeprefix(prefix).replace("_", " ")) for key in names]
        if len(shown) < 2:
            continue
        title, note = _TITLES[kind]
        columns: list[Child] = ["arm", *(element("th", told(one.title), class_="number") for one in shown)]
        best = {one.key: _best([arm.estimate(one.key) for arm in arms], one) for one in shown}
        rows = [[_name(arm, loss=False), *(_measured(arm, one, best[one.key]) for one in shown)] for arm in arms]
        yield element("h2", title)
        yield element("p", note, class_="soft small")
        yield element("section", table(columns, rows), class_="card pinned")


def matrix(summary: Summary, arms: Sequence[Arm]) -> Iterator[Html]:
    """Put every loss's value on every arm: trained with, by row, and measured by, by column."""
    losses = [name for name in summary.losses if any(arm.estimate(f"loss/{name}") for arm in arms)]
    if not losses:
        return
    yield element("h2", "Trained with × measured by")
    yield element(
        "p",
        "Each loss's mean value on the held-out pairs, whatever the arm was trained with; the darker, the lower among "
        "the arms. Columns do not compare with each other. A frame is the loss that the arm was trained with; the "
        "small number is the mean weight of a pair in that loss's gradient: near 0 it has nothing more to ask for.",
        class_="soft small",
    )
    ranks = {name: _ranks([value(arm.summary.measures, f"loss/{name}") for arm in arms]) for name in losses}
    columns: list[Child] = ["arm", *(element("th", told(name), class_="number") for name in losses)]
    rows = [
        [_name(arm), *(_judged(arm, name, ranks[name][place]) for name in losses)] for place, arm in enumerate(arms)
    ]
    yield element("section", table(columns, rows), class_="card pinned matrix")


def _judged(arm: Arm, loss: str, rank: float) -> Html:
    given, weight = (arm.estimate(f"{kind}/{loss}") for kind in ("loss", "weight"))
    if given is None:
        return _cell(MISSING)
    under = [element("span", figures(weight.value, 3), class_="soft under")] if weight else []
    own = " own" if arm.summary.loss == loss else ""
    shade = f"background:color-mix(in srgb, var(--accent) {36 * (1 - rank):.0f}%, transparent)"
    return _cell(figures(given.value, 4), *under, title=_exact(given), style=shade, class_=f"number{own}")


def _ranks(values: Sequence[float]) -> list[float]:
    """Return where each value stands among all, from 0 for the lowest to 1; 1 for what is missing."""
    found = sorted({one for one in values if math.isfinite(one)})
    last = max(1, len(found) - 1)
    return [found.index(one) / last if math.isfinite(one) else 1.0 for one in values]
