from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class ODPOLoss(PreferenceLoss):
    """DPO with an offset (ODPO, arXiv 2402.10571): −log σ(β·Δ − α·f(s)).

    s is how much better the chosen completion was scored than the rejected one, from the data: a pair in which it is
    much better has to reach a larger margin than one in which it is hardly so. For scored preferences (ratings, a
    reward model). f is the logarithm in the authors' code; with it a pair whose scores are equal, or the other way
    round, has no loss, the limit for s → 0. At margin 0 it is log(1 + e^(α·f(s))) and its slope in Δ is −β·σ(α·f(s)).

    Args:
        beta: inverse temperature; 0.05 to 0.7 in the authors' runs.
        offset_weight: α, the weight of the offset; 0.5 to 1 there. Expected > 0.
        scale: f, `"log"` or `"linear"`.

    Raises:
        ValueError: if `offset_weight` is not a positive number, or `scale` neither.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> side = lambda *x: SequenceLogps(torch.tensor(x), torch.ones(2))
        >>> same = side(-1.0, -1.0)
        >>> pairs = PairLogps(same, same, same, same, columns={"score_margin": torch.tensor([1.0, 3.0])})
        >>> ODPOLoss()(pairs), ODPOLoss(scale="linear")(pairs)
        (tensor([0.6931, 1.3863]), tensor([1.3133, 3.0486]))
    """

    columns: ClassVar[frozenset[str]] = frozenset({"score_margin"})

    offset_weight: float = 1.0
    scale: Literal["log", "linear"] = "log"

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if not (self.offset_weight > 0 and math.isfinite(self.offset_weight)):
            raise ValueError(f"Expected `offset_weight` > 0 but got {self.offset_weight}.")
        if self.scale not in ("log", "linear"):
            raise ValueError(f'Expected `scale` to be "log" or "linear" but got {self.scale!r}.')

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        margin = pairs.margin
        offset = pairs.column("score_margin").to(margin)
        if self.scale == "log":
            offset = offset.clamp(min=torch.finfo(offset.dtype).tiny).log()
        return -logsigmoid(self.beta * margin - self.offset_weight * offset)
