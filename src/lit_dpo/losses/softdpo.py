from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class SoftDPOLoss(PreferenceLoss):
    """DPO with soft labels (arXiv 2409.06691; the formula as cDPO's): −p·log σ(β·Δ) − (1−p)·log σ(−β·Δ).

    p is each pair's own probability that the chosen answer is really the better one, from the data: the share of
    annotators, or σ of a reward model's difference. Where cDPO has one ε for all pairs, ε = 1 − p here.

    - `"arithmetic"`: the mean of both labels' losses, above. Its minimum is at β·Δ = log(p/(1−p)), so a pair of equals
      is pulled to margin 0. At margin 0 it is log 2 and its slope in Δ is −β(2p−1)/2.
    - `"geometric"`: the paper's GDPO, −log σ(β·(2p−1)·Δ): DPO between geometric means of both answers' likelihoods,
      under which a pair of equals is left alone. Value and slope at margin 0 are the same.

    Args:
        beta: inverse temperature.
        label_average: what the labels label_average.

    Raises:
        ValueError: if `label_average` is neither.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> pairs = PairLogps(side(-1.0), side(-21.0), side(-0.1), side(-0.1), probability=torch.tensor([0.9]))
        >>> SoftDPOLoss()(pairs), SoftDPOLoss(label_average="geometric")(pairs)
        (tensor([0.3269]), tensor([0.1839]))
    """

    needs: ClassVar[frozenset[str]] = frozenset({"probability"})

    label_average: Literal["arithmetic", "geometric"] = "arithmetic"

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if self.label_average not in ("arithmetic", "geometric"):
            allowed = '"arithmetic" or "geometric"'
            raise ValueError(f"Expected `label_average` to be {allowed} but got {self.label_average!r}.")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        z = self.beta * pairs.margin
        probability: Tensor = pairs.require("probability").to(z)
        if self.label_average == "geometric":
            return -logsigmoid((2 * probability - 1) * z)
        return -probability * logsigmoid(z) - (1 - probability) * logsigmoid(-z)
