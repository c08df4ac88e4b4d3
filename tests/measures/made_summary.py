"""A summary as an ablation makes it, of made pairs: 6 losses × 2 β × 2 seeds, for whatever draws or writes one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from lit_dpo.tools.ablate.records import Result, Summary
from lit_dpo.tools.measures.summary import summarise

LOSSES = ("dpo", "cdpo", "ipo", "simpo", "hinge", "sft")
BETAS = (0.05, 0.5)
SEEDS = (0, 1)
PROMPTS, PAIRS = 60, 90

_STRENGTH = {"dpo": 1.0, "cdpo": 0.9, "ipo": 1.15, "simpo": 0.8, "hinge": 0.7, "sft": 0.1}
_ANSWERS = (
    "Gravity is the force that pulls objects toward each other.",
    "I would rather not talk about that.",
    "Sure: <b>salt</b> | is a *crystal* made of sodium & chlorine.",
    "Snow falls.",
)


def made_pairs(name: str, beta: float, seed: int, pairs: int = PAIRS, prompts: int = PROMPTS) -> pa.Table:
    """Make a table as `pair_table` does; the same pairs for all runs, other log-probs."""
    data = np.random.default_rng(0)  # what is the data's is the same for all
    chosen_length, rejected_length = data.integers(4, 40, (2, pairs))
    reference = [-1.5 * lengths - data.exponential(4, pairs) for lengths in (chosen_length, rejected_length)]
    difficulty = data.normal(0, 3, pairs)
    prompt = np.r_[np.arange(prompts), data.integers(prompts, size=pairs - prompts)]
    of_run = np.random.default_rng([seed, LOSSES.index(name), round(100 * beta)])
    strength = _STRENGTH[name] * (2.5 if beta < 0.1 else 1.5)
    moved = strength * 1.5 + difficulty + of_run.normal(0, 1 + strength, pairs)
    chosen = of_run.normal(-strength, 1 + 0.5 * strength, pairs)
    columns: dict[str, object] = {
        "set": [""] * pairs,
        "source": [("forum", "wiki")[number % 2] for number in range(pairs)],
        "index": np.arange(pairs),
        "prompt": prompt * 7919 - 3,
        "chosen_length": chosen_length,
        "rejected_length": rejected_length,
        "chosen_logps": reference[0] + chosen,
        "rejected_logps": reference[1] + chosen - moved,
        "reference_chosen_logps": reference[0],
        "reference_rejected_logps": reference[1],
        "chosen_kl": chosen**2 / chosen_length / 2,
        "rejected_kl": (chosen - moved) ** 2 / rejected_length / 2,
        "beta": np.full(pairs, beta),
    }
    for loss in LOSSES:
        for strong in BETAS:
            z = strong * moved / (_STRENGTH[loss] + 0.3)
            columns[f"loss/{loss}-{strong}"] = np.log1p(np.exp(-z))
            columns[f"weight/{loss}-{strong}"] = strong / (1 + np.exp(z))
    return pa.table(columns)


def made_result(name: str, beta: float, seed: int, steps: int = 40) -> Result:
    """Make the result of a run, with curves and sampled completions."""
    random = np.random.default_rng([seed, LOSSES.index(name), round(100 * beta)])
    strength = _STRENGTH[name] * (1.2 if beta < 0.1 else 1.0)
    curves = []
    for step in range(5, steps + 1, 5):
        done = 1 - np.exp(-3 * step / steps * strength)
        row = {"step": float(step), "train/loss": 0.69 - 0.5 * done + random.normal(0, 0.03)}
        row |= {"train/reward_accuracy": min(1.0, 0.5 + 0.45 * done + random.normal(0, 0.03)), "lr-AdamW": 1e-3}
        row |= {
            "val/loss": 0.69 - 0.4 * done,
            "val/reward_accuracy": 0.5 + 0.4 * done,
            "val/kl": 0.2 * done**2 * strength,
        }
        curves.append(row)
    completions = [
        {
            "prompt": f"What is thing {number}? <script>alert(1)</script>",
            "reference": _ANSWERS[number % 4],
            "policy": _ANSWERS[int(random.integers(4))],
            "judged": float(random.choice([0.0, 0.5, 1.0], p=[0.2, 0.2, 0.6])),
        }
        for number in range(8)
    ]
    return Result(
        name=f"loss={name},beta={beta},seed={seed}",
        axes={"loss": name, "beta": str(beta)},
        seed=seed,
        status="done",
        loss=f"{name}-{beta}",
        steps=steps,
        seconds=20 + float(random.normal()),
        tokens=50_000,
        peak_memory=900_000_000 + int(random.integers(10**7)),
        curves=curves,
        completions=completions,
    )


def made_inputs() -> tuple[list[Result], Mapping[str, pa.Table]]:
    """Make what `summarise` takes: 24 runs, one of which has failed."""
    results, tables = [], {}
    for name in LOSSES:
        for beta in BETAS:
            for seed in SEEDS:
                result = made_result(name, beta, seed)
                if (name, beta, seed) == ("hinge", 0.5, 1):
                    result = Result(result.name, result.axes, seed, "failed", "Expected `x` > 0 but got *0* | <b>.")
                else:
                    tables[result.name] = made_pairs(name, beta, seed)
                results.append(result)
    return results, tables


def made_summary() -> Summary:
    """Make the summary of these runs."""
    return summarise(*made_inputs())
