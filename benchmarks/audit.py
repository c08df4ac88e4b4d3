"""Whether `lit-dpo audit` finds labels that were turned round: precision and recall of its first tenth.

python benchmarks/audit.py
python benchmarks/audit.py --stories ../shared --seeds 3

Of the quickstart's training pairs a tenth are turned round, and the quickstart is trained on them. With `--stories`,
harder sets: stories with dialogue against stories without, and a real tiny language model, which learns them by heart
if it may. Every ranking of the same run is printed, and what chance finds.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_dpo.tools.audit.command import audit
from lit_dpo.tools.audit.dynamics import Scores
from lit_dpo.tools.audit.verdicts import FLIPPED, Judged

ROOT = Path(__file__).parents[1]
SHARE = 0.1

RANKINGS: dict[str, Callable[[Scores], Any]] = {
    "mean confidence": lambda scores: scores.confidence,
    "area under the margin": lambda scores: scores.area,
    "share of the gradient": lambda scores: -scores.gradient,
    "last loss alone": lambda scores: -scores.last_loss,
    "reference margin alone": lambda scores: scores.reference_margin,
}


class Case(NamedTuple):
    """A data set and how it is trained on."""

    name: str
    rows: list[dict[str, Any]]
    options: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, help="the folder of shared data and models")
    parser.add_argument("--seeds", type=int, default=1, help="how often each is done, with other labels turned round")
    parser.add_argument("--recompute", action="store_true", help="also measure with a checkpoint of each epoch")
    given = parser.parse_args()
    for case in [quickstart(), *(stories(given.stories) if given.stories else [])]:
        with tempfile.TemporaryDirectory() as folder:
            found = [run(case, Path(folder) / str(seed), seed, given.recompute) for seed in range(given.seeds)]
        report(case, found)


def run(case: Case, folder: Path, seed: int, recompute: bool) -> dict[str, list[tuple[float, float, float]]]:
    """Turn labels round, train, and audit: precision, recall and AUC of each ranking."""
    flipped = set(random.Random(seed).sample(range(len(case.rows)), round(SHARE * len(case.rows))))
    sides = {"chosen": "rejected", "rejected": "chosen"}
    rows = [
        {sides.get(name, name): cell for name, cell in row.items()} if number in flipped else row
        for number, row in enumerate(case.rows)
    ]
    folder.mkdir()
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"]
    command = [
        sys.executable,
        "-m",
        "lit_dpo",
        "fit",
        *case.options,
        f"--data.train={pairs}",
        f"--seed_everything={seed}",
    ]
    command += ["--trainer.callbacks+=TrainingDynamics", *keep, "--trainer.enable_progress_bar=false"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    found: dict[str, list[tuple[float, float, float]]] = {}
    for by in (False, True) if recompute else (False,):
        judged = audit(folder / "runs" / "version_0", SHARE, {}, recompute=by).judged
        for name, ranking in RANKINGS.items():
            values = ranking(judged.scores)
            found[name + ", by a pass after each epoch" * by] = [measure(judged, values, flipped)]
        places = judged.of(FLIPPED)
        right = np.isin(judged.scores.row[places], list(flipped)).sum()
        precision = right / max(len(places), 1)
        found["(called flipped)" + ", by a pass after each epoch" * by] = [(precision, right / len(flipped), np.nan)]
    return found


def measure(judged: Judged, values: Any, flipped: set[int]) -> tuple[float, float, float]:
    """Precision and recall of the first tenth, and how likely one that was turned round is before one that was not."""
    is_flipped = np.isin(judged.scores.row, list(flipped))
    order = np.lexsort((judged.scores.row, values))
    right = is_flipped[order[: round(SHARE * len(order))]].sum()
    ranks = np.empty(len(order))
    ranks[order] = np.arange(len(order))
    pairs = is_flipped.sum() * (~is_flipped).sum()
    before = (ranks[~is_flipped][:, None] > ranks[is_flipped][None]).sum() / pairs
    return right / round(SHARE * len(order)), right / len(flipped), float(before)


def report(case: Case, found: list[dict[str, list[tuple[float, float, float]]]]) -> None:
    print(f"\n{case.name}: {len(case.rows)} pairs, {SHARE:.0%} of the labels turned round, {len(found)} runs")
    print(f"{'ranked by':52} precision  recall    AUC")
    print(f"{'chance':52} {SHARE:9.2f} {SHARE:7.2f} {0.5:6.2f}")
    for name in found[0]:
        precision, recall, before = np.mean([one for run in found for one in run[name]], axis=0)
        print(f"{name:52} {precision:9.2f} {recall:7.2f} {before:6.2f}")


def quickstart() -> Case:
    from lit_dpo.quickstart import quickstart_directory

    rows = _lines(quickstart_directory() / "train.jsonl")
    return Case("quickstart", rows, [f"--config={ROOT / 'configs' / 'quickstart.yaml'}", "--trainer.callbacks=[]"])


def stories(shared: Path) -> list[Case]:
    """Two sets of a real model: those that its makers prefer, and made ones of its training stories."""
    folder = shared.resolve() / "data" / "finetuning-lab-tinystories"
    options = [f"--model.policy.model={shared.resolve() / 'models' / 'storybyte-nano-kd'}"]
    options += ["--model.loss=DPOLoss", "--model.loss.beta=0.2", "--model.warmup_ratio=0.1"]
    options += ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.weight_decay=0"]
    options += ["--data.max_length=256", "--data.truncation=truncate_completion", "--trainer.accelerator=cpu"]
    made = _lines(folder / "requests_train.jsonl")
    random.Random(1).shuffle(made)
    found = []
    for animal in sorted({row["animal"] for row in made}):
        sides = [
            [row["story"] for row in made if row["animal"] == animal and row["has_dialogue"] is is_so]
            for is_so in (True, False)
        ]
        found += [_pair(f"Tell me a story about a {animal}.", *both) for both in zip(*sides, strict=False)]
    pairs = [_pair(row["request"], row["chosen"], row["rejected"]) for row in _lines(folder / "preference_pairs.jsonl")]
    mild = ["--trainer.max_epochs=3", "--model.optimizer.lr=5e-4"]
    hot = ["--trainer.max_epochs=6", "--model.optimizer.lr=2e-3"]
    return [
        Case("preferred stories, 3 epochs", pairs, [*options, *mild]),
        Case("stories with dialogue, 3 epochs", found, [*options, *mild]),
        Case("stories with dialogue, learned by heart in 6 epochs", found, [*options, *hot]),
    ]


def _pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    main()
