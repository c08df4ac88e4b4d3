"""The records that cross from the models into losses and metrics."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SequenceLogps(NamedTuple):
    """Log-probabilities of one side of `B` pairs under one model, in float32 whatever the model's dtype.

    Attributes:
        total: `(B,)` sum over the completion's tokens, nats.
        length: `(B,)` number of completion tokens, at least 1.
        tokens: `(N,)` the summands, sequence after sequence, `N = length.sum()`; None where only sums are known.
    """

    total: Tensor
    length: Tensor
    tokens: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """`(B,)` nats per token."""
        return self.total / self.length

    def detach(self) -> SequenceLogps:
        """The same numbers without their graph."""
        return SequenceLogps(*(None if field is None else field.detach() for field in self))  # type: ignore[arg-type]


class PairLogps(NamedTuple):
    """All that a preference loss may look at. A new loss reads this record; it never widens a signature.

    The reference sides are None under `NoReference`; log-ratios then raise an error that says so.
    """

    policy_chosen: SequenceLogps
    policy_rejected: SequenceLogps
    reference_chosen: SequenceLogps | None = None
    reference_rejected: SequenceLogps | None = None

    @property
    def chosen_logratio(self) -> Tensor:
        """`(B,)` log π(chosen)/π_ref(chosen), nats."""
        return self.policy_chosen.total - self._reference(self.reference_chosen).total

    @property
    def rejected_logratio(self) -> Tensor:
        """`(B,)` log π(rejected)/π_ref(rejected), nats."""
        return self.policy_rejected.total - self._reference(self.reference_rejected).total

    @property
    def margin(self) -> Tensor:
        """`(B,)` difference of the two log-ratios, Δ in the papers, nats."""
        return self.chosen_logratio - self.rejected_logratio

    def detach(self) -> PairLogps:
        """The same numbers without their graph."""
        return PairLogps(*(None if side is None else side.detach() for side in self))  # type: ignore[arg-type]

    @staticmethod
    def _reference(side: SequenceLogps | None) -> SequenceLogps:
        if side is None:
            raise ValueError(
                "Expected log-probs of a reference but there are none. Under `NoReference` use a loss that "
                "declares `needs_reference = False`."
            )
        return side
