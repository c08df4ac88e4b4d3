from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.checks import whole
from lit_dpo.losses.order import listed, ranking, take, there


@dataclass(frozen=True)
class PlackettLuceLoss(PreferenceLoss):
    """DPO over rankings (arXiv 2305.18290, appendix A.3, eq. 18–20): −Σ_k log(e^s_k / Σ_{j ≥ k} e^s_j), `(P,)`.

    s_k = β·log π/π_ref of the completion on position k of its prompt's ranking: under the Plackett–Luce model each
    position is a choice among what is left. One loss per prompt, the negative log-likelihood of its ranking: the sum
    over positions, not the mean that some implementations take. For two completions it is DPO. With K completions of
    equal rewards it is log K!, and its slope in log π is −β(K−1)/K for the best and β(H_K − 1) for the worst one,
    H_K = 1 + ½ + … + 1/K.

    The ranking comes from the prompt's comparisons: all of them, or those of neighbours. With `top` only the first
    positions are ordered; those after them are what they were chosen from, in no order. `top=1` asks for the best
    completion alone: −log σ(−log Σ_j e^(s_j − s_w)), S-DPO (arXiv 2406.09215).

    Args:
        beta: inverse temperature, as in DPO.
        top: how many positions are ordered. None: all. Expected ≥ 1.

    Raises:
        ValueError: if `top` is not a whole number ≥ 1; when called, if the comparisons of a prompt leave open which
            completion has one of these positions.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import CompletionLogps, SequenceLogps
        >>> n = torch.tensor([1, 1, 1])
        >>> policy, reference = (SequenceLogps(torch.tensor(x), n) for x in ([-4.0, -2.0, -9.0], [-5.0, -5.0, -5.0]))
        >>> ranked = torch.tensor([[1, 0], [0, 2]])  # the second one is best, and the third worst
        >>> lists = CompletionLogps(policy, reference, n, torch.tensor([3]), ranked, torch.tensor([2]))
        >>> PlackettLuceLoss(beta=0.1)(lists.pairs()), PlackettLuceLoss(beta=0.1, top=1)(lists.pairs())
        (tensor([1.3136]), tensor([0.8395]))
    """

    per_prompt: ClassVar[bool] = True

    top: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if self.top is not None:
            whole("top", self.top, 1)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(P,)`."""
        lists, ratios = listed(pairs)
        order = ranking(lists, self.top)
        ranked = take(ratios, lists, order)  # the best one first
        place = torch.arange(ranked.shape[1])
        choices = place[:-1][: self.top]  # the last one is none
        after = (place > choices[:, None]) & there(lists)[:, None]
        # each position's choice against those after it, as in DPO; one beyond a prompt's last has none, and no loss
        gaps = self.beta * (ranked[:, None] - ranked[:, : len(choices), None])
        left = gaps.masked_fill(~after.to(gaps.device, non_blocking=True), -torch.inf).logsumexp(2)
        return -logsigmoid(-left).sum(1)
