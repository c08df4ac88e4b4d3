"""`lit-dpo audit`: what a run's training says of its pairs."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.errors import DataError, LitDPOError
from lit_dpo.tools.audit.dynamics import Dynamics, score
from lit_dpo.tools.audit.files import Audited, write
from lit_dpo.tools.audit.passes import recomputed
from lit_dpo.tools.audit.rows import Rows
from lit_dpo.tools.audit.terminal import show
from lit_dpo.tools.audit.verdicts import EASY, FLIPPED, HARD, UNMOVED, judge
from lit_dpo.tools.checkpoints import checkpoints_of
from lit_dpo.tools.inspect import InspectCLI, unsaid

log = logging.getLogger(__name__)


def main(args: Sequence[str]) -> None:
    """Run `lit-dpo audit`.

    Args:
        args: the command line after `audit`.

    Raises:
        LitDPOError: for a run that says nothing of its pairs, or data that are others now.
    """
    given, overrides = _parser().parse_known_args(list(args))
    if not 0 < given.top <= 1:
        raise LitDPOError(f"Expected `--top` in (0, 1] but got {given.top:g}.")
    if given.examples < 0:
        raise LitDPOError(f"Expected `--examples` >= 0 but got {given.examples}.")
    for name in ("flipped", "hard", "idle"):
        if not (value := getattr(given, f"{name}_weight")) >= 0:
            raise LitDPOError(f"Expected `--{name}-weight` >= 0 but got {value:g}.")
    weights = {FLIPPED: given.flipped_weight, HARD: given.hard_weight}
    weights |= dict.fromkeys((EASY, UNMOVED), given.idle_weight)
    audited = audit(given.run, given.top, weights, recompute=given.recompute, overrides=overrides)
    folder = given.out or given.run / "audit"
    out = write(audited, folder)
    show(audited, out, Console(), given.examples)
    if out.options:
        command = ["lit-dpo", "fit", "--config", str(given.run / "config.yaml"), *overrides, *out.options]
        print("Train with the weights:\n ", shlex.join(command))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-dpo audit",
        description="Say which training pairs are likely labelled the wrong way round, which teach nothing and which "
        "stay hard, by what training did with them. The run had `--trainer.callbacks+=TrainingDynamics`. Further "
        "options, such as `--data.train FILE`, replace what the run's config.yaml says.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="directory of the run, such as runs/version_0")
    parser.add_argument("--out", type=Path, help="folder for what is written (default: RUN/audit)")
    parser.add_argument(
        "--top", type=float, default=0.1, help="share of the ranking that may be called flipped (default: %(default)s)"
    )
    parser.add_argument("--examples", type=int, default=3, help="likely flipped rows that are printed (default: 3)")
    parser.add_argument(
        "--recompute",
        action="store_true",
        help="measure the pairs with the checkpoints of the run, one pass each, instead of reading its dynamics",
    )
    for name, default, what in (
        ("flipped", 0.0, "are likely flipped"),
        ("hard", 1.0, "stay hard"),
        ("idle", 1.0, "teach nothing"),
    ):
        parser.add_argument(
            f"--{name}-weight", type=float, default=default, help=f"weight of pairs that {what} (default: {default:g})"
        )
    return parser


def audit(
    run: Path,
    top: float,
    weights: dict[str, float],
    *,
    recompute: bool = False,
    overrides: Sequence[str] = (),
) -> Audited:
    """Judge the training pairs of a run.

    Args:
        run: its directory.
        top: share of the ranking that may be called flipped.
        weights: by verdict.
        recompute: whether its checkpoints are asked instead of what its training has written.
        overrides: options that replace what its configuration says.

    Raises:
        LitDPOError: for a run that says nothing of its pairs, or data that are others now.
    """
    if not (config := run / "config.yaml").is_file():
        raise LitDPOError(f"Expected the directory of a run but there is no {config}.")
    dynamics = None if recompute else Dynamics.read(run)  # before the data are read, which takes longer
    checkpoints = list(checkpoints_of(run).values()) if recompute else []
    notes: list[str] = []
    with unsaid("lit_dpo.data.reports"):
        cli = InspectCLI(["--config", str(config), *overrides])
        data = streamed = _data(cli)
        if data.streaming:
            notes.append("what the run streamed is read as a table, to its end")
            data = _data(cli, as_table=True)
    rows = Rows(data)
    if dynamics is None:
        dynamics = recomputed(cli, data, checkpoints)
    else:
        _check_data(dynamics, streamed, run)
        if streamed is not data:
            dynamics.columns["index"] = rows.of_stream(dynamics.columns["index"], streamed)
    if not len(dynamics.columns["index"]):
        raise LitDPOError(f"The dynamics of {run} hold no comparison with finite numbers.")
    if not rows.knows(int(dynamics.columns["index"].max())):
        raise LitDPOError(f"The dynamics of {run} speak of rows that the data do not have: are they the run's?")
    scores = score(dynamics)
    measured = f"{len(checkpoints)} checkpoint{'s' if len(checkpoints) > 1 else ''}" if recompute else "training"
    return Audited(run, dynamics.about, judge(scores, top), rows, int(scores.times.max()), weights, notes, measured)


def _data(cli: InspectCLI, *, as_table: bool = False) -> PreferenceDataModule:
    """Build the run's data, and read them, or the first rows of a stream that shall not be a table.

    Raises:
        DataError: for data that cannot be used.
    """
    data = cli.new_data()
    if not isinstance(data, PreferenceDataModule):
        raise DataError(f"Expected the data of a PreferenceDataModule but got {type(data).__name__}.")
    if data.tokenizer is None:
        data.tokenizer = cli.model.policy.load_tokenizer()
    data.streaming &= not as_table
    data.setup("fit")
    return data


def _check_data(dynamics: Dynamics, data: PreferenceDataModule, run: Path) -> None:
    """See that row numbers mean what they meant.

    Raises:
        DataError: if the data are others now.
    """
    then, now = dynamics.about.get("data"), data.train_digest
    if then is not None and then != now:
        raise DataError(
            f"Expected the data that {run} was trained on but they are others now: row numbers would be of other "
            "pairs. Give them as they were, for instance with `--data.train FILE`."
        )
