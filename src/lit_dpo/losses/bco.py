from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.checks import one_of


@dataclass(frozen=True)
class BCOLoss(PreferenceLoss):
    """Binary Classifier Optimization on pairs (BCO, arXiv 2404.04656, section 4): −log σ(r_w − δ) − log σ(−(r_l − δ)).

    r = β·log π/π_ref of the chosen (w) and rejected (l) completion: a classifier that calls the one good and the other
    bad. Each completion is judged by itself against the baseline δ, the mean reward, so that no class is pushed only
    because all rewards drift.

    The references disagree on δ, so it is an argument. `"running"` is the mean of all rewards seen in training, both
    sides, this batch included, as in TRL 0.24 and LLaMA-Factory; here it weighs pairs, not batches, alike, is one
    number for all ranks, and is kept in checkpoints; of many completions of one prompt it counts each as often as it is
    compared, so that they are not independent samples of the reward. `"zero"` is TRL from 1.0 on, and Liger. With δ = 0
    and log-ratios 0 the loss is 2·log 2 and its slope in log π(chosen) is −β/2.

    Args:
        beta: inverse temperature; 0.01 in the paper's experiments on pairs, with a learning rate of 5e-7.
        baseline: δ.

    Raises:
        ValueError: if `baseline` is neither.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> pairs = PairLogps(side(-1.0), side(-21.0), side(-11.0), side(-31.0))
        >>> BCOLoss(beta=0.1, baseline="zero")(pairs)
        tensor([1.6265])
        >>> loss = BCOLoss(beta=0.1)
        >>> loss(pairs._replace(state=loss.next_state(loss.initial_state(), loss.sums(pairs))))
        tensor([1.3863])
    """

    baseline: Literal["running", "zero"] = "running"

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        one_of("baseline", self.baseline, "running", "zero")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        chosen, rejected = self.rewards(pairs)
        if self.baseline == "running":
            total, count = pairs.require("state")
            # before the first training batch both are 0
            delta = (total / count.clamp(min=1)).to(chosen)
            chosen, rejected = chosen - delta, rejected - delta
        return -logsigmoid(chosen) - logsigmoid(-rejected)

    def initial_state(self) -> Tensor | None:
        """Sum of the pairs' mean rewards, and their number."""
        return torch.zeros(2, dtype=torch.float64) if self.baseline == "running" else None

    def sums(self, pairs: PairLogps) -> Tensor:
        """Sum the same over a batch; the state adds them up."""
        chosen, rejected = self.rewards(pairs)
        means = (chosen + rejected).detach().double() / 2
        return torch.stack([means.sum(), torch.ones_like(means).sum()])
