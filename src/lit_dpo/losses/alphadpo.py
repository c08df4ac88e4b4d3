from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.checks import in_range, not_negative, positive


@dataclass(frozen=True)
class AlphaDPOLoss(PreferenceLoss):
    """SimPO with a margin for each pair (α-DPO, arXiv 2410.10148): −log σ(β·(ℓ_w/n_w − ℓ_l/n_l − α·z) − γ).

    ℓ = log π of the chosen (w) and rejected (l) completion and n its number of tokens. z says how far the pair is
    already apart, compared with others: M = r_w/n_w − r_l/n_l, with r = log π/π_ref, in nats per token, less its mean
    and over its standard deviation. It has no gradient. A pair that the policy has moved more than others has to reach
    more than γ, one that it has moved less has to reach less. At ℓ_w/n_w = ℓ_l/n_l and z = 0 it is log(1 + e^γ) and its
    slope in ℓ_w is −β·σ(γ)/n_w, as SimPO's.

    Mean and deviation of M are part of the state, of one value on all ranks, and kept in checkpoints: running means of
    M and M² that take the batch up first, so that `z_momentum` 0 gives a z-score over the batch. Before there is any
    spread, as in the first batch of a policy that starts at its reference, z is 0. Evaluation uses what training left.
    Of many completions of one prompt, they count every pair, which are then not independent samples of M.

    The references disagree on the scale of α: the paper adds α·z to γ, its authors' code β·α·z. It is the code's here,
    whose settings the arguments name. The code differs in the state: its mean and deviation start at 0 without
    correction, so that the first z are about ten times too large, or 0/0 at the reference; and it averages the
    deviations of batches, which a batch of one pair has not. Its label smoothing is left out.

    Args:
        beta: scale of the reward; 2.5 in the authors' example, with a learning rate of 1e-6. Rewards are β times the
            summed log-ratio, as for every loss with a reference.
        gamma: γ, the target margin of the reward; 1.5 there, which is β times their `gamma_beta_ratio` of 0.6.
            Expected ≥ 0.
        z_weight: α, what one deviation of M adds to the target, nats per token; 0.2 there. Expected > 0; 0 would
            be SimPO.
        z_momentum: how much of the old means stays at each batch; 0.9 there. Expected in [0, 1).

    Raises:
        ValueError: if `gamma` is negative or not finite, `z_weight` not a positive number, or `z_momentum` outside
            [0, 1).

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> side = lambda *x: SequenceLogps(torch.tensor(x), torch.tensor([2.0, 2.0]))
        >>> same = side(-2.0, -2.0)
        >>> pairs, loss = PairLogps(side(-1.0, -3.0), same, same, same), AlphaDPOLoss(z_weight=0.5)
        >>> state = loss.next_state(loss.initial_state(), loss.sums(pairs))
        >>> pairs = pairs._replace(state=state)
        >>> loss.target(pairs), loss(pairs)  # M is 0.5 and −0.5, z 1 and −1
        (tensor([2.7500, 0.2500]), tensor([1.7014, 1.7014]))
    """

    beta: float = 2.5
    gamma: float = 1.5
    z_weight: float = 0.2
    z_momentum: float = 0.9

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        not_negative("gamma", self.gamma)
        positive("z_weight", self.z_weight)
        in_range("z_momentum", self.z_momentum, "[0, 1)")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        reward = self.beta * (pairs.policy_chosen.mean - pairs.policy_rejected.mean)
        return -logsigmoid(reward - self.target(pairs))

    def target(self, pairs: PairLogps) -> Tensor:
        """γ + β·α·z, `(B,)`, without gradient."""
        gaps = self._gaps(pairs)
        total, squares, weight = pairs.require("state").to(gaps.device)
        mean, square = total / weight.clamp(min=1e-12), squares / weight.clamp(min=1e-12)
        # never below what rounding leaves of a spread of 0
        spread = (square - mean**2).clamp(min=1e-12 * square).sqrt()
        scores = torch.where(spread > 0, (gaps - mean) / spread, 0.0)
        return (self.gamma + self.beta * self.z_weight * scores).to(pairs.policy_chosen.total)

    def _gaps(self, pairs: PairLogps) -> Tensor:
        """M, `(B,)` float64, without gradient."""
        chosen = pairs.chosen_logratio.detach().double() / pairs.policy_chosen.length
        rejected = pairs.rejected_logratio.detach().double() / pairs.policy_rejected.length
        return chosen - rejected

    def initial_state(self) -> Tensor:
        """Weighted sums of M, M² and 1 over batches, all 0."""
        return torch.zeros(3, dtype=torch.float64)

    def sums(self, pairs: PairLogps) -> Tensor:
        """Of M and M², and the number of pairs."""
        gaps = self._gaps(pairs)
        return torch.stack([gaps.sum(), (gaps**2).sum(), torch.ones_like(gaps).sum()])

    def next_state(self, state: Tensor, sums: Tensor) -> Tensor:
        """Let the batch's means in, with the weight that the old ones leave."""
        return self.z_momentum * state + (1 - self.z_momentum) * sums / sums[2]
