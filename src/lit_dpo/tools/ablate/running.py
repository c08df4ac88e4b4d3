"""Runs all that is asked: what is done stays, what was interrupted goes on, what fails is told."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import yaml

from lit_dpo import __version__
from lit_dpo.errors import AblationError
from lit_dpo.tools.ablate.pool import Pool, pool
from lit_dpo.tools.ablate.preparing import Options, Prepared, prepare
from lit_dpo.tools.ablate.records import Asked, Layout, Result
from lit_dpo.tools.ablate.single import Work, read_result, write_result
from lit_dpo.versions import ABLATION, check_version
from lit_dpo.writing import written_whole

log = logging.getLogger(__name__)

_PATIENCE = 60.0
"""Seconds that what was killed before may take to end."""


def run_all(
    asked: Sequence[Asked],
    layout: Layout,
    *,
    jobs: int,
    options: Options = Options(),  # noqa: B008 - a constant
) -> list[Result]:
    """Make runs, in processes of their own, and say what became of each.

    Everything is checked before the first one starts. A run whose `result.json` is there is not made again; one with a
    `last.ckpt` goes on from it, to the bit. One that fails is reported, and the others go on.

    Args:
        asked: the runs; their arguments may hold `--ckpt_path` and callbacks.
        layout: where they write.
        jobs: how many at once.
        options: how they are measured.

    Returns:
        A result for each run, in their order; of runs that are the same, one.

    Raises:
        AblationError: for runs that cannot work, or that are not those of the folder.
    """
    return carry_out(prepare(asked, layout, options), layout, jobs=jobs)


def carry_out(prepared: Prepared, layout: Layout, *, jobs: int) -> list[Result]:
    """Make runs that are prepared; see `run_all`."""
    with _locked(layout) as held:
        _remember(prepared, layout)
        todo = [work for work in prepared.works if not _is_done(work, layout)]
        if len(todo) < len(prepared.works):
            log.info("%s of %s runs are done already.", len(prepared.works) - len(todo), len(prepared.works))
        if todo:
            with pool(min(jobs, len(todo)), held) as workers:
                _passes(workers, prepared, layout)
                before = _cached(layout)
                _Runs(prepared, layout).do(workers, todo)
                if (more := _cached(layout) - before) > 0:
                    log.info("runs have computed the reference of %s completions that its pass had not seen.", more)
    return [_result(work, layout) for work in prepared.works]


def _passes(workers: Pool, prepared: Prepared, layout: Layout) -> None:
    """Let each reference see the data once."""
    marks = {key: layout.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.seen" for key in prepared.passes}
    todo = {key: work for key, work in prepared.passes.items() if not marks[key].is_file()}
    began = time.monotonic()

    def done(work: Work, error: str) -> None:
        if error:
            log.warning("the pass of the reference failed, and runs compute it: %s", error)
            return
        (key,) = (key for key, one in todo.items() if one is work)
        with written_whole(marks[key]) as temporary:
            temporary.write_text(key + "\n", encoding="utf-8")

    workers.do(list(todo.values()), done)
    for line in _of_data(layout) if todo else ():
        log.info("%s", line)
    if todo:
        count = f"{len(todo)} references" if len(todo) > 1 else "the reference"
        log.info("%s passed once over the data, in %.0f s: runs read it.", count, time.monotonic() - began)


def _of_data(layout: Layout) -> list[str]:
    """Return what a run says of its data, each line once: all runs say it again, into files that few people read."""
    path = layout.cache / "log.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return [line for line in dict.fromkeys(lines) if line.startswith(("train: ", "val: "))]


class _Runs:
    """Says how far things are."""

    def __init__(self, prepared: Prepared, layout: Layout) -> None:
        self.all, self.layout = len(prepared.works), layout
        self.ended = 0

    def do(self, workers: Pool, todo: Sequence[Work]) -> None:
        self.ended = self.all - len(todo)
        log.info("%s runs, %s at a time", len(todo), min(workers.jobs, len(todo)))
        workers.do(todo, self.done)

    def done(self, work: Work, error: str) -> None:
        self.ended += 1
        folder = self.layout.run(work.asked.name)
        if error:
            asked = work.asked
            write_result(folder, Result(asked.name, asked.axes, asked.seed, "failed", error, work.loss))
            log.warning("[%s/%s] %s failed: %s", self.ended, self.all, work.asked.name, error)
            return
        result = read_result(folder)
        assert result is not None
        said = f"{result.steps} steps in {result.seconds:.0f} s"
        last = next((row["val/reward_accuracy"] for row in result.curves[::-1] if "val/reward_accuracy" in row), None)
        said += "" if last is None else f", val/reward_accuracy {last:.3f}"
        log.info("[%s/%s] %s: %s", self.ended, self.all, result.name, said)


def _is_done(work: Work, layout: Layout) -> bool:
    found = read_result(layout.run(work.asked.name))
    return found is not None and found.status == "done"


def _result(work: Work, layout: Layout) -> Result:
    found = read_result(layout.run(work.asked.name))
    assert found is not None
    return found


def _cached(layout: Layout) -> int:
    """Completions in the shared cache."""
    from lit_dpo.references.store import LogpStore

    folders = [folder for folder in layout.cache.glob("*") if folder.is_dir()] if layout.cache.is_dir() else []
    return sum(len(LogpStore(folder)) for folder in folders)


# ---- what was asked ----


def _remember(prepared: Prepared, layout: Layout) -> None:
    """Write down what is asked, or see that it is what was asked before.

    Raises:
        AblationError: naming what differs.
    """
    options = prepared.options._asdict()
    asked = {"version": ABLATION, "lit_dpo": __version__, "options": options, "runs": prepared.configs}
    if layout.asked.is_file():
        before = json.loads(layout.asked.read_text(encoding="utf-8"))
        check_version(before.get("version"), ABLATION, layout.asked)
        changed = [f"`--{key}` was {before['options'].get(key)} and is {now}" for key, now in options.items()]
        changed = [
            line for line, key in zip(changed, options, strict=True) if before["options"].get(key) != options[key]
        ]
        if found := ", ".join(changed) or differences(before["runs"], prepared.configs):
            raise AblationError(
                f"Expected the command that {layout.root} was made with, to go on, but there {found}. Repeat that "
                "command, or name another `--out`."
            )
        return
    if layout.root.is_dir() and any(layout.run("x").parent.glob("*")):
        raise AblationError(f"Expected a new folder, or one of an ablation, but {layout.root} holds other runs.")
    with written_whole(layout.asked) as temporary:
        temporary.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say what differs, the first of it; nothing where nothing does."""
    for names, what in ((before.keys() - now.keys(), "was"), (now.keys() - before.keys(), "was no")):
        if names:
            more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
            return f"{what} {', '.join(sorted(names)[:3])}{more}"
    for name, text in now.items():
        if before[name] == text:
            continue
        old, new = _flat(yaml.safe_load(before[name])), _flat(yaml.safe_load(text))
        keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        said = [f"`{key}` was {old.get(key)} and is {new.get(key)}" for key in keys[:3]]
        return f"{', '.join(said)} (in {name})"
    return ""


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for name, one in value.items():
            # as it is typed
            inner = key if name == "init_args" else f"{key}.{name}".strip(".")
            found |= _flat(one, inner)
        return found
    return {key: value}


@contextmanager
def _locked(layout: Layout) -> Iterator[list[int]]:
    """Hold the folder, for this process and for the workers that inherit the descriptor that is given.

    Raises:
        AblationError: if another ablation does, and does not end soon.
    """
    layout.root.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        yield []
        return
    import fcntl

    path = layout.root / ".lock"
    number = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise AblationError(
                        f"Another ablation is at work in {layout.root}: name another `--out`."
                    ) from None
                time.sleep(0.2)
        yield [number]
    finally:
        os.close(number)
