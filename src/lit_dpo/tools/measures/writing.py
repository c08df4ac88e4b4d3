"""The summary as files for other programs, as Markdown for people, and as a table for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_dpo.tools.ablate.records import ArmSummary, Estimate, Layout, Summary
from lit_dpo.tools.measures.markdown import report
from lit_dpo.tools.measures.summary import arm_name
from lit_dpo.tools.measures.words import differ, ordered, said
from lit_dpo.tools.reports.record import visible
from lit_dpo.writing import put_in_place, refusals, remove, temporary_name

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.table import Table

FILES = ("pairs.parquet", "pairs.csv", "runs.parquet", "runs.csv", "arms.csv", "comparisons.csv", "report.md")
"""What `write` makes in an ablation's folder."""


def write(layout: Layout, summary: Summary, pairs: Mapping[str, pa.Table]) -> None:
    """Write what is known of all runs into the ablation's folder: all files, or none of them.

    `pairs.parquet` and `pairs.csv` hold the tables of all runs, one after another, with their names in the column
    `run`; `runs.parquet` and `runs.csv` a row per run: what is varied, the seed, whether it is done, and every measure
    with the ends of its interval in `…_low` and `…_high`; `arms.csv` the same per arm; `comparisons.csv` the paired
    tests; `report.md` what they say. The same bytes for the same summary.

    Args:
        layout: of the ablation.
        summary: by `summarise`.
        pairs: by run, as `summarise` had them.

    Raises:
        TrainingError: if the disk refuses.
    """
    tables = {
        "pairs": _of_pairs(pairs),
        "runs": _of_rows(_run_rows(summary)),
        "arms": _of_rows(_arm_rows(summary)),
        "comparisons": _of_rows(_comparison_rows(summary)),
    }
    with refusals(layout.root / FILES[0]):
        layout.root.mkdir(parents=True, exist_ok=True)
        made = {layout.root / name: temporary_name(layout.root / name, "tmp") for name in FILES}
        try:
            for path, temporary in made.items():
                if path.suffix == ".md":
                    temporary.write_text(report(summary), encoding="utf-8", newline="\n")
                else:
                    _write_table(tables[path.stem], temporary, path.suffix)
            put_in_place(made)
        finally:
            for temporary in made.values():
                remove(temporary)


def _write_table(table: pa.Table, path: Path, kind: str) -> None:
    import pyarrow.csv
    import pyarrow.parquet

    if kind == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        pyarrow.csv.write_csv(table, path)


def _of_pairs(pairs: Mapping[str, pa.Table]) -> pa.Table:
    import pyarrow as pa

    named = [
        table.add_column(0, "run", pa.array([name] * table.num_rows, pa.string())) for name, table in pairs.items()
    ]
    return pa.concat_tables(named, promote_options="default") if named else pa.table({"run": pa.array([], pa.string())})


