"""Ends commands at random moments, starts them again, and compares with what was never ended: to the bit.

`python tests/soak/soak.py --kills 200 --seed 0 --out table.md` needs to be root on Linux: each case has a small disk of
its own. Another `--seed` draws other cases; `--only 17` does one of them again, and keeps its folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

_HERE = Path(__file__).resolve().parent
for _folder in (_HERE, _HERE.parent, _HERE.parents[1] / "src"):
    sys.path.insert(0, str(_folder))

import soak_cases as cases  # noqa: E402
import soak_checks as checks  # noqa: E402
import soak_ends as ending  # noqa: E402
import soak_faults as faults  # noqa: E402
from soak_cases import Case, Config, Fault  # noqa: E402
from soak_ends import Ended  # noqa: E402
from soak_table import Outcome, read, table  # noqa: E402

import ranks as processes  # noqa: E402

_DISK = "96m"


class Straight(NamedTuple):
    """What was not ended, and what it took: moments, seconds of a processor, files and folders."""

    folder: Path
    moments: int
    seconds: float
    files: int


class Soak:
    """Straight runs, and cases next to them.

    Args:
        work: where everything is kept.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        made = work / "made"
        if not (made / "whole").exists():
            made.mkdir(exist_ok=True)
            cases.made_model(made / "model")
            cases.made_model(made / "other", seed=1)
            cases.made_pairs(made / "pairs.jsonl")
            cases.made_rankings(made / "ranked.jsonl")
            (made / "whole").touch()
        self.made = made
        self._straight: dict[str, Straight] = {}
        self._hopeless: dict[str, str] = {}
        self.configs: dict[str, Config] = cases.configurations(made / "model", made / "other", made / "adapter")

    # ---- what is started ----

    def words(self, command: str, config: str) -> list[str]:
        """Of the command line."""
        if command == "inspect":
            return ["inspect", "--data.train", str(self.made / "pairs.jsonl"), "--out", "report"]
        if command == "export":
            run = checks.last(self.straight("fit", "none, 2 workers").folder)
            assert run is not None
            return ["export", str(run.parent), "tuned", "--merge"]
        given = self.configs["cached"] if command == "ablate" else self.configs[config]
        ranked = "format" in given.data
        settings = cases.settings(given, self.made / "model", self.made / ("ranked.jsonl" if ranked else "pairs.jsonl"))
        file = self.made / f"{command} {config}.yaml"
        if command == "ablate":
            settings["model"].pop("reference")
            settings["trainer"].pop("logger")
            settings["trainer"]["callbacks"] = settings["trainer"]["callbacks"][:3]
            more = ["--vary", "loss=dpo,ipo", "--seeds", "1", "--completions", "2", "--out", "out"]
            return ["ablate", "--config", str(cases.write_settings(settings, file)), *more]
        return ["fit", "--config", str(cases.write_settings(settings, file))]

    def straight(self, command: str, config: str) -> Straight:
        """The run that nothing happens to, made once."""
        if config == "adapter reference" and not (self.made / "adapter").exists():
            one = checks.last(self.straight("fit", "none, 2 workers").folder)
            assert one is not None
            (self.made / "adapter").symlink_to(one.parent / "adapter")
        if config not in self._straight:
            folder = self.work / "straight" / config.replace(", ", "-").replace(" ", "_")
            kept = folder.with_suffix(".json")
            if not kept.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a soak that was ended itself
                folder.mkdir(parents=True)
                ended = self.run(folder, self.words(command, config), self._count(config), None, None)
                if any(ended.statuses):
                    raise SystemExit(f"{config} ended with {ended.statuses}:\n{ended.output[-4000:]}")
                if found := [*checks.torn(folder), *checks.leftovers(folder)]:
                    raise SystemExit(f"{config}, which nothing happened to, left {found}")
                kept.write_text(json.dumps([ended.moments, ended.seconds, sum(1 for _ in folder.rglob("*"))]))
            self._straight[config] = Straight(folder, *json.loads(kept.read_text()))
        return self._straight[config]

    def _count(self, config: str) -> int:
        return self.configs[config].ranks if config in self.configs else 1

    # ---- one command ----

    def run(self, root: Path, words: Sequence[str], count: int, fault: Fault | None, whole: Straight | None) -> Ended:
        """Start it, do the fault, and wait for its end."""
        notes = self.work / "notes"
        notes.mkdir(exist_ok=True)
        for file in notes.iterdir():
            file.unlink()
        (root / "scratch").mkdir(exist_ok=True)
        at = None
        if fault is not None and whole is not None and fault.by == "writes":
            at = 1 + int(fault.share * whole.moments)
        started = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(count):
            name = None if fault is None else fault.name
            given = (
                str(root),
                str(notes / f"counts-{rank}"),
                None if rank else at,
                name,
                bool(fault and fault.whom == "all"),
            )
            started.append(
                processes.command(
                    words,
                    log=notes / f"log-{rank}",
                    cwd=root,
                    environment=self._environment(root, notes, rank, count, port),
                    before=_begin,
                    given=given,
                )
            )
        struck = ""
        if fault is not None and whole is not None:
            struck = self._strike(root, started, fault, whole, notes)
        statuses, seconds, stuck = ending.ends(started)
        found = faults.fired(notes / "counts-0")
        output = "\n".join(one.output() for one in started)
        return Ended(statuses, seconds, found.moments, struck or found.what, output, stuck)

    def _environment(self, root: Path, notes: Path, rank: int, count: int, port: int) -> dict[str, str]:
        own = {
            "TMPDIR": str(root / "scratch"),
            "LIT_DPO_CACHE": str(root / "lit_dpo"),
            faults.PROGRESS: str(notes / "progress"),
            "COLUMNS": "200",
        }
        if count > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "NODE_RANK": 0}
            own |= {**{name: str(value) for name, value in names.items()}, "GROUP_RANK": "0"}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return {**os.environ, **own}

    def _strike(self, root: Path, started: list[Any], fault: Fault, whole: Straight, notes: Path) -> str:
        """Do what the process does not do to itself; where that was, or nothing."""
        if fault.by == "writes":
            while any(one.process.is_alive() for one in started):
                if faults.fired(notes / "counts-0").what:
                    if fault.whom == "all":
                        ending.send(started[1:], fault, rest=True)
                    break
                time.sleep(0.005)
            return ""
        number = 1 + int(fault.share * whole.files)
        while any(one.process.is_alive() for one in started):
            there = sum(len(folders) + len(files) for _, folders, files in os.walk(root)) if fault.by == "files" else 0
            if there >= number if fault.by == "files" else faults.cpu(started[0].pid) >= fault.share * whole.seconds:
                if fault.name in faults.SIGNALS:
                    ending.send(started if fault.whom == "all" else started[-1:], fault, rest=fault.whom == "all")
                elif not faults.strike(fault.name, str(root)):
                    time.sleep(0.01)
                    continue
                return f"file {number}" if fault.by == "files" else f"{fault.share:.0%} of the time"
            time.sleep(0.005)
        return ""

    # ---- a case ----

    def do(self, case: Case, *, keep: bool = False) -> Outcome:
        """Carry it out."""
        try:
            if case.config in self._hopeless:
                raise SystemExit(self._hopeless[case.config])
            whole = self.straight(case.command, case.config)
        except SystemExit as error:
            self._hopeless[case.config] = said = str(error)
            return Outcome(case, (), (), 0, 0, False, (f"nothing happened to it, and {ending.said(said)}",))
        root = self.work / f"case-{case.number}"
        with faults.own_disk(root, _DISK):
            found = self._done(case, root, whole)
            if keep or found.wrong:
                kept = self.work / "wrong" / root.name
                os.system(f"mkdir -p '{kept}' && cp -a '{root}/.' '{kept}/'")
        root.rmdir()
        return found

    def _done(self, case: Case, root: Path, whole: Straight) -> Outcome:
        hit, statuses, wrong = [], [], []
        lost, left, traced = 0, 0, False
        made: dict[str, int] = {}
        progress = self.work / "notes" / "progress"
        for fault in (*case.faults, None):
            goes_on = case.command == "fit" and checks.last(root) is not None
            words = [*self.words(case.command, case.config), *(["--ckpt_path", "last"] if goes_on else [])]
            if case.command == "export" and (root / "tuned").exists():
                break  # it was whole
            ended = self.run(root, words, self._count(case.config), fault, whole)
            self._keep(case, ended)
            statuses += ended.statuses
            if fault is not None:
                faults.mend(root)
            for run, (begun, now) in faults.steps(progress).items():
                lost, made[run] = max(lost, made.get(run, begun) - begun), now
            wrong += checks.torn(root) + ([ended.stuck] if ended.stuck else [])
            if fault is None or not ended.what:
                if any(ended.statuses):
                    wrong.append(f"ended with {ended.statuses}: {ending.said(ended.output)}")
                break
            hit.append(f"{fault.name} {fault.whom} at {ended.what}")
            wrong += ending.status_wrong(fault, ended)
            traced |= "Traceback" in ended.output
            left += len(checks.leftovers(root))
        if lost > cases.LAST_EVERY:
            wrong.append(f"{lost} steps were lost")
        if not wrong:
            compare = checks.differences if case.command == "fit" else _tools(case.command)
            try:
                wrong += compare(whole.folder, root)
            except (OSError, ValueError, KeyError) as error:
                wrong.append(f"{type(error).__name__}: {error}")
            wrong += [f"left over: {name}" for name in checks.leftovers(root)]
        return Outcome(case, tuple(hit), tuple(statuses), lost, left, traced, tuple(wrong))

    def _keep(self, case: Case, ended: Ended) -> None:
        head = f"==== {case}\n---- {ended.statuses} {ended.what} {ended.moments} moments, {ended.seconds:.1f} s"
        with (self.work / f"case-{case.number}.log").open("a") as file:
            file.write(f"{head}\n{ended.output}\n")


