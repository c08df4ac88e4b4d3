"""The command line of `lit-dpo ablate`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jsonargparse import Namespace

from lit_dpo.errors import AblationError
from lit_dpo.parser import refuse
from lit_dpo.tools.ablate.axes import Axis, Value, from_file, grid, near, read_seeds, typed
from lit_dpo.tools.ablate.configuring import FitCLI, quiet
from lit_dpo.tools.ablate.ending import finish
from lit_dpo.tools.ablate.planning import planned
from lit_dpo.tools.ablate.pool import cores, gpus
from lit_dpo.tools.ablate.preparing import Options, prepare
from lit_dpo.tools.ablate.records import Asked, Layout
from lit_dpo.tools.ablate.running import carry_out
from lit_dpo.tools.ablate.sharing import plain
from lit_dpo.tools.inspect import files_first

log = logging.getLogger(__name__)

_DESCRIPTION = """Train one configuration with every combination of what is varied, and compare the runs.

  lit-dpo ablate --config configs/quickstart.yaml --vary loss=dpo,ipo,simpo --vary beta=0.1,0.5 --seeds 1,2 --jobs 2

All runs of a seed see the same data in the same order; the reference passes over them once. The same command goes on
where it was interrupted. Whatever else is given (`--model…`, `--data…`, `--trainer…`) is an option of `fit`."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(message)


class Given(NamedTuple):
    """What was typed."""

    axes: list[Axis]
    seeds: list[int] | None
    jobs: int
    out: Path
    plan: str | None
    completions: int
    judge: str | None
    base: list[str]


def main(args: Sequence[str]) -> None:
    """Run `lit-dpo ablate`.

    Args:
        args: the command line after `ablate`.

    Raises:
        LitDPOError: for what cannot work, before anything runs.
        SystemExit: with 1 if a run failed, with 130 after Ctrl-C.
    """
    given = _read(args)
    layout = Layout(given.out)
    cli = FitCLI()
    asked = asked_for(given, cli)
    options = Options(given.completions, given.judge)
    if given.plan is not None:
        print(planned(prepare(asked, layout, options, cli), given.plan, given.jobs))
        return
    try:
        results = carry_out(prepare(asked, layout, options, cli), layout, jobs=given.jobs)
    except KeyboardInterrupt:
        sys.stderr.write("\nlit-dpo: stopped. The same command goes on.\n")
        raise SystemExit(130) from None
    finish(layout, results)
    if any(result.status == "failed" for result in results):
        raise SystemExit(1)


def asked_for(given: Given, cli: FitCLI) -> list[Asked]:
    """Say which runs are wanted.

    Raises:
        AblationError: for options that `fit` does not have, with the nearest ones.
    """
    with quiet():
        config = cli.parse(given.base)
        _check_options(cli, given, config)
    seeds = given.seeds if given.seeds is not None else [_seed(config)]
    options = plain(config.get("data") or {}).get("init_args") or {}
    typed_order = any(one.option == "data.seed" for one in given.axes) or options.get("seed") != 0
    of_data = not typed_order and not options.get("val_split")
    if len(seeds) > 1 and not of_data:
        log.info("the order of the data is the same for all seeds: `data.seed` is given, or draws `val_split` too.")
    return grid(given.axes, seeds, given.base, of_data=of_data)


def _seed(config: Namespace) -> int:
    seed = config.get("seed_everything")
    if isinstance(seed, bool) or seed is None:
        raise AblationError(f"Expected `--seeds` as numbers but got `seed_everything` {seed}.")
    return int(seed)


def _check_options(cli: FitCLI, given: Given, config: Namespace) -> None:
    """See that what is varied is there, with each loss and each reference that is varied too."""
    for one in given.axes:
        # of what is varied, that which this option is within
        around = [other for other in given.axes if one.option.startswith(f"{other.option}.")]
        within: list[tuple[Axis, Value] | None] = [(other, value) for other in around for value in other.values]
        for chosen in within or [None]:
            found = config if chosen is None else cli.parse([*given.base, f"--{chosen[0].option}={chosen[1].argument}"])
            known = options_of(found)
            if one.option not in known and not any(name.startswith(f"{one.option}.") for name in known):
                _refuse(one, known, None if chosen is None else f"{chosen[0].key}={chosen[1].label}")


