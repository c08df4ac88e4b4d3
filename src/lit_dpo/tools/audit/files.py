"""What `lit-dpo audit` writes: rows to label again, the data with weights, all scores, and a summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_dpo import __version__
from lit_dpo.tools.audit.dynamics import Scores
from lit_dpo.tools.audit.rows import Rows, row_weights
from lit_dpo.tools.audit.verdicts import EASY, FLIPPED, HARD, MEANINGS, UNMOVED, Judged, weights
from lit_dpo.writing import written_whole

LISTED = (FLIPPED, HARD, UNMOVED, EASY)
"""Verdicts, in the order in which their rows are worth a look."""


class Audited(NamedTuple):
    """A run that was audited.

    Attributes:
        run: its directory.
        about: of it: loss and β.
        judged: its comparisons.
        rows: of its training data.
        times: how often the comparisons were measured at most.
        given: weights by verdict.
        notes: what is otherwise than one may think.
        measured: whether `training`, or passes over `checkpoints`, measured them.
    """

    run: Path
    about: Mapping[str, Any]
    judged: Judged
    rows: Rows
    times: int
    given: Mapping[str, float]
    notes: list[str]
    measured: str = "training"

    def key(self, place: int) -> tuple[int, int, int]:
        """Name a comparison: its row's number, and the places of its completions."""
        scores = self.judged.scores
        return int(scores.row[place]), int(scores.chosen[place]), int(scores.rejected[place])

    def numbers(self, place: int) -> dict[str, float | None]:
        """Return the scores of a comparison; None for what there is not."""
        values = {name: float(getattr(self.judged.scores, name)[place]) for name in Scores._fields[3:]}
        return {name: value if np.isfinite(value) else None for name, value in values.items()}


class Written(NamedTuple):
    """Files that were written, and the options that train on the data with weights; none where it could not be."""

    files: list[Path]
    options: list[str]


def write(audited: Audited, folder: Path) -> Written:
    """Write all of it, each file whole or not at all.

    Raises:
        TrainingError: if the disk refuses.
    """
    judged, rows = audited.judged, audited.rows
    listed = judged.order[np.isin(judged.verdicts[judged.order], [FLIPPED, HARD])]
    rows.decode(dict.fromkeys(map(audited.key, listed.tolist())))
    made = [_lines(folder / "relabel.jsonl", _to_relabel(audited))]
    options: list[str] = []
    if reason := rows.why_not_weighted():
        audited.notes.append(f"no file of data with weights: {reason}")
    else:
        parts, left_out = rows.weighted(row_weights(judged.scores.row, weights(judged, audited.given)))
        if left_out:
            audited.notes.append(
                f"{left_out:,} rows are not in the data with weights: no layout with a weight has them, such as those "
                "whose completions hold turns of the user"
            )
        names = ["weights.jsonl"] if len(parts) == 1 else [f"weights-{number}.jsonl" for number in range(len(parts))]
        made += [_lines(folder / name, part) for name, part in zip(names, parts, strict=True)]
        options = rows.options([str(folder / name) for name in names])
    made.append(_scores(audited, folder / "scores.parquet"))
    path = folder / "audit.json"
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(summary(audited), indent=2) + "\n", encoding="utf-8")
    return Written([*made, path], options)


def summary(audited: Audited) -> dict[str, Any]:
    """Say in builtins what was found."""
    judged = audited.judged
    counts = Counter(judged.verdicts.tolist())
    return {
        "lit_dpo": __version__,
        "run": str(audited.run),
        **audited.about,
        "measured": audited.measured,
        "comparisons": len(judged.order),
        "times": audited.times,
        "top": judged.top,
        "verdicts": {name: {"count": counts[name], "means": MEANINGS[name]} for name in LISTED},
        "weights": dict(audited.given),
        "scores": {
            name: {f"p{part}": _number(np.nanpercentile(values, part)) for part in (5, 50, 95)}
            for name in Scores._fields[3:]
            if np.isfinite(values := getattr(judged.scores, name)).any()
        },
        "notes": audited.notes,
    }


def _number(value: Any) -> float:
    return float(f"{float(value):.6g}")


def _to_relabel(audited: Audited) -> Iterable[dict[str, Any]]:
    """Go through the rows that somebody should look at: likely flipped ones by suspicion, then hard ones."""
    judged = audited.judged
    places = [*judged.of(FLIPPED).tolist(), *judged.of(HARD).tolist()]
    for rank, place in enumerate(places):
        said = audited.rows.said(*audited.key(place))
        yield {
            "rank": rank + 1,
            "verdict": str(judged.verdicts[place]),
            "source": said.source,
            "row": said.row,
            "index": int(judged.scores.row[place]),
            "prompt": said.prompt,
            "chosen": said.chosen,
            "rejected": said.rejected,
            **audited.numbers(place),
        }


def _lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def _scores(audited: Audited, path: Path) -> Path:
    """Write the scores, verdict and weight of every comparison, the most suspicious first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    judged = audited.judged
    columns: dict[str, Any] = {
        "verdict": judged.verdicts,
        "weight": weights(judged, audited.given),
        "index": judged.scores.row,
        **judged.scores._asdict(),
    }
    del columns["row"]
    with written_whole(path) as temporary:
        pq.write_table(pa.table({name: values[judged.order] for name, values in columns.items()}), temporary)
    return path
