"""How long it takes until something happens: imports, help, the first training step, tokenisation.

python benchmarks/startup.py                                        # the quickstart's model and data
python benchmarks/startup.py --data pairs.jsonl --tokenizer FOLDER  # tokenisation of these alone

Each figure is the median of `--repeat` fresh processes, taken in turn; CPU time is user and system time of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")
COMMAND = [sys.executable, "-m", "lit_dpo"]
FIT = [*COMMAND, "fit", "--config", CONFIG]
STARTS = {
    "import lit_dpo": [sys.executable, "-c", "import lit_dpo"],
    "--help": [*COMMAND, "--help"],
    "fit --help": [*COMMAND, "fit", "--help"],
    "fit --print_config": [*FIT, "--print_config"],
    "fit, to the first step": [*FIT, "--trainer.callbacks", "first_step.Stop", "--trainer.logger", "false"],
}
# Leaves when the first step is done: what follows it is not the start.
FIRST_STEP = """
import os
from lightning.pytorch import Callback

class Stop(Callback):
    def on_train_batch_end(self, *args):
        os._exit(0)
"""
TOKENIZE = """
import json, sys, time
import datasets
from lit_dpo import PreferenceDataModule
datasets.disable_progress_bars()
cache, data, tokenizer = sys.argv[1:]
datasets.config.HF_DATASETS_CACHE = cache
module = PreferenceDataModule(train=data, tokenizer=tokenizer, max_length=None)
module.loaded_tokenizer
start, wall = time.process_time(), time.perf_counter()
module.setup("fit")
table = module.train_dataloader().dataset.table
seconds = time.process_time() - start, time.perf_counter() - wall
print(json.dumps([*seconds, table.size, int(table.lengths.sum())]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a file of pairs that `--data.train` reads; needs --tokenizer")
    parser.add_argument("--tokenizer", help="its tokenizer's folder")
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    if bool(given.data) != bool(given.tokenizer):
        parser.error("--data and --tokenizer go together")
    if given.data:
        print_throughput(str(Path(given.data).absolute()), str(Path(given.tokenizer).absolute()), given.repeat)
        return
    print_starts(given.repeat)
    from lit_dpo.quickstart import quickstart_directory

    print_throughput("lit-dpo/quickstart", str(quickstart_directory() / "model"), given.repeat)


def print_starts(repeat: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "first_step.py").write_text(FIRST_STEP)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in STARTS}
        for _ in range(repeat + 1):
            for name, command in STARTS.items():
                seconds[name].append(run(command, folder)[:2])
    print(f"{'':24} {'CPU s':>6} {'wall s':>6}")
    for name, found in seconds.items():
        cpu, wall = (statistics.median(values) for values in zip(*found[1:], strict=True))  # the first filled caches
        print(f"{name:24} {cpu:6.2f} {wall:6.2f}")


def print_throughput(data: str, tokenizer: str, repeat: int) -> None:
    found: dict[str, list[list[float]]] = {"cold": [], "from the cache": []}
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as cache:
            for name in found:
                out = run([sys.executable, "-c", TOKENIZE, cache, data, tokenizer], cache)[2]
                found[name].append(json.loads(out.splitlines()[-1]))
    for name, runs in found.items():
        cpu, wall, pairs, tokens = (statistics.median(values) for values in zip(*runs, strict=True))
        print(
            f"{name:24} {cpu:6.2f} {wall:6.2f}   {pairs:,.0f} pairs, {tokens:,.0f} tokens: "
            f"{pairs / wall:,.0f} pairs/s, {tokens / wall:,.0f} tokens/s"
        )


def run(command: list[str], folder: str) -> tuple[float, float, str]:
    """CPU seconds, wall seconds and output of a process."""
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:6])} failed:\n{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall, done.stdout


if __name__ == "__main__":
    main()