def _refuse(axis: Axis, known: Sequence[str], within: str | None) -> NoReturn:
    siblings = [name for name in known if name.rpartition(".")[0] == axis.option.rpartition(".")[0]]
    last = axis.option.rpartition(".")[2]
    if within is not None and siblings:
        names = [name.rpartition(".")[2] for name in siblings]
        raise AblationError(
            f"Expected every {within.partition('=')[0]} to have `{last}`, since it is varied, but {within} has "
            f"{', '.join(names)}.{near(last, names)} Leave it out, or vary `{last}` in an ablation of its own."
        )
    raise AblationError(f"`fit` has no option `{axis.option}`.{near(axis.option, [*known, 'loss', 'beta', 'lr'])}")


def options_of(config: Namespace) -> list[str]:
    """Name the options of a configuration as they are typed."""
    found: list[str] = []

    def add(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, one in value.items():
                if name == "class_path" or not isinstance(name, str):
                    continue
                add(one, key if name in ("init_args", "dict_kwargs") else f"{key}.{name}".strip("."))
            return
        found.append(key)

    add(plain(config), "")
    return found


def _read(args: Sequence[str]) -> Given:
    parser = _Parser(
        prog="lit-dpo ablate",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="any option of `fit` and its values, or `loss` (a shipped fragment's name, a file, or a class), `beta`, "
        "`lr`, `reference`; repeat it for more",
    )
    parser.add_argument("--axes", type=Path, metavar="FILE", help="the same as YAML: `beta: [0.1, 0.5]`; and `seeds`")
    parser.add_argument("--seeds", metavar="1,2", help="of adapters, dropout and order; default: that of the config")
    parser.add_argument("--jobs", type=int, help="runs at once; default: one per GPU, or 1")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="default: %(default)s")
    parser.add_argument(
        "--plan",
        nargs="?",
        const="here",
        metavar="GPU",
        help="only say how many runs, how long and how much memory; for `here`, or a GPU by name",
    )
    parser.add_argument(
        "--completions", type=int, default=32, metavar="N", help="held-out prompts to complete; default: %(default)s"
    )
    parser.add_argument(
        "--judge", metavar="FUNCTION", help="import path of who says whose completion is better; `docs/ablations.md`"
    )
    given, base = parser.parse_known_args(list(args))
    _check(given, base)
    axes = [typed(one) for one in given.vary]
    seeds = None if given.seeds is None else read_seeds(given.seeds)
    if given.axes is not None:
        more, theirs = from_file(given.axes)
        if seeds is not None and theirs is not None:
            raise AblationError(f"Expected seeds once but got `--seeds` and those in {given.axes}.")
        axes, seeds = [*axes, *more], theirs if seeds is None else seeds
    if not axes and (seeds is None or len(seeds) < 2):
        raise AblationError("Expected something to compare: `--vary KEY=V1,V2`, `--axes FILE` or several `--seeds`.")
    jobs = given.jobs if given.jobs is not None else max(1, len(gpus()))
    return Given(axes, seeds, jobs, given.out, given.plan, given.completions, given.judge, files_first(base))


def _check(given: argparse.Namespace, base: Sequence[str]) -> None:
    own = ("--vary", "--axes", "--seeds", "--jobs", "--out", "--plan", "--completions", "--judge")
    for one in base:
        name = one.partition("=")[0]
        if name.startswith("--") and "." not in name and (found := near(name, own)) and name not in _OF_FIT:
            refuse(f"`{name}` is no option of ablate or fit.{found}")
    if given.jobs is not None and given.jobs < 1:
        refuse(f"Expected `--jobs` >= 1 but got {given.jobs}.")
    if given.jobs is not None and given.jobs > cores() and not gpus():
        log.warning("--jobs %s on %s processor cores: runs wait for each other.", given.jobs, cores())
    if given.completions < 0:
        refuse(f"Expected `--completions` >= 0 but got {given.completions}.")


_OF_FIT = ("--config", "--model", "--data", "--trainer", "--ckpt_path", "--seed_everything", "--weights_only")
