from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_dpo.logps.fields import Field
from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.dpo import DPOLoss


@dataclass(frozen=True)
class ComposedLoss(PreferenceLoss):
    """A loss made of other losses: what it requires and remembers is what they do.

    `beta` is not an argument: it is that of the first inner loss that reads the reference (of the first one if none
    does), and so are the rewards.
    """

    beta: float = field(init=False, repr=False, compare=False)

    @property
    @abstractmethod
    def inner(self) -> tuple[PreferenceLoss, ...]:
        """The losses that it is made of."""

    def __post_init__(self) -> None:
        """Take over β."""
        object.__setattr__(self, "beta", self._lead.beta)
        super().__post_init__()

    @property
    def per_prompt(self) -> bool:  # type: ignore[override]
        """Whether all inner losses are; if only some are, each pair gets what they say of its prompt."""
        return all(one.per_prompt for one in self.inner)

    @property
    def couples_pairs(self) -> bool:  # type: ignore[override]
        """Whether any inner loss does."""
        return any(one.couples_pairs for one in self.inner)

    @property
    def requires(self) -> frozenset[Field]:  # type: ignore[override]
        """What any inner loss requires."""
        return frozenset[Field]().union(*(one.requires for one in self.inner))

    @property
    def columns(self) -> frozenset[str]:  # type: ignore[override]
        """What any inner loss reads of the data."""
        return frozenset[str]().union(*(one.columns for one in self.inner))

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """Return the leading inner loss's, `(B,)` each."""
        return self._lead.rewards(pairs)

    @property
    def _lead(self) -> PreferenceLoss:
        return next((one for one in self.inner if Field.REFERENCE in one.requires), self.inner[0])

    def views(self, pairs: PairLogps) -> list[PairLogps]:
        """Return what each inner loss sees: the pairs, and its own part of the state."""
        if pairs.state is None:
            return [pairs] * len(self.inner)
        return [pairs._replace(state=own) for own in self._split(pairs.state)]

    def _split(self, values: Tensor) -> list[Tensor | None]:
        """Each inner loss's part of a state or of sums; None for one without a memory."""
        sizes = [0 if (state := one.initial_state()) is None else state.numel() for one in self.inner]
        return [own if own.numel() else None for own in torch.split(values, sizes)]

    def initial_state(self) -> Tensor | None:
        """Return the inner losses' states, one after the other."""
        states = [state for one in self.inner if (state := one.initial_state()) is not None]
        return torch.cat(states) if states else None

    def sums(self, pairs: PairLogps) -> Tensor:
        """Those of the inner losses, one after the other, each of what it sees."""
        both = zip(self.inner, self.views(pairs), strict=True)
        return torch.cat([one.sums(view) for one, view in both if one.initial_state() is not None])

    def next_state(self, state: Tensor, sums: Tensor) -> Tensor:
        """Each inner loss's next state."""
        parts = zip(self.inner, self._split(state), self._split(sums), strict=True)
        return torch.cat([one.next_state(own, new) for one, own, new in parts if own is not None and new is not None])


@dataclass(frozen=True)
class WrappedLoss(ComposedLoss):
    """A loss around one other, which it shows another view of the pairs."""

    loss: PreferenceLoss = DPOLoss()  # noqa: RUF009 - frozen

    @abstractmethod
    def view(self, pairs: PairLogps) -> PairLogps:
        """Return what the inner loss sees of the pairs."""

    def views(self, pairs: PairLogps) -> list[PairLogps]:
        """Return that view, alone."""
        return super().views(self.view(pairs))

    @property
    def inner(self) -> tuple[PreferenceLoss, ...]:
        """The one loss."""
        return (self.loss,)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses of the inner loss, `(B,)`, or `(P,)` if it is `per_prompt`."""
        return self.loss(self.view(pairs))

    @property
    def part_names(self) -> tuple[str, ...]:
        """The inner loss's."""
        return self.loss.part_names

    def parts(self, pairs: PairLogps) -> dict[str, Tensor]:
        """Return the inner loss's."""
        return self.loss.parts(self.view(pairs))


def within(loss: PreferenceLoss) -> Iterator[PreferenceLoss]:
    """Go through a loss and all that it is made of."""
    yield loss
    for one in getattr(loss, "inner", ()):
        yield from within(one)
