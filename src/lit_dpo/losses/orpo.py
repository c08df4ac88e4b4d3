from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.fields import Field
from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class ORPOLoss(PreferenceLoss):
    """Odds Ratio Preference Optimization (ORPO, arXiv 2403.07691): −ℓ_w/n_w − β·log σ(log odds_w − log odds_l).

    odds = p/(1 − p), where p = e^(ℓ/n) is the geometric mean of the probabilities of a completion's n tokens, chosen
    (w) or rejected (l); no reference. Fine-tuning on the chosen completion and preference learning in one stage, from a
    base model. The likelihood is that of the chosen completion, per token of each pair; TRL takes the prompt's tokens
    too, and the mean over all tokens of the batch. Where p comes within the type's precision of 1 it is held there,
    with no gradient. At equal probabilities it is −ℓ_w/n_w + β·log 2 and its slope in ℓ_w is −(1 + β/(2(1 − p)))/n_w.

    Args:
        beta: the weight of the odds ratio, the paper's λ (TRL calls it `beta`, too); 0.1 in the authors' run of
            Mistral-ORPO-β, with a learning rate of 5e-6.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> ORPOLoss(beta=0.1)(PairLogps(side(-1.0), side(-4.0)))
        tensor([0.5097])
    """

    requires: ClassVar[frozenset[Field]] = frozenset()

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        chosen, rejected = pairs.policy_chosen.mean, pairs.policy_rejected.mean
        return -chosen - self.beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Tensor) -> Tensor:
    """Return the logit of p, from log p."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    # 1 − p from log p without rounding p first, which would be all of 1 − p where p is near 1
    return logp - (-logp.expm1()).log()
