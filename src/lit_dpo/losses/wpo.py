from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lit_dpo.logps.fields import Field
from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.checks import flag, one_of
from lit_dpo.losses.composed import WrappedLoss, within


@dataclass(frozen=True)
class WPOLoss(WrappedLoss):
    """Weighted preference optimization (WPO, arXiv 2406.11827): any loss times w_w·w_l, without gradient.

    w = exp(mean_t[log p_t − log Σ_v π_t(v)²]) tells how likely the policy itself is to write a completion: p_t is the
    probability of its token t, π_t the distribution over the vocabulary there, and Σ_v π_t(v)² the probability that a
    sampled token would have (the paper's sampled alignment). Pairs that the policy would hardly produce count less, so
    that off-policy data act more like on-policy data.

    The authors' code holds the product w_w·w_l at 1 at most, as TRL 0.24 and open-instruct do; TRL from its 1.0 on does
    not. Value and slope are the inner loss's times w_w·w_l.

    Args:
        loss: the loss, with its β; DPO in the paper. Expected to score each pair by itself.
        alignment: `"sampled"`, or `"none"` for w = exp(mean_t log p_t).
        clamp: hold w_w·w_l at 1. Expected to be true with `alignment="none"`, whose weights are below 1 anyway.

    Raises:
        ValueError: if `alignment` is neither, `clamp` does not fit it, or `loss` couples the pairs of a batch or
            scores lists.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> from lit_dpo.losses import DPOLoss
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), torch.ones(1), torch.tensor([x]), torch.tensor([-1.0]))
        >>> pairs = PairLogps(side(-2.0), side(-3.0), side(-1.0), side(-2.0))
        >>> WPOLoss(DPOLoss(beta=0.1))(pairs), DPOLoss(beta=0.1)(pairs)
        (tensor([0.0345]), tensor([0.6931]))
    """

    alignment: Literal["sampled", "none"] = "sampled"
    clamp: bool = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        one_of("alignment", self.alignment, "sampled", "none")
        flag("clamp", self.clamp)
        if self.alignment == "none" and not self.clamp:
            raise ValueError('Expected `clamp` to be true with `alignment` "none", whose weights are at most 1 anyway.')
        if self.loss.couples_pairs or any(one.per_prompt for one in within(self.loss)):
            raise ValueError(f"Expected `loss` to score each pair by itself, to have a weight, but got {self.loss}.")

    @property
    def requires(self) -> frozenset[Field]:  # type: ignore[override]
        """Log-probs per token, log Σ_v π(v)² for the alignment, and what the loss requires."""
        return super().requires | {Field.PER_TOKEN} | ({Field.COLLISION} if self.alignment == "sampled" else set())

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        return self.weights(pairs) * super().__call__(pairs)

    def weights(self, pairs: PairLogps) -> Tensor:
        """w_w·w_l, `(B,)`, without gradient."""
        nats = self._nats(pairs, "policy_chosen") + self._nats(pairs, "policy_rejected")
        return (nats.clamp(max=0) if self.clamp else nats).exp()

    def _nats(self, pairs: PairLogps, name: str) -> Tensor:
        """Log w of one side. Not from its total, which `LDDPOLoss` may have changed."""
        side, values = pairs.require(name), pairs.require(f"{name}.per_token").detach()
        if self.alignment == "sampled":
            values = values - pairs.require(f"{name}.collision").detach()
        mean: Tensor = side.sums(values) / side.length
        return mean

    def view(self, pairs: PairLogps) -> PairLogps:
        """Return the pairs as they are: only their losses are weighed, and parts are not."""
        return pairs
