from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class RDPOLoss(PreferenceLoss):
    """Length-regularised DPO (R-DPO, arXiv 2403.19159, eq. 9): −log σ(β·Δ + α·(n_w − n_l)).

    n is a completion's number of tokens, chosen (w) or rejected (l). What DPO becomes when every token costs α of the
    reward that the policy is to maximise: β·log π/π_ref is then the reward less α·n, so the α·n has to be given back
    before rewards are compared. A chosen completion that is longer has thereby some of its margin for nothing, and is
    pushed less; one that is shorter is pushed more. Completions get shorter with α. At margin 0 and lengths that differ
    by d = n_w − n_l it is log(1 + e^(−α·d)) and its slope in Δ is −β·σ(−α·d).

    Args:
        beta: inverse temperature.
        length_cost: α, what a token costs, in units of the reward, so about 1 over the lengths' typical difference.
            Expected ≥ 0; 0 is DPO.

    Raises:
        ValueError: if `length_cost` is negative or not finite.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> side = lambda x, n: SequenceLogps(torch.tensor([x]), torch.tensor([n]))
        >>> long, short = side(-9.0, 9.0), side(-5.0, 4.0)
        >>> RDPOLoss(length_cost=0.1)(PairLogps(long, short, long, short))
        tensor([0.4741])
        >>> RDPOLoss(length_cost=0.1)(PairLogps(short, long, short, long))
        tensor([0.9741])
    """

    length_cost: float = 0.01

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if not (self.length_cost >= 0 and math.isfinite(self.length_cost)):
            raise ValueError(f"Expected `length_cost` >= 0 but got {self.length_cost}.")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        surplus = pairs.policy_chosen.length - pairs.policy_rejected.length
        return -logsigmoid(self.beta * pairs.margin + self.length_cost * surplus)
