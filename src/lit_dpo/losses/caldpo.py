from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class CalDPOLoss(PreferenceLoss):
    """Calibrated DPO (Cal-DPO, arXiv 2412.14516): −log σ(Δ) + c·[(r_w − 1/(2β))² + (r_l + 1/(2β))²].

    r = log π/π_ref of the chosen (w) and rejected (l) completion, and Δ = r_w − r_l, without β in the first term. The
    second one gives each log-ratio its own target, ±1/(2β), so that rewards have a scale and the likelihood of the
    chosen completion must rise, where DPO only asks that their difference grow. SPPO is that second term alone. At
    log-ratios 0 it is log 2 + c/(2β²) and its slope in r_w is −1/2 − c/β.

    Args:
        beta: 1/(2β) is the log-ratio to reach, in nats per completion; 0.002 in the authors' configuration, with a
            learning rate of 5e-7.
        calibration_weight: c; 1/2 in the authors' code, 1 in the paper's formula. Expected > 0.

    Raises:
        ValueError: if `calibration_weight` is not a positive number.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> CalDPOLoss(beta=0.1)(PairLogps(side(-1.0), side(-12.0), side(-5.0), side(-6.0)))
        tensor([1.0000])
    """

    beta: float = 0.002
    calibration_weight: float = 0.5

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if not (self.calibration_weight > 0 and math.isfinite(self.calibration_weight)):
            raise ValueError(f"Expected `calibration_weight` > 0 but got {self.calibration_weight}.")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        chosen, rejected, target = pairs.chosen_logratio, pairs.rejected_logratio, 1 / (2 * self.beta)
        calibration = (chosen - target) ** 2 + (rejected + target) ** 2
        return -logsigmoid(chosen - rejected) + self.calibration_weight * calibration
