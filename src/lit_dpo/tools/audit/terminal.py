"""What `lit-dpo audit` prints. Texts of the data are never read as markup, nor steer the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lit_dpo.data.doctor.findings import percent
from lit_dpo.data.doctor.texts import written
from lit_dpo.tools.audit.files import LISTED, Audited, Written
from lit_dpo.tools.audit.verdicts import FLIPPED, MEANINGS
from lit_dpo.tools.reports.record import excerpt, file_name, visible

_LENGTH = 240  # characters of a text that is shown


def show(audited: Audited, out: Written, console: Console, examples: int = 3) -> None:
    """Print what was found, some rows of each kind, and where all of it is."""
    for part in _parts(audited, out, examples):
        console.print(part)
        console.print()


def _parts(audited: Audited, out: Written, examples: int) -> Iterator[RenderableType]:
    count = len(audited.judged.order)
    loss, beta = audited.about.get("loss", "a loss"), audited.about.get("beta", "?")
    seen = f"each seen up to {audited.times} time{'' if audited.times == 1 else 's'} by {audited.measured}"
    head = [Text(visible(str(audited.run)), style="bold"), Text(f"{count:,} comparisons, {seen}; {loss}, beta {beta}")]
    yield Text("\n").join([*head, *(Text(f"note: {visible(note)}", style="yellow") for note in audited.notes)])
    yield _verdicts(audited)
    for verdict in LISTED:
        places = audited.judged.of(verdict)[: examples if verdict == FLIPPED else 1 if examples else 0]
        if len(places):
            yield Group(
                Text(f"{verdict}: {MEANINGS[verdict]}", style="bold"),
                *(Padding(_example(audited, place), (1, 0, 0, 2)) for place in places.tolist()),
            )
    yield _end(out)


def _verdicts(audited: Audited) -> Table:
    judged = audited.judged
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("verdict", "pairs", "share", "confidence", "correct", "gradient", "reference"):
        table.add_column(Text(column, style="dim"), justify="left" if column == "verdict" else "right", no_wrap=True)
    counts = Counter(judged.verdicts.tolist())
    for verdict in (*LISTED, ""):
        chosen = judged.verdicts == verdict
        if not counts[verdict]:
            table.add_row(verdict or "the rest", "0")
            continue
        scores = judged.scores
        means = [values[chosen].mean() for values in (scores.confidence, scores.correctness, scores.gradient)]
        reference = scores.reference_margin[chosen].mean()
        table.add_row(
            verdict or "the rest",
            f"{counts[verdict]:,}",
            percent(counts[verdict] / len(chosen)),
            f"{means[0]:.2f}",
            percent(means[1]),
            f"{means[2]:.2f}",
            f"{reference + 0.0:+.1f}" if np.isfinite(reference) else "",
        )
    return table


def _example(audited: Audited, place: int) -> Group:
    key = audited.key(place)
    audited.rows.decode({key: None})
    said, numbers = audited.rows.said(*key), audited.numbers(place)
    facts = f"confidence {numbers['confidence']:.2f}, last margin {numbers['last_margin']:+.2f}"
    if (reference := numbers["reference_margin"]) is not None:
        facts += f", reference {reference:+.1f}"
    parts = [Text.assemble(visible(file_name(said.place)), (f"  {facts}", "dim"))]
    parts.append(Text(visible(excerpt(written(said.prompt), _LENGTH)), style="dim"))
    for role, text, colour in (("chosen", said.chosen, "green"), ("rejected", said.rejected, "red")):
        shown = visible(excerpt(written(text), _LENGTH))
        parts.append(Text.assemble((f" {role} ", f"reverse {colour}"), (f" {shown}", colour)))
    return Group(*parts)


def _end(out: Written) -> Text:
    lines = [Text("Written:", style="bold"), *(Text(f"  {visible(str(file))}") for file in out.files)]
    return Text("\n").join(lines)
