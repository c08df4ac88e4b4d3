from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import CompletionLogps, PairLogps
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.checks import one_of
from lit_dpo.losses.order import listed, preferred, take, there


@dataclass(frozen=True)
class LiPOLoss(PreferenceLoss):
    """Listwise preference optimization (LiPO-λ, arXiv 2402.01878, eq. 8): Σ Δ_ij·log(1 + e^(s_j − s_i)), `(P,)`.

    s = β·log π/π_ref, and the sum is over all pairs of a prompt's completions in which i was preferred to j. Those
    whose exchange would change the ranking most count most: Δ_ij = |G_i − G_j|·|1/D_i − 1/D_j|, without gradient, with
    the gain G = 2^ψ − 1 of how good a completion is and the discount D = log(1 + τ) of its position τ when all are
    sorted by s; of equal s, as where the policy is its reference, the better one comes first.

    ψ in [0, 1] is how likely a completion is to be preferred to one of its prompt's, itself among them:
    (wins + ½)/K in a ranking of K. Completions that are not compared with each other count as equally good, ½ for
    both, and have to be so in all their other comparisons. For two completions it is DPO times a constant, 0.2623:
    learning rates are not DPO's.

    The paper and the library that its authors name for it, RAX, disagree, so it is an argument. `"paper"` is as above,
    with the natural logarithm and the sum over pairs; `"rax"` has log₂, each Δ times K, and the mean over pairs.

    Args:
        beta: inverse temperature; 0.05 in the paper, with 8 completions.
        weighting: of the pairs.

    Raises:
        ValueError: if `weighting` is neither; when called, if the comparisons of a prompt are not all those that
            rank its completions.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import CompletionLogps, SequenceLogps
        >>> n = torch.tensor([1, 1, 1])
        >>> policy, reference = (SequenceLogps(torch.tensor(x), n) for x in ([-4.0, -2.0, -9.0], [-5.0, -5.0, -5.0]))
        >>> ranked = torch.tensor([[1, 0], [0, 2], [1, 2]])  # the second one is best, and the third worst
        >>> lists = CompletionLogps(policy, reference, n, torch.tensor([3]), ranked, torch.tensor([3]))
        >>> LiPOLoss()(lists.pairs()), LiPOLoss(weighting="rax")(lists.pairs())
        (tensor([0.4115]), tensor([0.2853]))
    """

    per_prompt: ClassVar[bool] = True

    beta: float = 0.05
    weighting: Literal["paper", "rax"] = "paper"

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        one_of("weighting", self.weighting, "paper", "rax")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(P,)`."""
        lists, ratios = listed(pairs)
        balance = _balance(lists)
        # the better one first, which then is so in a stable sort by s too
        balance, order = balance.sort(dim=1, descending=True, stable=True)
        rewards = self.beta * take(ratios, lists, order)
        counts, inside = lists.completions_per_prompt[:, None], there(lists)
        better = (balance[:, :, None] > balance[:, None]) & inside[:, None]
        gains = 2 ** (0.5 + balance.double() / (2 * counts)) - 1
        weights = (gains[:, :, None] - gains[:, None]).abs()
        if self.weighting == "rax":
            weights = weights * counts[:, None] / better.sum((1, 2), keepdim=True).clamp(min=1)
        weights = torch.where(better, weights, 0.0).to(rewards, non_blocking=True)
        discounts = self._discounts(rewards.detach(), inside.to(rewards.device, non_blocking=True))
        weights = weights * (discounts[:, :, None] - discounts[:, None]).abs()
        return -(weights * logsigmoid(rewards[:, :, None] - rewards[:, None])).sum((1, 2))

    def _discounts(self, rewards: Tensor, inside: Tensor) -> Tensor:
        """1/D, `(P, K)`."""
        order = rewards.masked_fill(~inside, -torch.inf).argsort(dim=1, descending=True, stable=True)
        after = 2 + order.argsort(1).to(rewards)  # the first position is 1
        return (after.log() if self.weighting == "paper" else after.log2()).reciprocal()


def _balance(lists: CompletionLogps) -> Tensor:
    """`(P, K)` how many others a completion was preferred to, less how many to it; −K − 1 where there is none.

    ψ is ½ + that/2K.

    Raises:
        ValueError: if a pair of a prompt is compared otherwise than these say, or not at all.
    """
    above, inside = preferred(lists), there(lists)
    balance = above.sum(2) - above.sum(1)
    said = (balance[:, :, None] > balance[:, None]) & inside[:, :, None] & inside[:, None]
    wrong = (above != said).flatten(1).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"Expected comparisons between all completions of prompt {wrong[0]} of the batch (the first is 0) of which "
            "one is better than the other, each in one direction and none in a circle, but some are missing or "
            "contradict each other. `--data.comparisons all` compares all that differ."
        )
    return balance.masked_fill(~inside, -above.shape[1] - 1)
