"""One run of an ablation, from its arguments to its folder; in whatever process."""

from __future__ import annotations

import gc
import json
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_dpo.errors import LitDPOError
from lit_dpo.policy import shared
from lit_dpo.tools.ablate.configuring import FitCLI
from lit_dpo.tools.ablate.measuring import judge_of, losses_of, measure
from lit_dpo.tools.ablate.recording import read_rows
from lit_dpo.tools.ablate.records import Asked, Layout, Result
from lit_dpo.tools.ablate.sharing import fill, measured_by
from lit_dpo.writing import remove, written_whole

_KEPT = ("log.txt",)


class Work(NamedTuple):
    """What a worker is given: a run, or the pass of a reference that comes before the runs."""

    asked: Asked
    arguments: list[str]
    """Of `fit`, all of them."""
    losses: Mapping[str, Any]
    """That everything is measured by: their configuration by name."""
    loss: str
    """Among them: the run's own."""
    root: str
    completions: int
    """How many are sampled of the fitted policy."""
    judge: str | None
    """Import path of who judges them."""
    is_pass: bool = False

    def to_json(self) -> str:
        """Return a line."""
        return json.dumps(self._replace(asked=self.asked._asdict())._asdict())  # type: ignore[arg-type]

    @classmethod
    def from_json(cls, line: str | bytes) -> Work:
        """Read a line."""
        given = json.loads(line)
        return cls(**{**given, "asked": Asked(**given["asked"])})


def do(cli: FitCLI, work: Work) -> str:
    """Do what is asked; an error, in a paragraph, or nothing."""
    try:
        if work.is_pass:
            _pass(cli, work)
        else:
            _run(cli, work)
    except SystemExit:  # of SIGTERM
        raise
    except LitDPOError as error:
        return str(error)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    finally:
        _forget(cli)
    return ""


def _pass(cli: FitCLI, work: Work) -> None:
    cli.folder = None
    cli.parse(work.arguments)
    cli.build()
    fill(cli.model, cli.datamodule, cli.trainer, Layout(Path(work.root)).cache)


def _run(cli: FitCLI, work: Work) -> None:
    layout = Layout(Path(work.root))
    folder = layout.run(work.asked.name)
    last = folder / "last.ckpt"
    goes_on = last.is_file()
    _clean(folder, goes_on=goes_on)
    cli.folder = folder
    cli.parse([*work.arguments, *(["--ckpt_path", str(last)] if goes_on else [])])
    with flags_kept():
        cli.build()
        cli.recorder.begin(on_gpu=cli.trainer.strategy.root_device.type == "cuda")
        cli.fitted()
        cli.recorder.end()
        reference = measured_by(cli.model, layout.cache)
        pairs, completions = measure(
            cli.model, cli.datamodule, losses_of(work.losses), reference, work.completions, judge_of(work.judge)
        )
    _write(folder, work, cli, pairs, completions)


def _write(folder: Path, work: Work, cli: FitCLI, pairs: Any, completions: list[dict[str, Any]]) -> None:
    import pyarrow.parquet as pq

    with written_whole(folder / "pairs.parquet") as temporary:
        pq.write_table(pairs, temporary)
    asked, recorder = work.asked, cli.recorder
    result = Result(
        name=asked.name,
        axes=asked.axes,
        seed=asked.seed,
        status="done",
        loss=work.loss,
        steps=cli.trainer.global_step,
        seconds=recorder.seconds,
        tokens=recorder.tokens,
        peak_memory=recorder.memory,
        curves=read_rows(folder),
        completions=completions,
    )
    write_result(folder, result)


def write_result(folder: Path, result: Result) -> None:
    """Write `result.json`, whole."""
    with written_whole(folder / "result.json") as temporary:
        temporary.write_text(json.dumps(result._asdict(), indent=1) + "\n", encoding="utf-8")


def read_result(folder: Path) -> Result | None:
    """Return what became of a run, if it has ended."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    return Result(**json.loads(path.read_text(encoding="utf-8")))


def _clean(folder: Path, *, goes_on: bool) -> None:
    """Leave what a run goes on from, or nothing: what it writes at its end is written again."""
    for found in folder.iterdir() if folder.is_dir() else ():
        at_the_end = found.name.startswith(("adapter", "result.json", "pairs.parquet"))
        if found.name not in _KEPT and (at_the_end or not goes_on):
            remove(found)


def _forget(cli: FitCLI) -> None:
    """Give the base back, and let the rest of the run go."""
    model = getattr(cli, "model", None)
    if getattr(model, "model", None) is not None:
        shared.give_back(model.model)  # type: ignore[union-attr]
    for name in ("model", "datamodule", "trainer", "config_init", "config", "config_dump"):
        vars(cli).pop(name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def flags_kept() -> Iterator[None]:
    """Leave PyTorch's switches for the next run as they are: `trainer.deterministic` and others set them for good."""
    cudnn = torch.backends.cudnn
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.benchmark, cudnn.deterministic, torch.get_float32_matmul_precision(), torch.get_default_dtype()
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = flags[:2]
        torch.set_float32_matmul_precision(flags[2])
        torch.set_default_dtype(flags[3])
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
