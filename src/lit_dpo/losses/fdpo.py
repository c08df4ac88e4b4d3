from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.checks import in_range, one_of


@dataclass(frozen=True)
class FDPOLoss(PreferenceLoss):
    """f-DPO (arXiv 2309.16240, table 1): −log σ(β·[f′(u_w) − f′(u_l)]), u = π/π_ref.

    DPO for another divergence from the reference than the reverse KL, whose f′ is log u. With r = log u, and without
    the constants that cancel:

    - `"forward_kl"`: f′ = −e^(−r). Punishes what the policy forgets.
    - `"js"`: f′ = log σ(r), Jensen-Shannon. Linear far below the reference, saturated above it.
    - `"alpha"`: f′ = (1 − e^(−α·r))/α. Between DPO (α → 0) and the forward KL (α → 1).

    α is the paper's, as in TRL 0.24; in later TRL `f_alpha_divergence_coef` is 1 − α. Where an
    exponential comes within e⁸ of what the type can hold it is held there, with no gradient: in float32 from r ≈ −80
    down (forward KL). At log-ratios 0 the loss is log 2 and its slope in r_w is −β/2, with `"js"` −β/4.

    Args:
        beta: inverse temperature.
        divergence: which divergence binds the policy to the reference.
        alpha: α. Expected in (0, 1) with `divergence="alpha"`, and None otherwise.

    Raises:
        ValueError: if `divergence` is none of them, or `alpha` missing, out of range, or given where it does not apply.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> FDPOLoss(beta=0.1, divergence="js")(PairLogps(side(-1.0), side(-21.0), side(-0.1), side(-0.1)))
        tensor([0.1311])
    """

    divergence: Literal["forward_kl", "js", "alpha"] = "js"
    alpha: float | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        one_of("divergence", self.divergence, "forward_kl", "js", "alpha")
        if self.divergence != "alpha" and self.alpha is not None:
            raise ValueError(
                f'Expected `alpha` only with `divergence` "alpha" but got {self.alpha} with {self.divergence!r}.'
            )
        if self.divergence == "alpha":
            in_range("alpha", self.alpha, "(0, 1)")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        slopes = self._slope(pairs.chosen_logratio) - self._slope(pairs.rejected_logratio)
        return -logsigmoid(self.beta * slopes)

    def _slope(self, logratio: Tensor) -> Tensor:
        """f′ up to a constant."""
        if self.divergence == "js":
            return logsigmoid(logratio)
        power = 1.0 if self.alpha is None else self.alpha
        largest = math.log(torch.finfo(logratio.dtype).max) - 8 - math.log(max(1.0, self.beta) / power)
        return -(-power * logratio).clamp(max=largest).expm1() / power
