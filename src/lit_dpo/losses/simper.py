from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from lit_dpo.logps.fields import Field
from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class SimPERLoss(PreferenceLoss):
    """Simple alignment with perplexity (SimPER, arXiv 2502.00883): −exp(ℓ_w/n_w) + exp(ℓ_l/n_l).

    ℓ = log π of the chosen (w) and rejected (l) completion and n its number of tokens, so exp(ℓ/n) is one over its
    perplexity: the geometric mean of its tokens' probabilities. No reference and no arguments. The loss lies between −1
    and 1, and a completion counts by the probability it has: one that the policy finds unlikely, chosen or rejected,
    hardly moves it. At equal means m it is 0 and its slope in ℓ_w is −e^m/n_w, so a policy that is far from its data
    starts slowly. The formula is the authors' code's.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> SimPERLoss()(PairLogps(side(-1.0), side(-4.0)))
        tensor([-0.4712])
    """

    requires: ClassVar[frozenset[Field]] = frozenset()

    # nothing here has a temperature, and an argument without effect would be a trap; rewards are plain log-probs
    beta: float = field(default=1.0, init=False, repr=False)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        return pairs.policy_rejected.mean.exp() - pairs.policy_chosen.mean.exp()
