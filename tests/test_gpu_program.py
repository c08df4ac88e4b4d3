"""`benchmarks/gpu.py`: every phase by itself, its result whole on disk, whatever becomes of the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="a source distribution has no benchmarks")
# A program of its own: other phases, the same `main`.
PROGRAM = """
import os, subprocess, sys, time
from pathlib import Path
from gpu_run import MissingError, Phase, main

def one(run):
    run.note(figure=1.5)
    return "one is done"

def wrong(run):
    run.note(half=0.5)
    print("what it has said", file=sys.stderr)
    raise ValueError("a shape is wrong\\nand more")

def gone(run):
    os._exit(3)

def lacking(run):
    raise MissingError("trl is not installed")

def endless(run):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    run.note(line="a part of it", child=child.pid, me=os.getpid())
    Path("endless").write_text(f"{os.getpid()} {child.pid}")
    child.wait()

def two(run):
    return f"after {sorted(run.before)}, the figure was {run.before['one']['figure']}"

phases = {one.__name__: Phase(one.__name__, one, 10, 10) for one in (one, wrong, gone, lacking, two)}
phases["endless"] = Phase("endless", endless, float(os.environ.get("ENDLESS", 1)), float(os.environ.get("ENDLESS", 1)))
sys.exit(main([phases[name] for name in os.environ["PHASES"].split()]))
"""


def start(folder: Path, phases: str, *arguments: str, endless: float = 1) -> subprocess.Popen[str]:
    (folder / "program.py").write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, "program.py", "--rehearse", "--out", "out", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "PHASES": phases,
            "ENDLESS": str(endless),
            "PYTHONPATH": str(BENCHMARKS),
            "TMPDIR": str(folder),
        },
    )


def results(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "out" / "gpu.json").read_text())["phases"]


def is_there(process: int) -> bool:
    """And not a child whose end nobody has asked for yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def test_a_phase_that_fails_is_reported_and_the_next_one_runs(tmp_path):
    program = start(tmp_path, "one wrong gone lacking two")
    said = program.communicate(timeout=60)[0]
    found = results(tmp_path)
    states = {name: result["state"] for name, result in found.items()}
    assert states == {"one": "ok", "wrong": "failed", "gone": "failed", "lacking": "left out", "two": "ok"}
    assert program.returncode == 1
    assert found["wrong"]["line"] == "ValueError: a shape is wrong"
    assert found["wrong"]["found"] == {"half": 0.5}, "what was known before"
    assert "what it has said" in found["wrong"]["errors"]
    assert found["gone"]["line"] == "its process ended with 3"
    assert found["two"]["line"] == "after ['one', 'wrong'], the figure was 1.5"
    assert all(result["rehearsal"] for result in found.values())
    lines = [line for line in said.splitlines() if line.startswith("[rehearsal] ")]
    assert [line.split()[1] for line in lines] == list(found), "a line each"
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert table in said
    assert table.startswith("A rehearsal on a CPU")
    assert all(f"| {name} | {result['state']} |" in table for name, result in found.items())


def test_what_is_left_out_by_name_is_no_failure(tmp_path):
    program = start(tmp_path, "one lacking endless", "--minutes", "0.25", endless=60)
    program.communicate(timeout=60)
    found = results(tmp_path)
    assert [result["state"] for result in found.values()] == ["ok", "left out", "left out"]
    assert found["endless"]["line"].startswith("no time: it may need 60 s and ")
    assert found["endless"]["seconds"] == 0
    assert program.returncode == 0


def test_a_phase_that_had_not_its_whole_time_is_left_out(tmp_path):
    program = start(tmp_path, "endless", "--minutes", "0.1", endless=3)  # 6 s, of which 4 are kept for the end
    program.communicate(timeout=60)
    result = results(tmp_path)["endless"]
    assert (result["state"], program.returncode) == ("left out", 0)
    assert result["line"].startswith("no time: not done in the ")
    assert not is_there(result["found"]["child"])


def test_a_phase_that_takes_too_long_is_ended_with_its_children(tmp_path):
    program = start(tmp_path, "one endless two")
    program.communicate(timeout=60)
    found = results(tmp_path)
    assert found["endless"]["state"] == "over time"
    assert found["endless"]["line"].endswith("s, ended; a part of it")
    assert found["endless"]["seconds"] < 5, "three times what it may take"
    assert not is_there(found["endless"]["found"]["me"])
    assert not is_there(found["endless"]["found"]["child"])
    assert (found["two"]["state"], program.returncode) == ("ok", 1)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_program_that_is_stopped_leaves_what_was_finished(tmp_path, number, status):
    program = start(tmp_path, "one endless two", endless=60)
    wait_for((tmp_path / "endless").is_file)
    program.send_signal(number)
    program.communicate(timeout=60)
    assert program.returncode == status
    found = results(tmp_path)
    assert list(found) == ["one"]
    assert found["one"]["found"] == {"figure": 1.5}
    assert "| one | ok |" in (tmp_path / "out" / "gpu.md").read_text()
    phase, child = map(int, (tmp_path / "endless").read_text().split())
    wait_for(lambda: not is_there(phase) and not is_there(child))
    assert not list(tmp_path.glob("lit-dpo-gpu-*")), "the folder of weights"


def test_early_phases_take_time_from_nobody(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from gpu_run import Phase, share

    phases = [Phase(name, str, seconds, 1.0) for name, seconds in (("a", 10.0), ("b", 20.0), ("c", 30.0))]
    assert share(phases, 60, False) == 10, "all of it is promised"
    assert share(phases, 65, False) == 15, "what nobody needs"
    assert share(phases, 600, False) == 30, "a hang"
    assert share(phases[1:], 15, False) == 15, "what is left"
    assert share(phases[1:], 40, False) == 20, "the last may have less"
    assert share(phases, 600, True) == 3


def test_an_unknown_phase_is_named(tmp_path):
    program = start(tmp_path, "one two", "--only", "one,three")
    assert "but got 'three'" in program.communicate(timeout=60)[0]
    assert program.returncode == 2


def test_the_rehearsal(tmp_path):
    """Its phases with what a fresh environment has, at the sizes of a CPU; `pytest -m gpu` is the suite's already."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--rehearse", "--out", str(tmp_path), "--minutes", "3"]
    done = subprocess.run(
        [*command, "--only", "a,d-nf4-long,e"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    found = json.loads((tmp_path / "gpu.json").read_text())["phases"]
    assert done.returncode == 0, done.stdout + json.dumps(found, indent=1)
    assert {result["state"] for result in found.values()} == {"ok"}
    assert "no card" in found["a-card"]["line"]
    assert found["a-card"]["found"]["matrix_flops"] > 0
    assert found["d-nf4-long"]["found"]["sides"]["lit_dpo"]["pairs/s"] > 0
    longest = found["e-step"]["found"]["longest"]
    assert len(longest) == 15
    assert [one["seconds"] for one in longest] == sorted((one["seconds"] for one in longest), reverse=True)
    assert 0 <= found["e-step"]["found"]["idle"] < 1
