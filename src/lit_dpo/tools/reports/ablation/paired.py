"""Which arms can be told apart: paired tests on the same pairs, in numbers, in a plot and in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lit_dpo.tools.ablate.records import Comparison, Estimate, Summary
from lit_dpo.tools.reports.ablation.vocabulary import ACCURACY, Arm, Column, column, estimated, listed, value
from lit_dpo.tools.reports.html import Child, Html, element, joined, table, told
from lit_dpo.tools.reports.planes import dot, plane, scale, whisker

_LEVEL = 0.05


def verdict(summary: Summary, arms: Sequence[Arm]) -> Html:
    """Say which arm is the best by accuracy, and which ones cannot be told from it."""
    if not arms or (accuracy := arms[0].estimate(ACCURACY)) is None:
        return joined("No arm has a reward accuracy, so there is none that is the best.")
    best = arms[0]
    said, interval = estimated(accuracy, column(ACCURACY))
    between = f" (95 % interval: {interval})" if interval else ""
    parts: list[Child] = ["Best by held-out reward accuracy is ", told(best.name, "b"), f" with {said}{between}"]
    if len(arms) == 1:
        return joined(*parts, ".")
    if all(value(arm.summary.measures, ACCURACY) == accuracy.value for arm in arms):
        return joined(f"All have the same held-out reward accuracy, {said}{between}: by it none is the best.")
    against = {
        one.other: one for one in (_from(one, best.summary.name) for one in of(summary, ACCURACY)) if one is not None
    }
    alike = [one for one in arms[1:] if one.summary.name not in against or not told_apart(against[one.summary.name])]
    if not alike:
        which = "the other one" if len(arms) == 2 else f"all {len(arms) - 1} others"
        return joined(*parts, f"; paired on the same pairs, it can be told from {which}.")
    if len(alike) == len(arms) - 1:
        which = "The other one" if len(arms) == 2 else f"None of the {len(alike)} others"
        cannot = "cannot" if len(arms) == 2 else "can"
        return joined(*parts, f". {which} {cannot} be told from it on these pairs.")
    return joined(
        *parts, ". What cannot be told from it on these pairs: ", told(listed(one.name for one in alike)), "."
    )


def of(summary: Summary, key: str) -> list[Comparison]:
    """Return the comparisons of a measure."""
    return [one for one in summary.comparisons if one.measure == key]


def told_apart(one: Comparison) -> bool:
    """Say whether two arms differ, by the corrected p."""
    return one.p_holm < _LEVEL


def _from(one: Comparison, arm: str) -> Comparison | None:
    """Turn a comparison so that it begins with an arm; None if that is not in it."""
    if one.arm == arm:
        return one
    if one.other != arm:
        return None
    value, low, high = one.difference
    return one._replace(arm=arm, other=one.arm, difference=Estimate(-value, -high, -low))


def section(summary: Summary, arms: Sequence[Arm]) -> Iterator[Html]:
    """Compare the best arm with each other one, measure by measure; then all with all."""
    if not summary.comparisons:
        return
    yield element("h2", "Can they be told apart?")
    yield element(
        "p",
        "Differences on the same held-out pairs, by bootstrap over prompts, with 95 % intervals; p is corrected for "
        "all comparisons of a measure (Holm 1979). Below 0.05 two arms are told apart; faint ones are not, and "
        "more pairs or more seeds may tell them. That they are equal is not shown.",
        class_="soft small",
    )
    for key in dict.fromkeys(one.measure for one in summary.comparisons):
        yield element("section", *_measure(of(summary, key), arms, column(key)), class_="card")


def _measure(those: Sequence[Comparison], arms: Sequence[Arm], one: Column) -> Iterator[Html]:
    names = {arm.summary.name: arm for arm in arms}
    those = [each for each in those if each.arm in names and each.other in names]
    best = next((arm for arm in arms if any(arm.summary.name in each[1:3] for each in those)), None)
    if best is None:
        return
    yield element("h3", told(best.name), f" compared with the others: {one.title}")
    against = [each for each in (_from(each, best.summary.name) for each in those) if each]
    against.sort(key=lambda each: names[each.other].number)
    yield forest(against, names, one)
    words = element("ul", *(element("li", *_words(each, names, one)) for each in against), class_="small")
    yield words if one.key == ACCURACY else element("details", element("summary", "In words"), words)
    if len(those) > len(against):
        summary = element("summary", f"All {len(those)} comparisons")
        yield element("details", summary, _table(those, names, one))


def forest(those: Sequence[Comparison], names: dict[str, Arm], one: Column) -> Html:
    """Draw each difference with its interval, and the line of no difference."""
    x = scale([0.0, *(end for each in those for end in each.difference)], log=False)
    assert x is not None
    drawn = [element("path", d=f"M{x.at(0):g} 0v100", class_="zero")]
    labels = []
    for place, each in enumerate(those):
        down = round(100 * (place + 0.5) / len(those), 2)
        apart = "" if told_apart(each) else " open"
        value, low, high = each.difference
        if math.isfinite(low) and math.isfinite(high):
            drawn.append(whisker(x.at(low), x.at(high), down, f"{names[each.other].colour}{apart}", upright=False))
        if math.isfinite(value):
            drawn.append(dot(x.at(value), down, f"{names[each.other].colour}{apart}"))
        labels.append(element("span", told(names[each.other].name), class_="row-name", style=f"top:{down:g}%"))
    label = f"differences in {one.title}, with intervals"
    drawn_plane = plane(drawn, x, None, label, marks=labels, names=(f"difference in {one.title}", ""), class_="rows")
    return element("div", drawn_plane, style=f"--rows:{len(those)}")


def _words(each: Comparison, names: dict[str, Arm], one: Column) -> Iterator[Child]:
    """Say where the first arm stands, seen from the other."""
    value = each.difference.value
    other = told(names[each.other].name, "b")
    if not math.isfinite(value):
        yield from ("Not compared with ", other, ": there is no number.")
    elif told_apart(each):
        size = Estimate(
            abs(value), *sorted(each.difference[1:] if value > 0 else (-end for end in each.difference[1:]))
        )
        yield from ("Above " if value > 0 else "Below ", other, f" by {difference(size, one)}")
        yield f", {probability(each.p_holm)}."
    else:
        yield from ("Cannot be told from ", other, f": {difference(each.difference, one)}, {probability(each.p_holm)}.")


def difference(given: Estimate, one: Column) -> str:
    """Write a difference with its interval; of shares, in points of percent."""
    value, low, high = one.written(*given)
    between = f" ({low} to {high})" if math.isfinite(given.low) and math.isfinite(given.high) else ""
    return f"{value}{' points' if one.after else ''}{between}"


def probability(p: float) -> str:
    """Write a p.

    Example:
        >>> probability(0.0312), probability(2e-5)
        ('p = 0.031', 'p < 0.001')
    """
    if not math.isfinite(p):
        return "no p"
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _table(those: Sequence[Comparison], names: dict[str, Arm], one: Column) -> Html:
    columns: list[Child] = ["arm", "minus"]
    columns += [element("th", title, class_="number") for title in ("difference", "p", "p, Holm", "told apart")]
    ordered = sorted(those, key=lambda each: (names[each.arm].number, names[each.other].number))
    return table(columns, (_row(each, names, one) for each in ordered))


def _row(each: Comparison, names: dict[str, Arm], one: Column) -> list[Child]:
    numbers = [difference(each.difference, one), *(f"{p:.3g}" if math.isfinite(p) else "–" for p in each[4:6])]
    numbers.append("yes" if told_apart(each) else "no")
    sides = [told(names[name].name) for name in (each.arm, each.other)]
    return [*sides, *(element("td", said, class_="number") for said in numbers)]
