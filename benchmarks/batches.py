"""How full batches of a token budget are, and those of a pair count, and what an order of a million rows costs.

python benchmarks/batches.py
"""

from __future__ import annotations

import time

import numpy as np

from lit_dpo.data.budget import BudgetSampler
from lit_dpo.data.sampler import PromptSampler


def main() -> None:
    lengths = np.random.default_rng(0).lognormal(5.8, 0.8, 20_000).astype(int).clip(8, 2048)
    print(f"20,000 pairs of {lengths.min()} to {lengths.max()} tokens, {lengths.mean():.0f} on average")
    print("                      batches  largest batch  mean batch / largest")
    for budget in (4096, 8192, 16384):
        report(f"max_tokens={budget}", lengths, BudgetSampler(lengths, budget), budget)
    for pairs in (8, 16, 32):
        report(f"batch_size={pairs}", lengths, PromptSampler(lengths, pairs))
    million = np.random.default_rng(0).integers(8, 1024, 1_000_000)
    start = time.process_time()
    sampler = BudgetSampler(million, 8192)
    made = time.process_time()
    next(iter(sampler))
    print(f"a million rows: {made - start:.1f} s to count, {time.process_time() - made:.1f} s per epoch (CPU)")


def report(name: str, lengths: np.ndarray, sampler: PromptSampler, budget: int | None = None) -> None:
    tokens = np.array([lengths[rows].sum() for rows in sampler])
    largest = budget or tokens.max()
    print(f"{name:20} {len(tokens):8} {largest:14} {tokens.mean() / largest:12.1%}")


if __name__ == "__main__":
    main()
