from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.checks import in_range


@dataclass(frozen=True)
class AOTUnpairedLoss(PreferenceLoss):
    """Alignment via optimal transport without pairs (AOT, arXiv 2406.05882, section 3): cDPO between sorted batches.

    Prefers the *distribution* of log π/π_ref of chosen completions to that of rejected completions, quantile by
    quantile: with both sorted over the batch, δ = their difference, −(1−ε)·log σ(β·δ) − ε·log σ(−β·δ). Which rejected
    completion belongs to which chosen one does not matter.

    The pair that holds a quantile gets its loss, so losses follow the order of pairs; but they depend on the batch
    mates (`couples_pairs`), and on one pair alone the loss is cDPO, or DPO without smoothing. The batch is that of
    all ranks, in training and in evaluation. At δ = 0 it is log 2 and its slope in δ is −β(1−2ε)/2. Of many completions
    of one prompt, each is sorted in as often as it is compared, so that they are not independent samples of the
    distribution.

    Args:
        beta: inverse temperature.
        label_smoothing: ε, as in cDPO. Expected in [0, 0.5).

    Raises:
        ValueError: if `label_smoothing` is outside [0, 0.5).

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> side = lambda *x: SequenceLogps(torch.tensor(x), torch.ones(2))
        >>> pairs = PairLogps(side(-1.0, -3.0), side(-21.0, -3.0), side(-0.1, -30.0), side(-0.1, -10.0))
        >>> AOTUnpairedLoss(beta=0.1)(pairs)
        tensor([0.1269, 0.1269])
    """

    couples_pairs: ClassVar[bool] = True

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        in_range("label_smoothing", self.label_smoothing, "[0, 0.5)")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        chosen, rejected = pairs.chosen_logratio, pairs.rejected_logratio
        rank = chosen.detach().argsort().argsort()
        z = self.beta * (chosen - rejected.sort().values[rank])
        return -(1 - self.label_smoothing) * logsigmoid(z) - self.label_smoothing * logsigmoid(-z)
