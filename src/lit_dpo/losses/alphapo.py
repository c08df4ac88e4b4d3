from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.fields import Field
from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class AlphaPOLoss(PreferenceLoss):
    """AlphaPO (arXiv 2501.03884; the formula as in TRL's CPO trainer): −log σ(β·(s_w − s_l) − γ), s = (1 − p^(−α))/α.

    p = e^(ℓ/n) is the geometric mean of a completion's token probabilities, chosen (w) or rejected (l); no reference.
    SimPO with another shape of the reward: s → log p for α → 0; α > 0 weighs the gradient of unlikely completions up
    against that of likely ones, α < 0 the other way round. Where p^(−α) comes within e⁸ of what the type can hold it
    is held there, with no gradient. At equal means ℓ/n = m it is log(1 + e^γ) and its slope in ℓ_w is
    −β·σ(γ)·e^(−α·m)/n_w.

    Args:
        beta: scale of the reward; 2.5 in the paper (Mistral-Instruct).
        gamma: γ, the target margin of the reward, as in SimPO; 0.1 there. Expected ≥ 0.
        alpha: α, the shape of the reward; 0.25 there. Expected not to be 0, which is SimPO.

    Raises:
        ValueError: if `gamma` is negative or not finite, or `alpha` 0 or not finite.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> AlphaPOLoss(beta=0.2, alpha=0.1)(PairLogps(side(-1.0), side(-21.0)))
        tensor([0.0294])
    """

    requires: ClassVar[frozenset[Field]] = frozenset()

    beta: float = 2.5
    gamma: float = 0.1
    alpha: float = 0.25

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if not (self.gamma >= 0 and math.isfinite(self.gamma)):
            raise ValueError(f"Expected `gamma` >= 0 but got {self.gamma}.")
        if self.alpha == 0 or not math.isfinite(self.alpha):
            raise ValueError(
                f"Expected `alpha` to be a number other than 0 (that is `SimPOLoss`) but got {self.alpha}."
            )

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        margin = self._shape(pairs.policy_chosen.mean) - self._shape(pairs.policy_rejected.mean)
        return -logsigmoid(self.beta * margin - self.gamma)

    def _shape(self, mean: Tensor) -> Tensor:
        """(1 − p^(−α))/α from log p."""
        largest = math.log(torch.finfo(mean.dtype).max) - 8 - math.log(max(1.0, self.beta) / min(1.0, abs(self.alpha)))
        return -(-self.alpha * mean).clamp(max=largest).expm1() / self.alpha
