"""One run, for whoever chooses the next one: Optuna, Hydra, a loop."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_dpo.errors import AblationError
from lit_dpo.tools.ablate.configuring import FitCLI
from lit_dpo.tools.ablate.single import flags_kept


def run(config: Mapping[str, Any] | Sequence[str] | str | Path, out: str | Path | None = None) -> dict[str, float]:
    """See `lit_dpo.tools.ablate.run`."""
    folder = None if out is None else Path(out)
    if folder is not None and folder.is_dir() and any(folder.iterdir()):
        raise AblationError(f"Expected a new folder for the run but {folder} holds files: name another `out`.")
    cli = FitCLI()
    cli.folder, cli.alone = folder, True
    cli.parse(arguments_of(config))
    with flags_kept():
        cli.build()
        cli.recorder.begin(on_gpu=cli.trainer.strategy.root_device.type == "cuda")
        cli.fitted()
        cli.recorder.end()
    found = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    recorder = cli.recorder
    costs = {"seconds": recorder.seconds, "tokens": recorder.tokens, "peak_memory": recorder.memory}
    return {**found, "steps": float(cli.trainer.global_step), **{name: float(one) for name, one in costs.items()}}


def arguments_of(config: Mapping[str, Any] | Sequence[str] | str | Path) -> list[str]:
    """Write a configuration as arguments of `fit`; a class before what is within it.

    Example:
        >>> arguments_of({"model": {"loss": {"beta": 0.3}}, "config": "run.yaml", "model.loss": "IPOLoss"})
        ['--config=run.yaml', '--model.loss=IPOLoss', '--model.loss.beta=0.3']
        >>> arguments_of("run.yaml")
        ['--config=run.yaml']
    """
    if isinstance(config, str | Path):
        return [f"--config={config}"]
    if not isinstance(config, Mapping):
        return [str(one) for one in config]
    found = sorted(_options(config, ""), key=lambda pair: (pair[0] != "config", pair[0].count(".")))
    return [f"--{name}={value}" for name, value in found]


def _options(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        key = f"{prefix}.{name}".strip(".")
        if isinstance(value, Mapping) and "class_path" not in value:
            yield from _options(value, key)
        elif isinstance(value, str | Path):
            yield key, str(value)
        else:
            yield key, json.dumps(_builtins(value))


def _builtins(value: Any) -> Any:
    """Turn OmegaConf's mappings and lists, and NumPy's numbers, into Python's."""
    if isinstance(value, Mapping):
        return {str(name): _builtins(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_builtins(one) for one in value]
    return value.item() if hasattr(value, "item") else value
