"""`lit-dpo fork`: from one checkpoint of a run, arms that differ in what is typed and see identical batches."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lit_dpo.checkpoint import read_checkpoint
from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.errors import AblationError
from lit_dpo.parser import refuse
from lit_dpo.tools.ablate.axes import Axis, axis, grid, typed
from lit_dpo.tools.ablate.configuring import FitCLI, quiet
from lit_dpo.tools.ablate.ending import finish
from lit_dpo.tools.ablate.pool import gpus
from lit_dpo.tools.ablate.preparing import Options, Prepared, prepare
from lit_dpo.tools.ablate.records import Asked, Layout
from lit_dpo.tools.ablate.running import carry_out
from lit_dpo.tools.checkpoints import checkpoints_of

log = logging.getLogger(__name__)

_DESCRIPTION = """Go on from one checkpoint of a run in several ways that see identical batches, and compare them.

  lit-dpo fork runs/version_0@60 --vary loss=dpo,ipo,simpo --jobs 2
  lit-dpo fork runs/version_0@last --model.loss IPOLoss --model.loss.beta 0.5 --trainer.max_epochs 5

One more arm, `control`, goes on unchanged. STEP is a step of which there is a checkpoint, or `last`. What is typed
(`--model.loss…`, `--model.reference…`, `--model.optimizer…`, …) is an option of `fit`; `--vary` is that of ablate."""

ACCEPT = ["--trainer.callbacks+=ExactResume", "--trainer.callbacks.changes=accept"]
"""Arguments with which a run goes on under another loss, reference or learning rate."""

_FIXED = {
    "model.policy": "the checkpoint's adapter is of that policy",
    "data": "the arms would not see the batches of the run",
    "trainer.accumulate_grad_batches": "the arms would not see the batches of the run",
    "trainer.limit_train_batches": "the arms would not see the batches of the run",
    "trainer.overfit_batches": "the arms would not see the batches of the run",
    "trainer.devices": "the arms would not see the batches of the run",
    "trainer.num_nodes": "the arms would not see the batches of the run",
    "seed_everything": "random numbers go on from the checkpoint",
    "ckpt_path": "the checkpoint is that of RUN@STEP",
    "config": "the configuration is that of the run",
}
"""What no arm may change, and why."""

_OF_EVALUATION = ("data.val", "data.eval_batch_size", "data.num_workers")
"""What of the data changes no batch of training."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(message)


class Start(NamedTuple):
    """Where the arms begin.

    Attributes:
        run: directory of the run.
        step: of the checkpoint.
        file: the checkpoint.
    """

    run: Path
    step: int
    file: Path

    @property
    def arguments(self) -> list[str]:
        """Of `fit`, to go on unchanged."""
        return [f"--config={self.run / 'config.yaml'}", f"--ckpt_path={self.file}"]


def main(args: Sequence[str]) -> None:
    """Run `lit-dpo fork`.

    Args:
        args: the command line after `fork`.

    Raises:
        LitDPOError: for what cannot work, before anything runs.
        SystemExit: with 1 if an arm failed, with 130 after Ctrl-C.
    """
    given, rest = _parser().parse_known_args(list(args))
    jobs = given.jobs if given.jobs is not None else max(1, len(gpus()))
    if jobs < 1 or given.completions < 0:
        refuse(f"Expected `--jobs` >= 1 and `--completions` >= 0 but got {jobs} and {given.completions}.")
    axes, overrides = [typed(one) for one in given.vary], options_in(rest)
    check_changes([*(one.option for one in axes), *overrides])
    start = found(given.checkpoint)
    asked = arms(start, axes, overrides)
    layout = Layout(given.out or start.run / f"fork-{start.step}")
    prepared = unshared(prepare(asked, layout, Options(given.completions, given.judge)))
    log.info("%s arms go on from step %s of %s", len(asked), start.step, start.run)
    try:
        results = carry_out(prepared, layout, jobs=jobs)
    except KeyboardInterrupt:
        sys.stderr.write("\nlit-dpo: stopped. The same command goes on.\n")
        raise SystemExit(130) from None
    finish(layout, results)
    if any(result.status == "failed" for result in results):
        raise SystemExit(1)


