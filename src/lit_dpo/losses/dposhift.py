from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.checks import in_range


@dataclass(frozen=True)
class DPOShiftLoss(PreferenceLoss):
    """DPO with a weaker push on the rejected completion (DPO-Shift, arXiv 2502.07599): −log σ(β·(r_w − f·r_l)).

    r = log π/π_ref of the chosen (w) and rejected (l) completion, in nats. Under DPO the probability of chosen
    completions may fall as long as that of the rejected ones falls faster; with f below 1 less is gained by that, so
    that chosen ones keep more of their probability, at the price of a smaller margin. At log-ratios 0 it is log 2 and
    its slopes are −β/2 in r_w and f·β/2 in r_l.

    The paper also changes f(λ) linearly over the run, up or down, between 0.75, 0.85 or 0.95 and 1. That is not done
    here: a loss is a function of its pairs, and would have to be told the step and their number.

    Args:
        beta: inverse temperature.
        rejected_weight: f(λ), `dpo_lambda` in the authors' code; 0.5 to 0.95 in their runs. Expected in (0, 1); 1 would
            be DPO.

    Raises:
        ValueError: if `rejected_weight` is outside (0, 1).

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> DPOShiftLoss(beta=0.1, rejected_weight=0.75)(PairLogps(side(-5.0), side(-25.0), side(-1.0), side(-5.0)))
        tensor([0.2873])
    """

    rejected_weight: float = 0.95

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        in_range("rejected_weight", self.rejected_weight, "(0, 1)")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        return -logsigmoid(self.beta * (pairs.chosen_logratio - self.rejected_weight * pairs.rejected_logratio))