def _tools(command: str) -> Any:
    return lambda one, two: checks.tools_differ(command, one, two)


def _begin(root: str, counts: str, at: int | None, fault: str | None, rest: bool) -> None:
    """In the new process: what a new interpreter would find out anew, and the fault's moment."""
    import tempfile

    tempfile.tempdir = None
    faults.arm(root, counts, at, fault, rest)


def all_cases(soak: Soak, seed: int) -> Iterator[Case]:
    """Without an end."""
    boards = {name for name, one in soak.configs.items() if one.board}
    several = {name for name, one in soak.configs.items() if one.ranks > 1}
    number = 0
    while True:
        yield cases.drawn(seed, number, [*soak.configs], boards, several)
        number += 1


@contextmanager
def _quiet_server() -> Iterator[None]:
    """What libraries read when they are imported."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    yield


def main() -> None:
    """See `--help`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("table.md"))
    parser.add_argument("--work", type=Path, default=Path("soak-work"), help="what was done in it before counts")
    parser.add_argument("--only", type=int, nargs="*", help="these cases alone; their folders are kept")
    given = parser.parse_args()
    with _quiet_server():
        os.environ["HF_HOME"] = str((given.work / "hf").absolute())
        soak = Soak(given.work.absolute())
        kept = given.work / f"outcomes-{given.seed}.jsonl"
        outcomes = [] if given.only else read(kept)
        done = {one.case.number for one in outcomes}
        for case in all_cases(soak, given.seed):
            if given.only and case.number > max(given.only):
                break
            if case.number in done or (given.only and case.number not in given.only):
                continue
            began = time.monotonic()
            one = soak.do(case, keep=bool(given.only))
            outcomes.append(one)
            if not given.only:
                with kept.open("a") as file:
                    file.write(json.dumps(one) + "\n")
            said = "equal" if not one.wrong else "; ".join(one.wrong)
            print(
                f"{case.number:4} {case.config:26} {' / '.join(one.hit) or 'too late'} -> {one.statuses}, "
                f"lost {one.lost}, left {one.left}{', traceback' if one.traceback else ''}, "
                f"{time.monotonic() - began:.0f} s: {said}",
                flush=True,
            )
            given.out.write_text(table(outcomes, given.seed))
            if sum(len(one.hit) for one in outcomes) >= given.kills:
                break


if __name__ == "__main__":
    main()
