"""All that is found out before the first run: every configuration is parsed and built, and nothing is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jsonargparse import Namespace

from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.errors import AblationError, LitDPOError
from lit_dpo.tools.ablate.configuring import FitCLI, check_places, quiet
from lit_dpo.tools.ablate.measuring import judge_of
from lit_dpo.tools.ablate.records import Asked, Layout
from lit_dpo.tools.ablate.sharing import Shared, plain, share
from lit_dpo.tools.ablate.single import Work

log = logging.getLogger(__name__)


class Options(NamedTuple):
    """How runs are measured."""

    completions: int = 32
    """How many are sampled of each fitted policy."""
    judge: str | None = None
    """Import path of who says which of two completions is better; see `lit_dpo.tools.measures.judges`."""


class Prepared(NamedTuple):
    """What there is to do."""

    works: list[Work]
    passes: dict[str, Work]
    """Of references, by what they depend on."""
    configs: dict[str, str]
    """The whole configuration of each run, by its name: YAML."""
    options: Options


def prepare(
    asked: Sequence[Asked],
    layout: Layout,
    options: Options = Options(),  # noqa: B008 - a constant
    cli: FitCLI | None = None,
) -> Prepared:
    """Parse and build every run, as `fit` would, and see what they share.

    Args:
        asked: the runs.
        layout: where they shall write.
        options: how they are measured.
        cli: parses them, if there is one already.

    Raises:
        AblationError: for the first one that cannot run, with its name.
    """
    if not asked:
        raise AblationError("Expected at least one run but there is none.")
    judge_of(options.judge)
    cli, said, missed = cli or FitCLI(), dict[str, None](), dict[str, None]()
    runs: list[tuple[Asked, Shared, str]] = []
    configs: dict[str, str] = {}
    losses: dict[str, Any] = {}
    for one in asked:
        with quiet(said):
            config, text, shared = _one(cli, one, layout)
        if (same := next((name for name, other in configs.items() if other == text), None)) is not None:
            log.info("%s and %s are the same run: it is made once.", same, one.name)
            continue
        configs[one.name] = text
        runs.append((one, shared, _named(losses, _loss_name(one, config), plain(config.model.init_args.get("loss")))))
        if shared.why_not:
            missed[shared.why_not] = None
    for line in _dropped(said):
        log.info("%s", line)
    for line in missed:
        log.info("the reference is computed in each run: %s.", line)
    works = [
        Work(one, [*one.arguments, *shared.arguments], losses, loss, str(layout.root), *options)
        for one, shared, loss in runs
    ]
    passes: dict[str, Work] = {}
    for work, (_, shared, _) in sorted(zip(works, runs, strict=True), key=lambda both: both[1][1].measures_alone):
        if shared.key is not None:
            passes.setdefault(shared.key, work._replace(is_pass=True))
    return Prepared(works, passes, configs, options)


def _dropped(said: Mapping[str, None]) -> list[str]:
    """Of what `fit` said, what it does not take over from one class to others: a line for all of these."""
    classes: dict[str, list[str]] = {}
    for line in said:
        name, has, what = line.partition(" has its own defaults: ")
        if has:
            classes.setdefault(what, []).append(name)
    return [
        f"{', '.join(names)}: {'own defaults' if len(names) > 1 else 'its own defaults'}; {what}"
        for what, names in classes.items()
    ]


def _one(cli: FitCLI, one: Asked, layout: Layout) -> tuple[Namespace, str, Shared]:
    try:
        config = cli.parse(one.arguments)
        text = cli.text()
        module, data, callbacks = cli.built()
        check_places(callbacks)
        _check_data(data)
        _check_devices(config)
        return config, text, share(module, config, layout.cache)
    except LitDPOError as error:
        raise AblationError(f"{one.name}: {error}") from error


def _check_data(data: Any) -> None:
    if not isinstance(data, PreferenceDataModule):
        return
    there = any(source is not None for name, source in data.sources.items() if name.partition("/")[0] == "val")
    if not there and not data.val_split:
        raise AblationError(
            "Expected held-out pairs to compare the runs on but there are none: give `--data.val FILE`, or "
            "`--data.val_split 0.1`."
        )


def _check_devices(config: Namespace) -> None:
    trainer = config.trainer
    if str(trainer.get("devices")) not in ("auto", "1", "None") or trainer.get("num_nodes") not in (1, None):
        raise AblationError(
            f"Expected a run to take one device but got `--trainer.devices {trainer.devices}`: leave it out. `--jobs` "
            "runs next to each other, one per GPU."
        )


def _loss_name(one: Asked, config: Namespace) -> str:
    """Name a run's loss: what was varied to get it, else its class; and what else is varied of it."""
    axes = dict(one.axes)
    name = axes.pop("loss", None) or axes.pop("model.loss", None)
    if name is None:
        name = str(config.model.init_args.loss.class_path).rpartition(".")[2].removesuffix("Loss")
    varied = {"β" if key == "beta" else key.rpartition(".")[2]: value for key, value in axes.items() if _of_loss(key)}
    return " ".join([name, *(f"{'β' if key == 'beta' else key}={value}" for key, value in varied.items())])


def _of_loss(key: str) -> bool:
    return key == "beta" or key.startswith("model.loss.")


def _named(losses: dict[str, Any], name: str, config: Mapping[str, Any]) -> str:
    """Put a loss among the others, under a name that no other one has."""
    number, found = 1, name
    while losses.get(found, config) != config:
        number += 1
        found = f"{name} ({number})"
    losses[found] = config
    return found
