from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lit_dpo import __version__, environment
from lit_dpo.callbacks.alone import alone
from lit_dpo.callbacks.export import data_facts, data_of, run_directory
from lit_dpo.checkpoint import describe
from lit_dpo.versions import ENVIRONMENT, check_version
from lit_dpo.writing import written_whole

if TYPE_CHECKING:
    from lit_dpo.module import DPOModule

FILE = "environment.json"
"""In the run's directory."""


class RunEnvironment(pl.Callback):
    """Writes `environment.json` into the run's directory before weights load: what it takes to make the run again.

    `starts` has one entry each time that the run was started; one that goes on adds to those before, also from another
    directory. Each says when (UTC), by which command, from which checkpoint; versions of Python and of all packages,
    the commit of lit_dpo and of the working directory and whether files have changed since (`changed`); content of the
    base and of the training data, seeds, precision and PyTorch's switches; processor, memory, GPUs and ranks; and
    variables of the environment. Values that look like secrets are left out. A run without a logger has no directory of
    its own, and no such file.
    """

    def __init__(self) -> None:
        self._directory: Path | None = None
        self._before: list[dict[str, Any]] = []
        self._now: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: DPOModule, stage: str) -> None:
        """Write it, on the first rank; a disk that refuses costs no run."""
        self._directory = None
        if not trainer.loggers or getattr(trainer, "fast_dev_run", False):
            return
        directory = run_directory(trainer)  # all ranks ask
        if trainer.is_global_zero:
            with alone(FILE):
                self._before, self._now = starts(directory), start(trainer, pl_module, stage)
                _write(directory, [*self._before, self._now])
                self._directory = directory

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: DPOModule, checkpoint: dict[str, Any]) -> None:
        """Name the checkpoint, which Lightning does not know before, and what its run said."""
        if self._directory is None or trainer.ckpt_path is None:
            return
        with alone(FILE):
            self._now["checkpoint"] = str(trainer.ckpt_path)
            # next to it, or one folder further up
            for folder in [] if self._before or "://" in str(trainer.ckpt_path) else _above(trainer.ckpt_path):
                self._before = self._before or starts(folder)
            _write(self._directory, [*self._before, self._now])


def _above(file: Any) -> list[Path]:
    return list(Path(file).resolve().parents)[:2]


def start(trainer: pl.Trainer, module: DPOModule, stage: str) -> dict[str, Any]:
    """Say what a run depends on, as it starts."""
    data, belongs, device = data_of(trainer), describe(module, trainer), trainer.strategy.root_device.type
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "stage": stage,
        "command": environment.command(),
        "checkpoint": None,
        "lit_dpo": {"version": __version__, **environment.own_code()},
        "directory": environment.code(Path.cwd()),
        "python": platform.python_version(),
        "packages": environment.packages(),
        "base": belongs["base"],
        "adapter": belongs["policy"]["adapter"],
        "data": {"digest": belongs["training"].get("data"), **data_facts(data)},
        "seed": {"everything": os.environ.get("PL_GLOBAL_SEED"), "data": getattr(data, "seed", None)},
        "precision": {"trainer": str(trainer.precision), **environment.switches()},
        "hardware": {
            **environment.machine(),
            **environment.gpus(device),
            "device": device,
            "strategy": type(trainer.strategy).__name__,
            "ranks": trainer.world_size,
            "nodes": trainer.num_nodes,
        },
        "variables": environment.variables(),
    }


def _write(directory: Path, found: list[dict[str, Any]]) -> None:
    with written_whole(directory / FILE) as temporary:
        said = {"version": ENVIRONMENT, "starts": found}
        temporary.write_text(json.dumps(said, indent=1, default=str) + "\n", encoding="utf-8")


def starts(directory: Path) -> list[dict[str, Any]]:
    """Return the starts of a run, the first one first; none where there is no file.

    Raises:
        VersionError: if a newer release has written it.
        ValueError: if it is something else.
    """
    path = directory / FILE
    if not path.is_file():
        return []
    said = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(said, dict) or not isinstance(found := said.get("starts"), list):
        raise ValueError(f"expected the starts of a run in {path}")
    check_version(said.get("version"), ENVIRONMENT, path)
    return [one for one in found if isinstance(one, dict)]
