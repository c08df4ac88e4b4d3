"""Mutation testing: `python tests/mutation/run.py ROOM… --count 20` makes mistakes and lists those that no test sees.

With `--out FILE` each is a line of JSON there; `--again FILE` has more tests try those of such a file that survived.

Each mistake is one process, forked from this one, which has imported the libraries and nothing of ours: it imports the
module with the mistake and runs the tests that belong to it, until the first fails. Nothing is written into the tree.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.machinery
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE, TESTS = ROOT / "src" / "lit_dpo", ROOT / "tests"
sys.path[:0] = [str(Path(__file__).parent), str(TESTS), str(ROOT / "src")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from mutants import Mutant, mutants  # noqa: E402
from related import related  # noqa: E402

_LIBRARIES = (
    *("torch", "lightning.pytorch.cli", "lightning.pytorch.loggers", "lightning.pytorch.strategies", "torchmetrics"),
    *("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "peft.tuners.lora"),
    *("bitsandbytes", "datasets", "pyarrow.parquet", "pandas", "tokenizers", "hypothesis", "pytest", "filelock"),
    *("torch.utils.tensorboard", "torch._dynamo", "transformers.pipelines", "safetensors.torch", "torch.distributed"),
)
_SECONDS = 240
"""Of a processor, that the tests of a mistake may take: it may never end."""
_PATIENCE = 1800.0
"""Seconds of a clock: it may wait for ever."""


_STATES = {0: "survived", 1: "killed", 5: "no test"} | dict.fromkeys(
    (-signal.SIGKILL, -signal.SIGXCPU), "killed: it does not end"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rooms", nargs="*", help="folders or files of src/lit_dpo: losses, data/encode.py")
    parser.add_argument("--count", type=int, default=20, help="mistakes in each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="mistakes whose line of text has this")
    parser.add_argument("--again", type=Path, help="a file that `--out` wrote: those that survived, with more tests")
    parser.add_argument("--out", type=Path, help="where to add a line of JSON for each")
    given = parser.parse_args()
    gc.disable()
    for name in _LIBRARIES:
        importlib.import_module(name)
    assert not any(name.partition(".")[0] == "lit_dpo" for name in sys.modules)
    gc.freeze()
    gc.enable()
    again = [json.loads(line) for line in given.again.read_text().splitlines()] if given.again else []
    survived = {(one["file"], one["mutant"]) for one in again if one["state"] == "survived"}
    for room in given.rooms or dict.fromkeys(one["room"] for one in again):
        place = SOURCE / room
        counts: Counter[bool] = Counter()
        for file in sorted(place.glob("*.py")) if place.is_dir() else [place]:
            for one in mutants(file, given.count, given.seed):
                name = str(file.relative_to(SOURCE))
                if given.only not in one.name or (given.again and (name, one.name) not in survived):
                    continue
                begun = time.monotonic()
                state = _outcome(one, wide=given.again is not None)
                counts[state == "survived"] += 1
                found = {"room": room, "file": name, "mutant": one.name, "state": state}
                if given.out:
                    with given.out.open("a") as stream:
                        stream.write(json.dumps(found | {"seconds": round(time.monotonic() - begun, 1)}) + "\n")
                if state == "survived":
                    print(f"survived: {name} {one.name}", flush=True)
        print(f"{room}: {counts[False]} of {counts.total()} killed", flush=True)


def _outcome(mutant: Mutant, *, wide: bool) -> str:
    """Killed by a test, by time, or not at all."""
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    process = os.fork()
    if process == 0:
        _test(mutant, folder, wide=wide)
    end = time.monotonic() + _PATIENCE
    try:
        while time.monotonic() < end:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return _STATES.get(os.waitstatus_to_exitcode(status), "killed: it does not start")
            time.sleep(0.02)
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return _STATES[-signal.SIGKILL]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _test(mutant: Mutant, folder: Path, *, wide: bool) -> None:
    """In a process of its own: put the module in its place, and run what belongs to it."""
    code = 3
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
        made = importlib.machinery.SourceFileLoader.get_code

        def get_code(self: importlib.machinery.SourceFileLoader, name: str) -> object:
            if Path(self.path) == mutant.file:
                return compile(mutant.tree, str(mutant.file), "exec")
            return made(self, name)

        importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[assignment]
        import pytest

        os.chdir(ROOT)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={folder / 'tmp'}"]
        code = 0
        for tests in related(mutant.file.relative_to(SOURCE), wide=wide):
            code = int(pytest.main([*options, *tests]))
            if code not in (0, 5):
                break
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
