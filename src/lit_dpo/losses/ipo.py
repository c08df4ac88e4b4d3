from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class IPOLoss(PreferenceLoss):
    """Identity Preference Optimization (arXiv 2310.12036, eq. 17): (Δ − 1/(2β))².

    A regression of the margin onto 1/(2β), which cannot run away where preferences are certain. The paper calls β τ.

    The references disagree on Δ, so it is an argument. `"mean"` divides each log-ratio by its completion's number of
    tokens, as TRL and HALOs do, after a word of the authors (a sum over hundreds of tokens drowns the target 1/(2β));
    `"sum"` is the paper's formula as the original DPO repository and OpenRLHF compute it. A good β is larger by about
    the length of a completion with `"mean"`. At margin 0 the loss is 1/(4β²) and its slope in Δ is −1/β.

    Args:
        beta: the regularisation τ.
        average: log-ratios per token (`"mean"`) or per sequence (`"sum"`).

    Raises:
        ValueError: if `average` is neither.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> pairs = PairLogps(side(-1.0), side(-21.0), side(-1.0), side(-11.0))
        >>> IPOLoss(beta=0.1)(pairs), IPOLoss(beta=0.1, average="sum")(pairs)
        (tensor([0.]), tensor([25.]))
    """

    average: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if self.average not in ("mean", "sum"):
            raise ValueError(f'Expected `average` to be "mean" or "sum" but got {self.average!r}.')

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        margin = pairs.margin
        if self.average == "mean":
            margin = pairs.chosen_logratio / pairs.policy_chosen.length
            margin = margin - pairs.rejected_logratio / pairs.policy_rejected.length
        return (margin - 1 / (2 * self.beta)) ** 2
