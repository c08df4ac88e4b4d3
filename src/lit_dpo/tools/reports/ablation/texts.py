"""What is read rather than looked at: completions, failures, definitions, and how to compute it again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lit_dpo.tools.ablate.records import Result
from lit_dpo.tools.measures.definitions import MEASURES, families
from lit_dpo.tools.reports.ablation.vocabulary import Arm
from lit_dpo.tools.reports.html import Html, element, marked, table, told
from lit_dpo.tools.reports.record import excerpt

_PROMPTS = 24
_OPEN = 3
_LONGEST = 1_500  # characters of a text
_JUDGED = {1.0: "better", 0.5: "as good", 0.0: "worse"}

_AGAIN = """\
from pathlib import Path
import pandas as pd

runs = {path.parent.name: pd.read_parquet(path) for path in Path("runs").glob("*/pairs.parquet")}
pairs = pd.concat(runs, names=["run"])
chosen = pairs["chosen_logps"] - pairs["reference_chosen_logps"]
rejected = pairs["rejected_logps"] - pairs["reference_rejected_logps"]
margin = chosen - rejected
accuracy = ((margin > 0) + 0.5 * (margin == 0)).groupby("run").mean()
print(accuracy.sort_values())
"""


def completions(arms: Sequence[Arm]) -> Iterator[Html]:
    """Put what the arms say to the same prompts next to each other."""
    prompts = gathered(arms)
    if not prompts:
        return
    yield element("h2", "Completions")
    yield element(
        "p",
        "Sampled; of each arm its first seed. Where there is a judge, its word on the policy's completion, compared "
        "with the reference's.",
        class_="soft small",
    )
    shown = [_prompt(prompt, said) for prompt, said in list(prompts.items())[:_PROMPTS]]
    yield from shown[:_OPEN]
    if rest := shown[_OPEN:]:
        left = f" of {len(prompts) - _OPEN}" if len(prompts) > _PROMPTS else ""
        yield element("details", element("summary", f"{len(rest)} more prompts{left}"), *rest, class_="plain")


def gathered(arms: Sequence[Arm]) -> dict[str, list[tuple[Arm | None, Mapping[str, Any]]]]:
    """Return what was said to each prompt; first, without an arm, what the reference said."""
    found: dict[str, list[tuple[Arm | None, Mapping[str, Any]]]] = {}
    for arm in arms:
        seen = set()
        for row in next((run.completions for run in arm.runs if run.completions), []):
            prompt = str(row.get("prompt", ""))
            if prompt not in seen:  # of a prompt that was sampled twice the first time is shown
                seen.add(prompt)
                found.setdefault(prompt, [(None, row)]).append((arm, row))
    return found


def _prompt(prompt: str, said: Sequence[tuple[Arm | None, Mapping[str, Any]]]) -> Html:
    parts = [element("p", "prompt", class_="role"), told(excerpt(prompt, _LONGEST), "div", class_="part p")]
    cells = [_said(arm, row) for arm, row in said]
    return element("section", *parts, element("div", *cells, class_="said"), class_="card")


def _said(arm: Arm | None, row: Mapping[str, Any]) -> Html:
    if arm is None:
        return element(
            "div",
            element("p", "reference", class_="role"),
            told(excerpt(str(row.get("reference", "")), _LONGEST), "div", class_="part o"),
        )
    judged = row.get("judged")
    word = _JUDGED.get(judged, f"{judged:.2g}") if isinstance(judged, float) and math.isfinite(judged) else ""
    name = element("p", element("span", class_="swatch"), told(arm.name), f" · {word}" if word else "", class_="role")
    text = told(excerpt(str(row.get("policy", "")), _LONGEST), "div", class_="part o")
    return element("div", name, text, class_=arm.colour)


def failures(failed: Sequence[Result]) -> Iterator[Html]:
    """Say which runs failed, and why."""
    if not failed:
        return
    yield element("h2", "Failed runs")
    yield element("p", "They are in no number of this page. The same command tries them again.", class_="soft small")
    for one in failed:
        error = told(excerpt(one.error or "no word of why", _LONGEST), "div", class_="part r")
        yield element("section", told(one.name, "h3", class_="wrap"), error, class_="card failed")


def definitions() -> Iterator[Html]:
    """Define every measure, and say how to compute them again."""
    yield element("h2", "What the numbers are")
    yield element(
        "p",
        marked(
            "Over the held-out pairs; Δ_w and Δ_l are log π − log π_ref of the chosen and of the rejected completion, "
            "sums over their n_w and n_l tokens, in nats; Δ = Δ_w − Δ_l."
        ),
        class_="soft small",
    )
    rows = [
        (element("code", one.name), told(one.formula), told(one.says), one.unit) for one in (*MEASURES, *families())
    ]
    yield element("section", table(("name", "what", "says", "unit"), rows), class_="card defined")
    yield element("h2", "To compute it again")
    yield element(
        "p",
        marked(
            "Every number comes from `pairs.parquet` in the folder of each run, one row a pair, and `result.json` next "
            "to it. In the folder of the ablation:"
        ),
        class_="soft small",
    )
    yield element("pre", element("code", _AGAIN), class_="card")