def _of_rows(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Make a table of rows whose columns differ: what a row does not have is empty, and so is NaN."""
    import pyarrow as pa

    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([_cell(row.get(name)) for row in rows]) for name in names})


def _cell(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _run_rows(summary: Summary) -> list[dict[str, Any]]:
    given = [(run.result, run.measures) for run in summary.runs] + [(result, {}) for result in summary.failed]
    axes = _axes([result.axes for result, _ in given])
    return [
        {
            "run": result.name,
            "arm": arm_name(result),
            **{column: values[place] for column, values in axes.items()},
            "seed": result.seed,
            "status": result.status,
            "error": result.error,
            "trained_with": result.loss,
            "steps": result.steps,
            "tokens": result.tokens,
            **_measured(measures),
        }
        for place, (result, measures) in enumerate(given)
    ]


def _arm_rows(summary: Summary) -> list[dict[str, Any]]:
    axes = _axes([arm.axes for arm in summary.arms])
    return [
        {
            "arm": arm.name,
            **{column: values[place] for column, values in axes.items()},
            "seeds": " ".join(map(str, arm.seeds)),
            "trained_with": arm.loss,
            **_measured(arm.measures),
        }
        for place, arm in enumerate(summary.arms)
    ]


def _comparison_rows(summary: Summary) -> list[dict[str, Any]]:
    return [
        {
            "measure": one.measure,
            "arm": one.arm,
            "other": one.other,
            **_measured({"difference": one.difference}),
            "p": one.p,
            "p_holm": one.p_holm,
        }
        for one in summary.comparisons
    ]


def _measured(measures: Mapping[str, Estimate]) -> dict[str, float]:
    return {
        f"{name}_{end}" if end else name: value
        for name, estimate in measures.items()
        for end, value in zip(("", "low", "high"), estimate, strict=True)
    }


_OWN = ("run", "arm", "seed", "seeds", "status", "error", "trained_with", "steps", "tokens")


def _axes(given: Sequence[Mapping[str, str]]) -> dict[str, list[Any]]:
    """Columns of what is varied: numbers where all values are; an axis called as another column has `axis_` before."""
    found: dict[str, list[Any]] = {}
    for axis in dict.fromkeys(name for one in given for name in one):
        values = [one.get(axis) for one in given]
        found[f"axis_{axis}" if axis in _OWN else axis] = _as_numbers(values)
    return found


def _as_numbers(values: Sequence[str | None]) -> list[Any]:
    try:
        return [None if value is None else float(value) for value in values]
    except ValueError:
        return list(values)


# ---- for a terminal ----

_SHOWN = {
    "reward_accuracy": "accuracy",
    "reward_accuracy_normalized": "per token",
    "margin": "margin",
    "kl": "kl",
    "displacement": "chosen",
    "judged_better": "judged",
}


def table(summary: Summary) -> Table:
    """Make a table of the arms for a terminal, the most accurate first; it fits 80 columns.

    Accuracy has half of its interval's width, and the other numbers none: `report.md` has all. Below it stands how
    many
    arms are told apart from the first line.
    """
    from rich.table import Table
    from rich.text import Text

    arms = ordered(summary)
    shown = {name: title for name, title in _SHOWN.items() if any(name in arm.measures for arm in arms)}
    made = Table(
        title=Text(f"{len(arms)} arms on {summary.pairs:,} held-out pairs of {summary.prompts:,} prompts"),
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        caption=Text(_caption(summary, arms)),
        caption_justify="left",
    )
    made.add_column(Text("arm", style="dim"), overflow="fold", ratio=1)
    for title in shown.values():
        made.add_column(Text(title, style="dim"), justify="right", no_wrap=True)
    for arm in arms:
        made.add_row(Text(visible(arm.name)), *(_number(arm, name) for name in shown))
    for result in summary.failed:
        made.add_row(Text(visible(f"{result.name}: failed"), style="red"))
    return made


def _caption(summary: Summary, arms: Sequence[ArmSummary]) -> str:
    """Say what the ± is, and what the paired tests found of the most accurate arm."""
    lines = ["±: half of the 95 % interval"]
    if any(len(arm.seeds) > 1 for arm in arms):
        lines[0] += "; of several seeds, t interval of their mean, wide for two"
    tests = [one for one in summary.comparisons if one.measure == "reward_accuracy"]
    of_best = [one for one in tests if arms[0].name in (one.arm, one.other)]
    if of_best:
        apart = sum(map(differ, of_best))
        lines.append(f"paired tests (bootstrap, Holm): the first is told apart from {apart} of {len(of_best)} others")
    return "\n".join(lines)


def _number(arm: ArmSummary, name: str) -> str:
    estimate = arm.measures.get(name)
    if estimate is None or math.isnan(estimate.value):
        return "–"
    if name != "reward_accuracy" or math.isnan(estimate.low):
        return said(estimate.value)
    return f"{said(estimate.value)} ±{(estimate.high - estimate.low) / 2:.2f}"
