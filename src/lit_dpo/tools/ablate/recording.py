"""What is kept of a run while it trains: the rows that it logs, and what it has cost."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger


class Recorder(pl.Callback):
    """Counts seconds, tokens and memory of a run; a run that goes on counts from its checkpoint.

    So what a kill made the run do twice is counted once: seconds and tokens are those of the steps that are in the
    result, and of its validations.
    """

    def __init__(self) -> None:
        self._before = 0.0
        self._began: float | None = None
        self._tokens = self._pending = self._memory = 0
        self._step = -1
        self._on_gpu = False

    @property
    def seconds(self) -> float:
        """Of `fit` so far, those before its checkpoint too."""
        return self._before + (0.0 if self._began is None else time.monotonic() - self._began)

    @property
    def tokens(self) -> int:
        """That went into optimizer steps: each prompt once, and all its completions."""
        return self._tokens

    @property
    def memory(self) -> int:
        """Most bytes so far: allocated on the GPU, or resident."""
        now = torch.cuda.max_memory_allocated() if self._on_gpu else _resident_peak()
        return max(self._memory, now)

    def begin(self, *, on_gpu: bool) -> None:
        """Count from here: a process has had other runs."""
        self.__init__()  # type: ignore[misc]
        self._began, self._on_gpu = time.monotonic(), on_gpu
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            _forget_resident_peak()

    def end(self) -> None:
        """Count no more seconds."""
        self._before, self._began = self.seconds, None

    def state_dict(self) -> dict[str, Any]:
        """Into each checkpoint."""
        return {"seconds": self.seconds, "tokens": self._tokens, "memory": self.memory}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._before, self._tokens, self._memory = (state_dict[name] for name in ("seconds", "tokens", "memory"))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Know which step it is."""
        self._step, self._pending = trainer.global_step, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch when its step is made: one that is accumulated may come again."""
        self._pending += int(batch.input_ids.shape[-1]) if hasattr(batch, "input_ids") else 0
        if trainer.global_step != self._step:
            self._tokens, self._pending, self._step = self._tokens + self._pending, 0, trainer.global_step


class Rows(Logger):
    """Writes each logged row into `rows.jsonl` of the run's folder, with what it has cost up to there.

    A run that goes on logs some steps again, with the same numbers: the last row of a step holds.
    """

    def __init__(self, folder: Path, recorder: Recorder) -> None:
        super().__init__()
        self._path, self._recorder = folder / "rows.jsonl", recorder

    @property
    def name(self) -> str:
        """Of no folder."""
        return "rows"

    @property
    def version(self) -> int:
        """There is one."""
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row."""
        cost = {
            "seconds": self._recorder.seconds,
            "tokens": float(self._recorder.tokens),
            "peak_memory": float(self._recorder.memory),
        }
        row = {"step": float(step or 0), **{name: float(value) for name, value in metrics.items()}, **cost}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def read_rows(folder: Path) -> list[dict[str, float]]:
    """Return a run's rows by step; what is logged at one step is one row."""
    path = folder / "rows.jsonl"
    rows: dict[float, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a kill tore it; the step is logged again
            continue
        rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def _resident_peak() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most


def _forget_resident_peak() -> None:
    """Where the kernel lets a process do so; else the peak is that of the process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
