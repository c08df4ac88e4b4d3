"""What decides which prompts the batches of a rank hold."""

from __future__ import annotations

from typing import Any, NamedTuple

from lit_dpo.data.budget import BudgetSampler
from lit_dpo.data.mixture import Mixture
from lit_dpo.data.sampler import PromptSampler
from lit_dpo.data.stream import PromptStream
from lit_dpo.data.table import PromptTable


class Batching(NamedTuple):
    """How prompts become batches, on one rank of several.

    Attributes:
        batch_size: prompts of a batch, or with `max_tokens` the most of them; None: as many as fit.
        max_tokens: the most tokens of a batch; None: they are counted in prompts.
        seed: of the order.
        rank: of this process.
        ranks: how many there are.
    """

    batch_size: int | None
    max_tokens: int | None
    seed: int
    rank: int
    ranks: int

    @property
    def multiple(self) -> int:
        """Prompts of which all ranks together take a whole number at a time; 1 with a budget of tokens."""
        return 1 if self.max_tokens is not None else (self.batch_size or 1) * self.ranks

    def sampler(self, table: PromptTable, *, shuffle: bool, mixture: Mixture | None = None) -> PromptSampler:
        """Return what draws the batches of a table.

        Args:
            table: of the prompts.
            shuffle: whether in another order each epoch, or else in that of the rows.
            mixture: the order of the sources, of a mixture.
        """
        order: dict[str, Any] = {"seed": self.seed, "shuffle": shuffle, "rank": self.rank, "num_replicas": self.ranks}
        if mixture is not None:
            order["mixture"] = mixture
        if self.max_tokens is not None:
            return BudgetSampler(table.lengths, self.max_tokens, self.batch_size, **order)
        assert self.batch_size is not None
        return PromptSampler(table.lengths, self.batch_size, **order)

    def facts(self, rows: PromptTable | PromptStream, shares: list[float]) -> dict[str, Any]:
        """Say what decides which prompts the next batches hold, for a run that goes on."""
        of_batches = {
            "batch_size": self.batch_size,
            "max_tokens": self.max_tokens,
            "ranks": self.ranks,
            "seed": self.seed,
        }
        if isinstance(rows, PromptStream):
            return rows.order.facts | of_batches
        counts: dict[str, Any] = {"pairs": rows.size}
        if not rows.holds_pairs:
            counts = {
                "prompts": rows.size,
                "completions": len(rows.completion_lengths),
                "comparisons": rows.comparisons_count,
            }
        return counts | ({"shares": shares} if shares else {}) | of_batches
