from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class NormalizedDPOLoss(PreferenceLoss):
    """Length-normalised DPO (Tülu 3, arXiv 2411.15124): −log σ(β·(r_w/n_w − r_l/n_l)).

    r = log π/π_ref of the chosen (w) and rejected (l) completion, divided by its own number of tokens n: a long
    completion no longer gains margin from its length. With one token each it is DPO. At margin 0 it is log 2 and its
    slope in r_w is −β/(2·n_w).

    Args:
        beta: inverse temperature per token; larger than DPO's by about the length of a completion, 5 in Tülu 3. Rewards
            stay β times the *summed* log-ratio, as for every loss.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> NormalizedDPOLoss(beta=0.2)(PairLogps(side(-1.0), side(-21.0), side(-0.1), side(-0.1)))
        tensor([0.1269])
    """

    beta: float = 5.0

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        chosen = pairs.chosen_logratio / pairs.policy_chosen.length
        rejected = pairs.rejected_logratio / pairs.policy_rejected.length
        return -logsigmoid(self.beta * (chosen - rejected))
