"""What `lit-dpo ablate` saves: CPU time of its runs, and of as many `lit-dpo fit`; passes of the reference of both.

python benchmarks/ablation.py                # a sample: some runs of each kind, in turn, and what they say of 24
python benchmarks/ablation.py --whole        # all 24 of both, which takes half an hour

CPU time is user and system time of a command with all its processes. An ablation also measures every loss on every
held-out pair, samples completions, and writes its report; `fit` samples completions, as the quickstart is configured.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")
LOSSES = ("dpo", "ipo", "hinge", "simpo", "cdpo", "apozero")
BETAS = ("0.1", "0.5")
SEEDS = ("1", "2")
RUNS = len(LOSSES) * len(BETAS) * len(SEEDS)
COUNTED = """
import os
from dataclasses import dataclass
from lit_dpo import BaseReference

@dataclass(frozen=True)
class Counted(BaseReference):
    def logps(self, model, batch):
        with open(os.environ["COUNTS"], "a") as stream:
            stream.write(f"{len(batch.completion_lengths)}\\n")
        return super().logps(model, batch)
"""
START = "import lit_dpo.tools.ablate.configuring, lit_dpo.tools.ablate.single"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true", help="run all of both")
    parser.add_argument("--repeat", type=int, default=2, help="how often the sample is taken; default: %(default)s")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "counted.py").write_text(COUNTED)
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, at the start")
        fit_one(root, "dpo", "0.1", "1", root / "warm")  # the quickstart is made, data are encoded
        whole(root) if given.whole else sample(root, given.repeat)
        passes(root)
        print(f"load {os.getloadavg()[0]:.1f}, at the end")


def sample(root: Path, repeat: int) -> None:
    """Take some of both, in turn."""
    fits, small, large, starts = [], [], [], []
    for number in range(repeat):
        small.append(ablate(root / f"small{number}", ("dpo", "ipo"), BETAS[:1], SEEDS[:1], 1))
        fits.append(fit_one(root, "dpo", "0.1", "1", root / f"a{number}"))
        starts.append(cpu([sys.executable, "-c", START]))
        large.append(ablate(root / f"large{number}", ("dpo", "ipo"), BETAS, SEEDS[:1], 1))
        fits.append(fit_one(root, "ipo", "0.5", "1", root / f"b{number}"))
    fit, start = statistics.median(fits), statistics.median(starts)
    one = (statistics.median(large) - statistics.median(small)) / 2
    fixed = statistics.median(small) - 2 * one
    print(f"lit-dpo fit: {fit:.1f} s of CPU ({min(fits):.1f} to {max(fits):.1f}, {len(fits)} commands)")
    print(f"lit-dpo ablate: {fixed:.1f} s, and {one:.1f} s a run; a second worker starts in {start:.1f} s")
    report(RUNS * fit, fixed + start + RUNS * one, "by the sample")


def whole(root: Path) -> None:
    """Run all."""
    fits, began = 0.0, time.monotonic()
    for loss in LOSSES:
        for beta in BETAS:
            for seed in SEEDS:
                fits += fit_one(root, loss, beta, seed, root / f"{loss}{beta}{seed}")
    print(f"{RUNS} x lit-dpo fit, one after another: {(time.monotonic() - began) / 60:.1f} minutes")
    began = time.monotonic()
    taken = ablate(root / "all", LOSSES, BETAS, SEEDS, 2)
    print(f"lit-dpo ablate --jobs 2: {(time.monotonic() - began) / 60:.1f} minutes")
    report(fits, taken, "measured")


def report(fits: float, ablation: float, how: str) -> None:
    print(f"{RUNS} runs: {fits:.0f} s of CPU as fit, {ablation:.0f} s as ablate: {fits / ablation:.2f} times, {how}")


def passes(root: Path) -> None:
    """Count what the reference computes."""
    reference = ["--model.reference", "counted.Counted"]
    ran = count(root, ["fit", *base("dpo", "0.1", "1"), *reference, *quiet(root / "counted-fit")])
    several = ["--vary", "loss=dpo,ipo", "--vary", "beta=0.1,0.5", "--out", str(root / "counted")]
    all_told = count(root, ["ablate", "--config", CONFIG, *reference, *several])
    print(
        f"completions that the reference computes: {ran} in each fit; {all_told} in an ablation of 4 runs, or of {RUNS}"
    )


def count(root: Path, arguments: list[str]) -> int:
    file = root / f"counts-{arguments[0]}"
    cpu([sys.executable, "-m", "lit_dpo", *arguments], {"COUNTS": str(file)}, root)
    return sum(int(line) for line in file.read_text().split())


def base(loss: str, beta: str, seed: str) -> list[str]:
    fragment = Path(CONFIG).parent / "losses" / f"{loss}.yaml"
    seeded = ["--seed_everything", seed, "--data.seed", seed]
    return ["--config", CONFIG, "--model.loss", str(fragment), "--model.loss.beta", beta, *seeded]


def quiet(out: Path) -> list[str]:
    return ["--trainer.enable_progress_bar", "false", "--trainer.logger.save_dir", str(out)]


def fit_one(root: Path, loss: str, beta: str, seed: str, out: Path) -> float:
    return cpu([sys.executable, "-m", "lit_dpo", "fit", *base(loss, beta, seed), *quiet(out)])


def ablate(out: Path, losses: tuple[str, ...], betas: tuple[str, ...], seeds: tuple[str, ...], jobs: int) -> float:
    varied = ["--vary", f"loss={','.join(losses)}", "--vary", f"beta={','.join(betas)}", "--seeds", ",".join(seeds)]
    command = ["ablate", "--config", CONFIG, *varied, "--jobs", str(jobs), "--out", str(out)]
    return cpu([sys.executable, "-m", "lit_dpo", *command])


def cpu(command: list[str], env: dict[str, str] | None = None, folder: Path | None = None) -> float:
    """Seconds of a command and of all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, env={**os.environ, **(env or {})}, cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
