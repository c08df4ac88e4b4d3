from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.checks import in_range, positive


@dataclass(frozen=True)
class BetaDPOLoss(PreferenceLoss):
    """DPO with a dynamic β (β-DPO, arXiv 2407.08639): −log σ(β_b·Δ), β_b = β·(1 + α·(M − M₀)), at least β/100.

    M is the batch's mean margin Δ, in nats, and M₀ a running mean of it: in batches of clear preferences the policy is
    held closer to the reference, in batches of close ones it may move further. Both are part of the state, of one
    value on all ranks, and kept in checkpoints; M₀ starts at 0 and takes the batch up first, as in the authors' code.
    Evaluation uses the last training batch's β_b. Rewards are β times the log-ratio, with the β given. At margin 0 it
    is log 2 and its slope in Δ is −β_b/2. Of many completions of one prompt, M counts every pair, K(K−1)/2 of a ranking
    of K: they are not independent samples, and long rankings weigh most.

    The authors also leave out a part of each batch, drawn at random with a preference for margins near M₀. That is not
    done here: a loss is a function of its pairs.

    Args:
        beta: β; 0.1 in the authors' example.
        adaptivity: α, how far β_b follows the margins; 0.6 there. Expected > 0.
        momentum: how much of the old M₀ stays at each batch; 0.9 there. Expected in [0, 1).

    Raises:
        ValueError: if `adaptivity` is not a positive number, or `momentum` outside [0, 1).

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> pairs, loss = PairLogps(side(-1.0), side(-3.0), side(-1.0), side(-1.0)), BetaDPOLoss(adaptivity=0.5)
        >>> state = loss.next_state(loss.initial_state(), loss.sums(pairs))
        >>> state, loss(pairs._replace(state=state))  # M₀ and M; β_b is 0.1·(1 + 0.5·1.8)
        (tensor([0.2000, 2.0000], dtype=torch.float64), tensor([0.5211]))
    """

    adaptivity: float = 0.6
    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        positive("adaptivity", self.adaptivity)
        in_range("momentum", self.momentum, "[0, 1)")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        margin = pairs.margin
        running, batch = pairs.require("state")
        # the authors' floor is 0.001 at their β of 0.1; a fixed one would swallow smaller β
        beta = self.beta * (1 + self.adaptivity * (batch - running)).clamp(min=1e-2)
        return -logsigmoid(beta.to(margin) * margin)

    def initial_state(self) -> Tensor:
        """M₀ and M, both 0."""
        return torch.zeros(2, dtype=torch.float64)

    def sums(self, pairs: PairLogps) -> Tensor:
        """Of the margins, and the number of pairs."""
        margins = pairs.margin.detach().double()
        return torch.stack([margins.sum(), torch.ones_like(margins).sum()])

    def next_state(self, state: Tensor, sums: Tensor) -> Tensor:
        """M of the batch, and M₀ moved towards it."""
        batch = sums[0] / sums[1]
        return torch.stack([self.momentum * state[0] + (1 - self.momentum) * batch, batch])
