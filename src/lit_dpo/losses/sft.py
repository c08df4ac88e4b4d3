from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from lit_dpo.logps.fields import Field
from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.checks import one_of
from lit_dpo.losses.order import ranking, take


@dataclass(frozen=True)
class SFTLoss(PreferenceLoss):
    """Negative log-likelihood of the chosen completion: −ℓ_w/n_w.

    Supervised fine-tuning on the chosen completions; the rejected ones and the reference play no part. Meant as a part
    of a `MixtureLoss`, to keep the likelihood of chosen completions from falling; alone, it is the baseline that a
    preference loss has to beat.

    The references disagree on the mean, so it is an argument. `"sequence"` is the mean over each completion's tokens,
    so that all completions count alike, as in LLaMA-Factory and OpenRLHF; `"token"` is B·(−ℓ_w)/Σn_w over the batch of
    B pairs of all ranks, whose mean over pairs is the mean over tokens, as in TRL and Liger: long completions count
    more, and a pair's loss depends on its batch mates' lengths. For one pair it is −ℓ_w/n_w either way and its slope in
    ℓ_w is −1/n_w.

    Of many completions of one prompt, a good one is chosen in one pair and rejected in another: in a ranking of four
    the first is chosen three times, the second twice, the third once. `of="best"` takes each prompt's best alone, once:
    one loss per prompt, `(P,)`, and P for B above.

    Args:
        average_over: over each completion's tokens (`"sequence"`) or over the batch's (`"token"`).
        of: every pair's chosen completion, or each prompt's best one.

    Raises:
        ValueError: if `average_over` or `of` is neither; when called, if the comparisons of a prompt leave open which
            of its completions is best.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> side = lambda *x: SequenceLogps(torch.tensor(x), torch.tensor([1.0, 3.0]))
        >>> pairs = PairLogps(side(-1.0, -9.0), side(-1.0, -1.0))
        >>> SFTLoss()(pairs), SFTLoss(average_over="token")(pairs)
        (tensor([1., 3.]), tensor([0.5000, 4.5000]))
    """

    requires: ClassVar[frozenset[Field]] = frozenset()

    # nothing here has a temperature, and an argument without effect would be a trap; rewards are plain log-probs
    beta: float = field(default=1.0, init=False, repr=False)
    average_over: Literal["sequence", "token"] = "sequence"
    of: Literal["chosen", "best"] = "chosen"

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        one_of("average_over", self.average_over, "sequence", "token")
        one_of("of", self.of, "chosen", "best")

    @property
    def per_prompt(self) -> bool:  # type: ignore[override]
        """Whether it is each prompt's best completion that counts."""
        return self.of == "best"

    @property
    def couples_pairs(self) -> bool:  # type: ignore[override]
        """Whether the mean is over the batch's tokens."""
        return self.average_over == "token"

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`, or `(P,)` of each prompt's best completion."""
        total, length = pairs.policy_chosen[:2]
        if self.of == "best":
            lists = pairs.lists
            best = ranking(lists, top=1)[:, :1]
            total, length = (take(values, lists, best)[:, 0] for values in lists.policy[:2])
        return -total / (length if self.average_over == "sequence" else length.mean())
