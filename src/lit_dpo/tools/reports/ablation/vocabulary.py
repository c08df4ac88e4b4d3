"""What is measured, in the words and with the digits of the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lit_dpo.tools.ablate.records import ArmSummary, Estimate, Result, Summary
from lit_dpo.tools.measures.definitions import measure

ACCURACY, KL = "reward_accuracy", "kl"
MISSING = "–"


class Column(NamedTuple):
    """How a measure is shown."""

    key: str
    """Among an arm's measures."""
    title: str
    better: int
    """1 where more is better, -1 where less is, 0 where neither is."""

    digits: int | None = None
    """After the point; None lets the value say, so that three figures of it are seen."""
    unit: float = 1.0
    """Of what is shown, in what is measured: a minute has 60 seconds."""
    after: str = ""

    def written(self, *values: float) -> list[str]:
        """Write a number, and others with as many digits."""
        shown = [value / self.unit for value in values]
        digits = _digits(shown[0]) if self.digits is None else self.digits
        return [signed(f"{value:,.{digits}f}" if digits <= _MOST else f"{value:.2e}") for value in shown]


_MOST = 5  # digits after the point; below, powers of ten are shorter


def _digits(value: float) -> int:
    if value == 0 or not math.isfinite(value):
        return 2
    return max(0, 2 - math.floor(math.log10(abs(value))))


def figures(value: float, count: int) -> str:
    """Write as many figures of a number, zeros at the end too.

    Example:
        >>> figures(0.36, 4), figures(24.0, 2)
        ('0.3600', '24')
    """
    return signed(f"{value:#.{count}g}".rstrip("."))


def signed(said: str) -> str:
    """Write a minus as long as a plus, and no minus before a zero."""
    return said.lstrip("-") if not said.strip("-0.,") else said.replace("-", "−")


_TITLES = {
    ACCURACY: "accuracy",
    "reward_accuracy_normalized": "accuracy per token",
    "margin": "margin",
    KL: "KL",
    "displacement": "displacement",
    "calibration_error": "calibration error",
    "judged_better": "judged better",
    "seconds": "minutes",
    "tokens_per_second": "tokens/s",
    "peak_memory": "GiB",
}
"""What the table of arms shows, and the short name of each."""
_UNITS: dict[str, dict[str, Any]] = {
    "seconds": {"unit": 60.0},
    "tokens_per_second": {"digits": 0},
    "peak_memory": {"unit": 2.0**30, "digits": 2},
}
_PERCENT: dict[str, Any] = {"unit": 0.01, "digits": 1, "after": " %"}


def column(key: str, title: str = "") -> Column:
    """Say how a measure is shown; one that is defined nowhere, as a number.

    Example:
        >>> column("reward_accuracy").written(0.9714, 0.9), column("kl").written(0.25, 1.0)
        (['97.1', '90.0'], ['0.250', '1.000'])
    """
    try:
        defined = measure(key)
    except KeyError:
        return Column(key, title or key.replace("_", " "), 0)
    direction = {"higher": 1, "lower": -1}.get(defined.better, 0)
    form = _UNITS.get(key, _PERCENT if defined.unit == "share" else {})
    return Column(key, title or _TITLES.get(key, key.replace("_", " ")), direction, **form)


COLUMNS = [column(key) for key in _TITLES]


def estimated(given: Estimate | None, column: Column) -> tuple[str, str]:
    """Write a number, and its interval, which is ± where its halves are the same; a dash where there is none."""
    if given is None or not math.isfinite(given.value):
        return MISSING, ""
    half, other = given.high - given.value, given.value - given.low
    said, low, high, plus, minus = column.written(*given, half, other)
    if not (math.isfinite(given.low) and math.isfinite(given.high)):
        return said + column.after, ""
    return said + column.after, f"± {plus}" if plus == minus else f"{low} to {high}"


def value(measures: Mapping[str, Estimate], key: str) -> float:
    """Return a measure's value; NaN where there is none."""
    return measures[key].value if key in measures else math.nan


class Arm(NamedTuple):
    """An arm on the page: it keeps its number and its colour."""

    number: int
    """From 1, by accuracy."""
    name: str
    """Short: its axes' values."""
    summary: ArmSummary
    runs: tuple[Result, ...]
    """By seed."""

    @property
    def loss(self) -> str:
        """Return its loss, where its name does not say it."""
        return "" if any(axis(name) == "loss" for name in self.summary.axes) else self.summary.loss

    @property
    def colour(self) -> str:
        """Return the class of its colour."""
        return colour(self.number - 1)

    def estimate(self, key: str) -> Estimate | None:
        """Return a measure of it, if there is a number."""
        found = self.summary.measures.get(key)
        return found if found is not None and math.isfinite(found.value) else None


def colour(place: int) -> str:
    """Return the class of a colour; after twelve they begin again."""
    return f"arm a{place % 12}"


def arms(summary: Summary) -> list[Arm]:
    """Return the arms, the most accurate first; those without an accuracy last."""

    def order(one: ArmSummary) -> tuple[bool, float]:
        found = value(one.measures, ACCURACY)
        return (True, 0.0) if math.isnan(found) else (False, -found)

    results = sorted((run.result for run in summary.runs), key=lambda one: one.seed)
    return [
        Arm(number, short(one.axes) or one.name or "base", one, tuple(run for run in results if run.axes == one.axes))
        for number, one in enumerate(sorted(summary.arms, key=order), 1)
    ]


def short(axes: Mapping[str, str]) -> str:
    r"""Write what was varied, with names for numbers alone.

    Example:
        >>> short({"loss": "ipo", "model.loss.init_args.beta": "0.1"})
        'ipo, β\xa00.1'
    """
    return ", ".join(said if number(said) is None else f"{axis(name)}\u00a0{said}" for name, said in axes.items())


def axis(name: str) -> str:
    """Write the last part of an option's name."""
    return {"beta": "β"}.get(last := name.rpartition(".")[2], last)


def number(said: str) -> float | None:
    """Read a number, if it is one."""
    try:
        read = float(said)
    except ValueError:
        return None
    return read if math.isfinite(read) else None


def listed(names: Iterable[str]) -> str:
    """Write names in a row.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    *first, last = [*names] or [""]
    return f"{', '.join(first)} and {last}" if first else last
