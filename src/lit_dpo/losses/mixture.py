from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.checks import positive
from lit_dpo.losses.composed import ComposedLoss
from lit_dpo.losses.dpo import DPOLoss
from lit_dpo.losses.sft import SFTLoss


@dataclass(frozen=True)
class MixtureLoss(ComposedLoss):
    """A weighted sum of losses, Σ_k w_k·L_k.

    By default `DPOLoss` + `SFTLoss`, the recipe called RPO in arXiv 2404.19733 (β 0.1, weight 1, learning rate 7e-7)
    and 2405.16436 (β 0.01, weight 0.005, learning rate 5e-7): the likelihood of the chosen completions cannot fall with
    that of the rejected ones. MPO (arXiv 2411.10442, section 3.2) is `DPOLoss`, `BCOLoss` and `SFTLoss` with weights
    0.8, 0.2 and 1. Any losses mix.

    Each part is logged along with the sum, unweighted, under its short name: `dpo`, `sft`, `dpo_2` for a second one.
    Rewards, and `beta`, are those of the first loss that reads the reference, or of the first one if none does. Value
    and slope are the weighted sums of the parts'.

    Where only some parts score lists of completions, one number for each prompt, each pair gets its prompt's.

    Args:
        losses: the parts; at least one. None: `DPOLoss` and `SFTLoss`.
        weights: w_k, one for each part; None for 1 each. Expected > 0.

    Raises:
        ValueError: if `losses` is empty, or `weights` do not fit them or are not positive numbers.

    Example:
        >>> import torch
        >>> from lit_dpo.logps import PairLogps, SequenceLogps
        >>> n = torch.tensor([2.0])
        >>> side = lambda x: SequenceLogps(torch.tensor([x]), n)
        >>> pairs = PairLogps(side(-1.0), side(-21.0), side(-0.1), side(-0.1))
        >>> loss = MixtureLoss([DPOLoss(beta=0.1), SFTLoss()], weights=[1.0, 0.2])
        >>> loss(pairs), loss.parts(pairs)
        (tensor([0.2269]), {'dpo': tensor([0.1269]), 'sft': tensor([0.5000])})
    """

    losses: list[PreferenceLoss] | tuple[PreferenceLoss, ...] | None = None
    weights: list[float] | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check the arguments, and make lists tuples, so that it hashes."""
        # not the default itself, which a configuration file could not write
        object.__setattr__(self, "losses", (DPOLoss(), SFTLoss()) if self.losses is None else tuple(self.losses))
        if not self.inner:
            raise ValueError("Expected `losses` to name at least one loss but got none.")
        super().__post_init__()
        if self.weights is None:
            return
        for weight in self.weights:
            positive("weights", weight)
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        if len(self.weights) != len(self.inner):
            raise ValueError(
                f"Expected `weights` to be {len(self.inner)} numbers, one for each of `losses`, but got "
                f"{len(self.weights)}."
            )

    @property
    def inner(self) -> tuple[PreferenceLoss, ...]:
        """The parts."""
        return tuple(self.losses or ())

    @property
    def part_names(self) -> tuple[str, ...]:
        """Short class names, numbered where one repeats."""
        seen: Counter[str] = Counter()
        names = []
        for one in self.inner:
            name = type(one).__name__.removesuffix("Loss").lower()
            seen[name] += 1
            names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
        return tuple(names)

    def parts(self, pairs: PairLogps) -> dict[str, Tensor]:
        """Return the unweighted losses by name, `(B,)` each, or `(P,)` if all parts are `per_prompt`."""
        values = []
        for one, view in zip(self.inner, self.views(pairs), strict=True):
            shared = one.per_prompt and not self.per_prompt
            values.append(view.lists.per_comparison(one(view)) if shared else one(view))
        return dict(zip(self.part_names, values, strict=True))

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`, or `(P,)` if all parts are `per_prompt`."""
        first, *others = self.parts(pairs).values()
        weights = self.weights or (1.0,) * len(self.inner)
        total = weights[0] * first
        for weight, other in zip(weights[1:], others, strict=True):
            total = total + weight * other
        return total
