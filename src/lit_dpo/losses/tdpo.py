from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.fields import Field
from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class TDPOLoss(PreferenceLoss):
    """Token-level DPO (TDPO, arXiv 2404.11999): −log σ(β·(Δ − δ)), δ the difference of the completions' divergences.

    D = Σ_t KL(π_ref ‖ π) over the vocabulary at each of a completion's tokens, chosen (w) or rejected (l): a forward
    KL, which holds the policy to all that the reference says, where DPO's margin only sees the tokens that were
    written.

    - `"tdpo1"`: δ = D_l − D_w.
    - `"tdpo2"`: δ = α·(D_l − D_w) with no gradient through D_w, so that the divergence on the chosen completion is free
      and that on the rejected one is pushed below it.

    The authors prefer TDPO1 for small and TDPO2 for large learning rates. Rewards stay β·log π/π_ref, as for every
    loss; the authors add β·D. At δ = Δ = 0 it is log 2 and its slope in Δ is −β/2.

    Args:
        beta: inverse temperature; 0.1 in the authors' runs.
        version: which of the two.
        kl_weight: α. Expected > 0 with `version="tdpo2"`, where None is the authors' 0.5, and None otherwise.

    Raises:
        ValueError: if `version` is neither, or `kl_weight` out of range or given where it does not apply.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> side = lambda x, kl: SequenceLogps(torch.tensor([x]), torch.ones(1), kl=torch.tensor([kl]))
        >>> pairs = PairLogps(side(-1.0, 2.0), side(-1.0, 6.0), side(-1.0, 0.0), side(-1.0, 0.0))
        >>> TDPOLoss(version="tdpo1")(pairs), TDPOLoss(version="tdpo2")(pairs)
        (tensor([0.9130]), tensor([0.7981]))
    """

    requires: ClassVar[frozenset[Field]] = frozenset({Field.REFERENCE, Field.KL})

    version: Literal["tdpo1", "tdpo2"] = "tdpo2"
    kl_weight: float | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if self.version not in ("tdpo1", "tdpo2"):
            raise ValueError(f'Expected `version` to be "tdpo1" or "tdpo2" but got {self.version!r}.')
        if self.kl_weight is None:
            return
        if self.version == "tdpo1":
            raise ValueError(f'Expected `kl_weight` only with `version` "tdpo2" but got {self.kl_weight} with "tdpo1".')
        if not (self.kl_weight > 0 and math.isfinite(self.kl_weight)):
            raise ValueError(f"Expected `kl_weight` > 0 but got {self.kl_weight}.")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        chosen = pairs.policy_chosen.sums(pairs.require("policy_chosen.kl"))
        rejected = pairs.policy_rejected.sums(pairs.require("policy_rejected.kl"))
        if self.version == "tdpo1":
            delta = rejected - chosen
        else:
            delta = (0.5 if self.kl_weight is None else self.kl_weight) * (rejected - chosen.detach())
        return -logsigmoid(self.beta * (pairs.margin - delta))
