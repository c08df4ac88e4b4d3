"""Rules that look at how a run begins, and at what can be counted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lit_dpo.callbacks.findings.base import Finding, History, Rule


@dataclass(frozen=True)
class DeadAdapters(Rule):
    """Adapters that can change nothing: frozen at zero, or without a gradient."""

    when = "once"

    def __call__(self, seen: History) -> Finding | None:
        """Look at what was found at the start, and before steps."""
        if not seen.dead:
            return None
        return Finding(
            f"{len(seen.dead)} adapters get no gradient or are frozen at 0, first {seen.dead[0]}",
            "what is around them trains for nothing",
            "leaving them out of `target_modules`, or undoing what froze them",
        )


@dataclass(frozen=True)
class NotFinite(Rule):
    """Steps are left out because they are not finite, again and again.

    Args:
        limit: how many may be.
    """

    when = "once"
    limit: int = 2

    def __call__(self, seen: History) -> Finding | None:
        """Count them."""
        if seen.skipped <= self.limit:
            return None
        return Finding(
            f"{seen.skipped} steps of {seen.step} were left out since their loss or gradient is not finite",
            "the rows that make them teach nothing, and what makes them may come from the policy itself",
            f"a look at the rows that were named, a lower learning rate (now {seen.rate:.2g}), or bf16 for fp16",
        )


@dataclass(frozen=True)
class Mismatch(Rule):
    """Policy and reference do not match before the first step.

    Args:
        limit: of `kl` there, nats per token.
    """

    when = "once"
    limit: float = 0.02

    def __call__(self, seen: History) -> Finding | None:
        """Look at the first step."""
        apart = seen.start.get("kl", math.nan)
        if not apart > self.limit:
            return None
        return Finding(
            f"the reference ({seen.reference}) differs from the policy by {apart:.2g} nats per token before the first "
            "step",
            "rewards do not start at 0, and the first thing that is learnt is to be more or less like the reference",
            "no `reference` at all, which means the model that the policy starts from; if another one is meant, "
            "`ignore: [Mismatch]`",
        )


@dataclass(frozen=True)
class Swapped(Rule):
    """The policy as it comes prefers the rejected completions.

    Args:
        share: of the first pairs.
        pairs: needed to say so.
    """

    when = "once"
    share: float = 0.9
    pairs: int = 32

    def __call__(self, seen: History) -> Finding | None:
        """Look at the first pairs."""
        first = seen.first
        if first.pairs < self.pairs or first.rejected < self.share * first.pairs:
            return None
        return Finding(
            f"the policy as it comes finds the rejected completion likelier in {first.rejected} of the first "
            f"{first.pairs} pairs",
            "training turns it into its opposite",
            "a look at the labels with `lit-dpo inspect`: are chosen and rejected swapped? "
            "`--data.format.chosen` and `--data.format.rejected` name the columns",
        )


@dataclass(frozen=True)
class SameCompletions(Rule):
    """Chosen and rejected are the same.

    Args:
        share: of the first pairs.
        pairs: needed to say so.
    """

    when = "once"
    share: float = 0.5
    pairs: int = 32

    def __call__(self, seen: History) -> Finding | None:
        """Look at the first pairs."""
        first = seen.first
        if first.pairs < self.pairs or first.same < self.share * first.pairs:
            return None
        return Finding(
            f"chosen and rejected are the same in {first.same} of the first {first.pairs} pairs",
            "such a pair teaches nothing, and Adam makes steps of its rounding noise",
            "`--data.format.chosen` and `--data.format.rejected`: do they name the same column?",
        )
