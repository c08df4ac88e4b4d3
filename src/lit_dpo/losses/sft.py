from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from lit_dpo.logps.fields import Field
from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss


@dataclass(frozen=True)
class SFTLoss(PreferenceLoss):
    """Negative log-likelihood of the chosen completion: −ℓ_w/n_w.

    Supervised fine-tuning on the chosen completions; the rejected ones and the reference play no part. Meant as a part
    of a `MixtureLoss`, to keep the likelihood of chosen completions from falling; alone, it is the baseline that a
    preference loss has to beat.

    The references disagree on the mean, so it is an argument. `"sequence"` is the mean over each completion's tokens,
    so that all completions count alike, as in LLaMA-Factory and OpenRLHF; `"token"` is B·(−ℓ_w)/Σn_w over the batch of
    B pairs, whose mean over pairs is the mean over tokens, as in TRL and Liger: long completions count more, and a
    pair's loss depends on its batch mates' lengths. For one pair it is −ℓ_w/n_w either way and its slope in ℓ_w is
    −1/n_w.

    Args:
        average_over: over each completion's tokens (`"sequence"`) or over the batch's (`"token"`).

    Raises:
        ValueError: if `average_over` is neither.

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

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if self.average_over not in ("sequence", "token"):
            raise ValueError(f'Expected `average_over` to be "sequence" or "token" but got {self.average_over!r}.')

    @property
    def couples_pairs(self) -> bool:  # type: ignore[override]
        """Whether the mean is over the batch's tokens."""
        return self.average_over == "token"

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        chosen = pairs.policy_chosen
        return -chosen.mean if self.average_over == "sequence" else -chosen.total / chosen.length.mean()
