"""Rules that look at the measures of the last steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lit_dpo.callbacks.findings.base import Finding, History, Rule


@dataclass(frozen=True)
class Displacement(Rule):
    """Likelihood displacement (arXiv 2410.08847): the chosen completions lose probability while the margin grows.

    Args:
        limit: nats per token that they may lose.
    """

    limit: float = 0.6

    def __call__(self, seen: History) -> Finding | None:
        """Compare with the first step."""
        fallen = -seen.moved("chosen_logps")
        if not (fallen > self.limit and seen.moved("reward_margin") > 0):
            return None
        return Finding(
            f"chosen log-probs fell by {fallen:.2f} nats per token, from {seen.start['chosen_logps']:.2f} to "
            f"{seen.now('chosen_logps'):.2f}, while the margin rose to {seen.now('reward_margin'):.3g}",
            "the policy gives up both completions, and what it says instead was never looked at",
            f"a lower learning rate (now {seen.rate:.2g}), a larger `beta` (now {seen.beta:g}), or a loss that holds "
            "the chosen ones (`RPOLoss`, `DPOPLoss`, `MixtureLoss` with `SFTLoss`)",
        )


@dataclass(frozen=True)
class KLRunaway(Rule):
    """The policy leaves the reference behind.

    Args:
        limit: of `kl`, nats per token.
    """

    limit: float = 10.0

    def __call__(self, seen: History) -> Finding | None:
        """Look at the estimate on the training pairs."""
        if not seen.now("kl") > self.limit:
            return None
        return Finding(
            f"kl is {seen.now('kl'):.3g} nats per token after {seen.step} steps",
            "text breaks that far from the reference, whatever the accuracy says",
            f"a lower learning rate (now {seen.rate:.2g}), fewer steps, or a larger `beta` (now {seen.beta:g})",
        )


@dataclass(frozen=True)
class Saturated(Rule):
    """σ(−βΔ) is 0 for nearly all pairs: they teach nothing any more.

    Args:
        limit: of the mean margin.
    """

    limit: float = 10.0

    def __call__(self, seen: History) -> Finding | None:
        """Look at the mean margin of the training pairs."""
        margin = seen.now("reward_margin")
        if not (seen.compared and margin > self.limit):
            return None
        return Finding(
            f"the margin is {margin:.3g} after {seen.step} steps, so that σ(−βΔ), by which a pair counts, is "
            f"{1 / (1 + math.exp(min(margin, 700.0))):.1g}",
            "pairs that are told apart that far teach nothing any more",
            f"fewer steps, a lower learning rate (now {seen.rate:.2g}) or a smaller `beta` (now {seen.beta:g})",
        )


@dataclass(frozen=True)
class FlatWeights(Rule):
    """σ(−βΔ) is ½ for all pairs, however far the policy has moved: nothing brakes.

    Args:
        limit: of the rewards and the margin, below which they count as nothing.
        kl: from which the policy has moved, nats per token.
    """

    limit: float = 0.15
    kl: float = 0.3

    def __call__(self, seen: History) -> Finding | None:
        """Compare rewards with the distance moved."""
        largest = max(abs(seen.now(name)) for name in ("chosen_reward", "rejected_reward", "reward_margin"))
        if not (seen.compared and seen.now("kl") > self.kl and largest < self.limit):
            return None
        margin = seen.now("reward_margin")
        return Finding(
            f"the policy has moved (kl {seen.now('kl'):.2g} nats per token) but the margin is {margin:.2g}, so that "
            f"σ(−βΔ), by which a pair counts, is {1 / (1 + math.exp(margin)):.3f}, as good as ½ for all",
            "pairs that are told apart pull as hard as others, and nothing holds the policy at the reference",
            f"a larger `beta` (now {seen.beta:g}; 0.1 is usual)",
        )


@dataclass(frozen=True)
class StuckLoss(Rule):
    """The loss stays where it began.

    Args:
        steps: at full learning rate that it may take.
        share: of the loss at the start, by which it has to differ.
    """

    steps: float = 100.0
    share: float = 0.01

    def __call__(self, seen: History) -> Finding | None:
        """Compare with the first step."""
        began = seen.start.get("loss", math.nan)
        near = abs(seen.moved("loss")) < self.share * abs(began) and abs(seen.now("reward_accuracy") - 0.5) < 0.1
        if not (seen.effort >= self.steps and near and seen.compared):
            return None
        return Finding(
            f"the loss is {seen.now('loss'):.4f} after {seen.step} steps and began at {began:.4f}",
            "nothing is learnt",
            f"a larger learning rate (now {seen.rate:.2g}), and a look at the pairs with `lit-dpo inspect`: is there a "
            "difference that the policy can see?",
        )
