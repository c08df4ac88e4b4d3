from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.fields import Field
from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class SimPOLoss(PreferenceLoss):
    """Simple Preference Optimization (SimPO, arXiv 2405.14734, eq. 6): −log σ(β·(ℓ_w/n_w − ℓ_l/n_l) − γ).

    ℓ = log π of the chosen (w) and rejected (l) completion and n its number of tokens; no reference. γ is the paper's
    target reward margin, in units of the reward; the authors' code takes γ/β instead (`gamma_beta_ratio`, a margin in
    nats per token): gamma = beta · gamma_beta_ratio. With z the argument of σ and a smoothing ε, the loss is
    −(1−ε)·log σ(z) − ε·log σ(−z). At equal means it is log(1 + e^γ) and its slope in ℓ_w is −β·σ(γ)/n_w (ε = 0).
    With `link="hinge"`, which the authors' code has too, it is max(0, 1 − z); at equal means 1 + γ, with slope −β/n_w.

    Args:
        beta: scale of the reward; 2.0 to 2.5 in the paper, up to 10 by the authors' later advice, with a learning rate
            of 3e-7 to 1e-6.
        gamma: γ, the target margin of the reward; 0.25 to 1.6 in the authors' runs. Expected ≥ 0.
        label_smoothing: ε, as in cDPO. Expected in [0, 0.5), and 0 with `link="hinge"`.
        link: what the margin goes through.

    Raises:
        ValueError: if `gamma` is negative or not finite, `label_smoothing` outside [0, 0.5) or given with a hinge, or
            `link` neither.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> SimPOLoss(beta=0.2, gamma=0.5)(PairLogps(side(-1.0), side(-21.0)))
        tensor([0.2014])
    """

    requires: ClassVar[frozenset[Field]] = frozenset()

    beta: float = 2.0
    gamma: float = 1.0
    label_smoothing: float = 0.0
    link: Literal["sigmoid", "hinge"] = "sigmoid"

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if not (self.gamma >= 0 and math.isfinite(self.gamma)):
            raise ValueError(f"Expected `gamma` >= 0 but got {self.gamma}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"Expected `label_smoothing` in [0, 0.5) but got {self.label_smoothing}.")
        if self.link not in ("sigmoid", "hinge"):
            raise ValueError(f'Expected `link` to be "sigmoid" or "hinge" but got {self.link!r}.')
        if self.link == "hinge" and self.label_smoothing:
            raise ValueError(f'Expected `label_smoothing` 0 with `link` "hinge" but got {self.label_smoothing}.')

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        z = self.beta * (pairs.policy_chosen.mean - pairs.policy_rejected.mean) - self.gamma
        if self.link == "hinge":
            return torch.relu(1 - z)
        return -(1 - self.label_smoothing) * logsigmoid(z) - self.label_smoothing * logsigmoid(-z)
