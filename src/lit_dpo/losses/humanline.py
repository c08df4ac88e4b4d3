from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lit_dpo.logps.fields import Field
from lit_dpo.logps.records import PairLogps, SequenceLogps
from lit_dpo.losses.checks import number, positive
from lit_dpo.losses.composed import WrappedLoss


@dataclass(frozen=True)
class HumanlineLoss(WrappedLoss):
    """Humanline clipping (arXiv 2509.24207): any loss whose log-ratios are held in [log ε_P, log ε_R], token by token.

    The log-ratio log π/π_ref of each token, in nats, is clamped before a completion's are summed: a token that the
    policy already writes much more, or much less, often than the reference counts as at the bound, and has no gradient,
    so that no few tokens make up a margin. All that the inner loss sees of the policy is clamped, tokens and sums. At
    log-ratios 0, and wherever no token is at a bound, it is the inner loss, with its value and slope.

    The paper's second part, a reference that is replaced by the policy now and then, is `EMAReference(alpha=1)`; with
    `every` above 1, since log-ratios are 0 right after. Against a reference that stays, the bounds hold the policy near
    it for good. An older version of the authors' code draws at random which tokens lose their gradient, and keeps
    their values; the clamp is the later one's.

    Args:
        loss: the loss, with its β. Expected to read the reference.
        lower: log ε_P, nats. Expected < 0. −1 is the authors' default.
        upper: log ε_R, nats. Expected > 0. 1.5 is theirs.

    Raises:
        ValueError: if `lower` is not a negative number, `upper` not a positive one, or `loss` without a reference.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> from lit_dpo.losses import DPOLoss
        >>> side = lambda *x: SequenceLogps(torch.tensor([sum(x)]), torch.tensor([1.0 * len(x)]), torch.tensor(x))
        >>> pairs = PairLogps(side(-1.0, -1.0), side(-9.0), side(-6.0, -1.0), side(-3.0))  # log-ratios 5, 0 and −6
        >>> HumanlineLoss(DPOLoss(beta=0.1))(pairs), DPOLoss(beta=0.1)(pairs)  # margins 1.5 + 1 and 5 + 6
        (tensor([0.5759]), tensor([0.2873]))
    """

    lower: float = -1.0
    upper: float = 1.5

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        number("lower", self.lower, "< 0", lambda given: given < 0)
        positive("upper", self.upper)
        if Field.REFERENCE not in self.loss.requires:
            raise ValueError(f"Expected `loss` to read the reference, to have log-ratios, but got {self.loss}.")

    @property
    def requires(self) -> frozenset[Field]:  # type: ignore[override]
        """Log-probs per token of both models, and what the loss requires."""
        return super().requires | {Field.PER_TOKEN, Field.REFERENCE_PER_TOKEN}

    def view(self, pairs: PairLogps) -> PairLogps:
        """Hold the policy's tokens near the reference's."""
        for name in ("policy_chosen.per_token", "reference_chosen.per_token"):
            pairs.require(name)
        return pairs.map_models(self._hold)

    def _hold(self, policy: Any, reference: Any) -> tuple[SequenceLogps, SequenceLogps]:
        ratios = (policy.per_token - reference.per_token).clamp(self.lower, self.upper)
        # from the reference's own total, so that log-ratios of 0 are a margin of exactly 0
        total = reference.total + policy.sums(ratios)
        return policy._replace(total=total, per_token=reference.per_token + ratios), reference