def _parser() -> _Parser:
    parser = _Parser(
        prog="lit-dpo fork",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="RUN@STEP", help="directory of a run, and a step of it or `last`")
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="an option of `fit` and its values, an arm each, or `loss`, `beta`, `lr`, `reference`; repeat it for more",
    )
    parser.add_argument("--jobs", type=int, help="arms at once; default: one per GPU, or 1")
    parser.add_argument("--out", type=Path, help="default: RUN/fork-STEP")
    parser.add_argument(
        "--completions", type=int, default=32, metavar="N", help="held-out prompts to complete; default: %(default)s"
    )
    parser.add_argument("--judge", metavar="FUNCTION", help="import path of who says whose completion is better")
    return parser


def found(text: str) -> Start:
    """Find the checkpoint of `RUN@STEP`.

    Raises:
        LitDPOError: if there is no such run, or no checkpoint of that step, with the steps that there are.
    """
    place, at, said = text.rpartition("@")
    if not at or not place or not (said == "last" or said.isdigit()):
        raise AblationError(f"Expected RUN@STEP, such as runs/version_0@60 or runs/version_0@last, but got {text!r}.")
    run = Path(place)
    if not (config := run / "config.yaml").is_file():
        raise AblationError(f"Expected the directory of a run before @ but there is no {config}.")
    there = checkpoints_of(run)
    step = max(there) if said == "last" else int(said)
    if step not in there:
        steps = ", ".join(map(str, there))
        raise AblationError(
            f"Expected a checkpoint of step {step} in {run} but there are those of step {steps}. Name one of these; "
            "`--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.every_n_train_steps=50 "
            "--trainer.callbacks.save_top_k=-1` keeps more of a run."
        )
    return Start(run, step, there[step])


def options_in(arguments: Sequence[str]) -> dict[str, str]:
    """Read what else was typed: options of `fit` and their values.

    Example:
        >>> options_in(["--model.loss", "IPOLoss", "--model.loss.beta=0.5"])
        {'model.loss': 'IPOLoss', 'model.loss.beta': '0.5'}
    """
    read: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            refuse(f"Expected an option but got {name!r}.")
        if not equals:
            if not rest or rest[0].startswith("--"):
                refuse(f"Expected a value of `{name}`.")
            value = rest.pop(0)
        read[name.removeprefix("--")] = value
    return read


def check_changes(options: Sequence[str]) -> None:
    """See that arms can go on from one checkpoint and see the same batches.

    Raises:
        AblationError: naming the first option that no arm may change, and why.
    """
    for option in options:
        if any(option == free or option.startswith(f"{free}.") for free in _OF_EVALUATION):
            continue
        for fixed, why in _FIXED.items():
            if option == fixed or option.startswith(f"{fixed}."):
                raise AblationError(f"`{option}` cannot change at a fork: {why}. Use `lit-dpo ablate` to compare it.")


def arms(start: Start, axes: Sequence[Axis], overrides: dict[str, str]) -> list[Asked]:
    """Say which runs are wanted: the control, and an arm for each combination of what is varied, or one.

    Raises:
        LitDPOError: if nothing is varied, or nothing is left to train.
    """
    if not axes and not overrides:
        raise AblationError("Expected what the arms differ in: `--vary KEY=V1,V2`, or options of `fit`.")
    cli = FitCLI()
    with quiet():
        seed = int(cli.parse(start.arguments).get("seed_everything") or 0)
        common = [f"--{name}={value}" for name, value in overrides.items()] if axes else []
        varied = list(axes) or [axis(name, [value]) for name, value in overrides.items()]
        made = grid(varied, [seed], [*start.arguments, *common], of_data=False)
        made = [one._replace(arguments=[*one.arguments, *ACCEPT]) for one in made]
        _check_left(start, cli.parse(made[0].arguments).trainer)
    return [Asked("control", {"arm": "control"}, seed, start.arguments), *made]


def _check_left(start: Start, trainer: Any) -> None:
    """See that there are steps to come."""
    checkpoint = read_checkpoint(start.file)
    stands = checkpoint.get(PreferenceDataModule.__qualname__, {})
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps")
    all_epochs = epochs not in (None, -1) and stands.get("epoch", -1) >= epochs
    if all_epochs or (steps not in (None, -1) and start.step >= steps):
        raise AblationError(
            f"Expected steps after step {start.step} but the run ends there: name an earlier one, or let the arms "
            "train longer with `--trainer.max_epochs`."
        )


def unshared(prepared: Prepared) -> Prepared:
    """Let each arm compute its reference, as the run did: read from a cache, its numbers may be rounded otherwise."""
    works = [work._replace(arguments=list(work.asked.arguments)) for work in prepared.works]
    return prepared._replace(works=works, passes={})
