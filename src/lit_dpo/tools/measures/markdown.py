"""The report as Markdown, for a paper, a pull request, a diary."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from lit_dpo.tools.ablate.records import ArmSummary, Comparison, Estimate, Summary
from lit_dpo.tools.measures.definitions import families, measure
from lit_dpo.tools.measures.paired import COMPARED, MOST_ARMS
from lit_dpo.tools.measures.words import differ, ordered, said, sentence, with_interval
from lit_dpo.tools.reports.record import visible

_FIRST = (
    "reward_accuracy",
    "reward_accuracy_normalized",
    "margin",
    "kl",
    "displacement",
    "displaced",
    "calibration_error",
    "judged_better",
)
_SAMPLES = ("completion_length", "distinct_1", "distinct_2")
_COST = ("seconds", "tokens_per_second", "peak_memory")


def escaped(text: str) -> str:
    r"""Write a text so that Markdown shows it as it is, in one line, also in a table and at the beginning of a line.

    Example:
        >>> print(escaped("<b> | *bold* `code`"), escaped("- 1 #2"))
        &lt;b&gt; \| \*bold\* \`code\` \- 1 \#2
    """
    line = " ".join(visible(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", line)
    return re.sub(r"^(\d*)([-+.)])", r"\1\\\2", line)  # or it would begin a list


def report(summary: Summary) -> str:
    """Write the report: arms with intervals, what the paired tests say, and what each number is.

    Texts of data and configuration are escaped.
    """
    return "\n".join(_lines(summary)) + "\n"


def _lines(summary: Summary) -> Iterator[str]:
    arms, failed = ordered(summary), len(summary.failed)
    yield "# Ablation"
    yield ""
    runs = _count(len(summary.runs), "run") + (f", and {failed} that failed" if failed else "")
    pairs, prompts = _count(summary.pairs, "held-out pair"), _count(summary.prompts, "prompt")
    yield f"{_count(len(arms), 'arm')}, {runs}; {pairs} of {prompts}."
    yield from _section("Arms", _table(arms, _FIRST))
    yield ""
    yield (
        "In brackets are 95 % intervals: of one run by resampling prompts, of several the t interval of the mean over "
        "their seeds, which is wide for two or three. For whether two arms differ, read the paired tests."
    )
    yield from _section("Differences", _differences(summary, arms))
    yield from _section("Trained with × measured by", _matrix(arms, summary.losses))
    yield from _section("Where it is right", _table(arms, _present(arms, "reward_accuracy/")))
    yield from _section("Sampled completions", _table(arms, _SAMPLES))
    yield from _section("Cost", _table(arms, _COST))
    yield from _section("Failed", [f"- {escaped(one.name)}: {escaped(one.error)}" for one in summary.failed])
    yield from _section("What the numbers are", _definitions(arms))


def _count(number: int, of: str) -> str:
    return f"{number:,} {of}{'' if number == 1 else 's'}"


def _section(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield from ("", f"## {title}", "")
        yield from lines


def _present(arms: Sequence[ArmSummary], start: str) -> list[str]:
    return list(dict.fromkeys(name for arm in arms for name in arm.measures if name.startswith(start)))


def _table(arms: Sequence[ArmSummary], names: Sequence[str]) -> list[str]:
    """Put measures into columns, those that any arm has."""
    shown = [name for name in names if any(name in arm.measures for arm in arms)]
    if not shown:
        return []
    rows = [[escaped(arm.name), str(len(arm.seeds)), *(_cell(arm, name) for name in shown)] for arm in arms]
    return _grid(["arm", "runs", *map(_title, shown)], rows)


def _title(name: str) -> str:
    """Name a column; what comes after a slash is of the data."""
    if "/" in name:
        return escaped(name.partition("/")[2])
    return f"`{name}`" + (", GB" if measure(name).unit == "bytes" else "")


def _cell(arm: ArmSummary, name: str) -> str:
    if name not in arm.measures:
        return "–"
    scale = 1e9 if measure(name).unit == "bytes" else 1.0
    return with_interval(Estimate(*(value / scale for value in arm.measures[name])))


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def _matrix(arms: Sequence[ArmSummary], losses: Sequence[str]) -> list[str]:
    """Mean of every loss for every arm; the lowest of a loss is bold."""
    if not losses or not any(f"loss/{name}" in arm.measures for arm in arms for name in losses):
        return []
    none = Estimate(math.nan, math.nan, math.nan)
    values = [[arm.measures.get(f"loss/{name}", none).value for name in losses] for arm in arms]
    lowest = [min((one for one in column if not math.isnan(one)), default=None) for column in zip(*values, strict=True)]
    rows = []
    for arm, row in zip(arms, values, strict=True):
        cells = [f"**{said(one)}**" if one == least else said(one) for one, least in zip(row, lowest, strict=True)]
        rows.append([escaped(arm.name), *cells])
    return _grid(["arm", *map(escaped, losses)], rows)


def _differences(summary: Summary, arms: Sequence[ArmSummary]) -> list[str]:
    """Say what the paired tests found about the most accurate arm and the first one; all are in `comparisons.csv`."""
    if not summary.comparisons:
        return []
    shown = dict.fromkeys([arms[0].name, summary.arms[0].name])
    found = [_how_compared(summary)]
    for name in COMPARED:
        those = [one for one in summary.comparisons if one.measure == name]
        apart = [one for one in those if differ(one)]
        found += ["", f"`{name}` ({measure(name).unit}): {len(apart)} of {len(those)} comparisons differ.", ""]
        told = sorted((one for one in apart if {*shown} & {one.arm, one.other}), key=lambda one: one.p_holm)
        found += [f"- {sentence(_escaped(one))}" for one in told]
        found += [f"- not told apart from {escaped(arm)}: {rest}" for arm in shown if (rest := _alike(arm, those))]
    return found


def _alike(name: str, those: Sequence[Comparison]) -> str:
    mine = [one for one in those if name in (one.arm, one.other) and not differ(one)]
    return "; ".join(escaped(one.other if one.arm == name else one.arm) for one in mine)


def _how_compared(summary: Summary) -> str:
    which = "Every arm is compared with every other"
    if len(summary.arms) > MOST_ARMS:
        which = f"These are more than {MOST_ARMS} arms: each is compared with the first and with the most accurate one"
    return (
        f"{which}, on the same pairs, as a mean over the seeds that both have: intervals and p-values by resampling "
        "prompts, p-values corrected within a measure (Holm). They hold for other prompts, and for these seeds. Told "
        "here is what concerns the most accurate arm and the first one; `comparisons.csv` has all."
    )


def _escaped(one: Comparison) -> Comparison:
    return one._replace(arm=escaped(one.arm), other=escaped(one.other))


def _definitions(arms: Sequence[ArmSummary]) -> list[str]:
    """Define what is shown, a family once."""
    names = [name for name in (*_FIRST, *_SAMPLES, *_COST) if any(name in arm.measures for arm in arms)]
    shown = [measure(name) for name in names]
    shown += [one for one in families() if _present(arms, one.name.removesuffix("NAME"))]
    lines = [
        "Δ_w and Δ_l are log π − log π_ref of the chosen and the rejected completion, sums over their n_w and n_l "
        "tokens in nats, and Δ = Δ_w − Δ_l.",
        "",
    ]
    return lines + [f"- `{one.name}` ({one.unit}): {one.formula}; {one.says}." for one in shown]
