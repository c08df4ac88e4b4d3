from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.checks import one_of, positive


@dataclass(frozen=True)
class RPOLoss(PreferenceLoss):
    """Reward-aware preference optimization (RPO, arXiv 2406.11704 and 2502.00203): a distance D of β·Δ from η·s.

    s is how much better the chosen completion was scored than the rejected one, from the data: the policy's margin
    β·Δ is not pushed without end, as under DPO, but to the margin that a reward model gives, and back if it is beyond.
    For scored preferences. Scores the other way round (s < 0) turn the pair around.

    With z = β·Δ and t = η·s, the distances are those of NeMo-Aligner, `rpo_bwd_kl`, `rpo_fwd_kl` and `rpo_sq`, between
    Bernoulli distributions for the first two. At margin 0, with p = σ(t):

    - `"bwd_kl"`, KL(σ(t) ‖ σ(z)), Nemotron-4's: log 2 + p·log p + (1−p)·log(1−p), slope in Δ −β·(p − ½);
    - `"fwd_kl"`, KL(σ(z) ‖ σ(t)): −log 2 − ½·log(p·(1−p)), slope −β·t/4;
    - `"sq"`, (z − t)²: t², slope −2·β·t.

    The leave-one-out distance for more than two completions per prompt is not here: a pair has two. The term that is
    also called RPO, a likelihood of the chosen completion added to DPO (arXiv 2404.19733), is `MixtureLoss`.

    Args:
        beta: inverse temperature; 0.2 is NeMo-Aligner's default.
        reward_scale: η, what a unit of score is worth in units of β·Δ; 1 there. Expected > 0.
        distance: D.

    Raises:
        ValueError: if `reward_scale` is not a positive number, or `distance` none of the three.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> side = lambda *x: SequenceLogps(torch.tensor(x), torch.ones(2))
        >>> same = side(-1.0, -1.0)
        >>> pairs = PairLogps(side(-1.0, 9.0), same, same, same, columns={"score_margin": torch.tensor([1.0, 1.0])})
        >>> RPOLoss()(pairs), RPOLoss(distance="sq")(pairs)  # margins 0 and 10; the second is at its target
        (tensor([0.1109, 0.0000]), tensor([1., 0.]))
    """

    columns: ClassVar[frozenset[str]] = frozenset({"score_margin"})

    reward_scale: float = 1.0
    distance: Literal["bwd_kl", "fwd_kl", "sq"] = "bwd_kl"

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        positive("reward_scale", self.reward_scale)
        one_of("distance", self.distance, "bwd_kl", "fwd_kl", "sq")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`."""
        margin = self.beta * pairs.margin
        target = self.reward_scale * pairs.column("score_margin").to(margin)
        if self.distance == "sq":
            return (margin - target) ** 2
        return _kl(target, margin) if self.distance == "bwd_kl" else _kl(margin, target)


def _kl(one: Tensor, other: Tensor) -> Tensor:
    """KL(σ(one) ‖ σ(other)) between Bernoulli distributions, in nats."""
    yes, no = logsigmoid(one), logsigmoid(-one)
    return yes.exp() * (yes - logsigmoid(other)) + no.exp() * (no - logsigmoid(-other))
