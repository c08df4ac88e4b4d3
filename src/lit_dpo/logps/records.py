"""The records that cross from the models into losses and metrics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class SequenceLogps(NamedTuple):
    """Log-probabilities of one side of `B` pairs under one model, in float32 whatever the model's dtype.

    Attributes:
        total: `(B,)` sum over the completion's tokens, nats.
        length: `(B,)` number of completion tokens, at least 1.
        per_token: `(N,)` the summands, sequence after sequence, `N = length.sum()`; None where only sums are known.
        collision: `(N,)` log Σ_v π(v)² over the vocabulary where each token is predicted, without gradient; None unless
            a loss asks for it.
        kl: `(N,)` KL(π_ref ‖ π) over the vocabulary where each token is predicted, nats; None unless a loss asks.
    """

    total: Tensor
    length: Tensor
    per_token: Tensor | None = None
    collision: Tensor | None = None
    kl: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """`(B,)` nats per token."""
        return self.total / self.length

    def sums(self, values: Tensor) -> Tensor:
        """`(B,)` sums over each sequence of `(N,)` values, one per token."""
        return torch.segment_reduce(values, "sum", lengths=self.length.long(), unsafe=True)

    def detach(self) -> SequenceLogps:
        """The same numbers without their graph."""
        return SequenceLogps(*(None if field is None else field.detach() for field in self))  # type: ignore[arg-type]


class PairLogps(NamedTuple):
    """All that a preference loss may look at. A new loss reads this record; it never widens a signature.

    The reference sides are None under `NoReference`; log-ratios then raise an error that says so. What follows them is
    None unless the data, or the loss's own `initial_state`, bring it.

    Attributes:
        policy_chosen: log-probs of the chosen completions under the policy, with gradients.
        policy_rejected: of the rejected completions.
        reference_chosen: of the chosen completions under the reference, without gradients.
        reference_rejected: of the rejected completions.
        weight: `(B,)` weights of the rows. The module multiplies every loss by them; losses do not read them.
        score_margin: `(B,)` how much better the chosen completion was scored than the rejected one.
        probability: `(B,)` probability that the chosen completion is the better one.
        state: `(S,)` what a loss remembers between steps, float64; see `PreferenceLoss.initial_state`.
    """

    policy_chosen: SequenceLogps
    policy_rejected: SequenceLogps
    reference_chosen: SequenceLogps | None = None
    reference_rejected: SequenceLogps | None = None
    weight: Tensor | None = None
    score_margin: Tensor | None = None
    probability: Tensor | None = None
    state: Tensor | None = None

    @property
    def chosen_logratio(self) -> Tensor:
        """`(B,)` log π(chosen)/π_ref(chosen), nats."""
        reference: Tensor = self.require("reference_chosen").total
        return self.policy_chosen.total - reference

    @property
    def rejected_logratio(self) -> Tensor:
        """`(B,)` log π(rejected)/π_ref(rejected), nats."""
        reference: Tensor = self.require("reference_rejected").total
        return self.policy_rejected.total - reference

    @property
    def margin(self) -> Tensor:
        """`(B,)` difference of the two log-ratios, Δ in the papers, nats."""
        return self.chosen_logratio - self.rejected_logratio

    def require(self, name: str) -> Any:
        """A field that may be None.

        Args:
            name: of a field, such as `score_margin`, or of a field of a side, such as `policy_chosen.per_token`.

        Raises:
            ValueError: if it is None, saying what would fill it.
        """
        found: Any = self
        for part in name.split("."):
            found = getattr(found, part)
            if found is None:
                raise ValueError(f"Expected `{name}` in the pairs but there is none. {_REMEDIES[part]}")
        return found

    def detach(self) -> PairLogps:
        """The same numbers without their graph."""
        return PairLogps(*(None if field is None else field.detach() for field in self))  # type: ignore[arg-type]


_NO_REFERENCE = "Under `NoReference` use a loss that declares `needs_reference = False`."
_ASK = 'A loss gets it if its `needs` names "{}".'
_COLUMN = "Name its column: `--data.format.{} COLUMN`."
_REMEDIES = {
    "reference_chosen": _NO_REFERENCE,
    "reference_rejected": _NO_REFERENCE,
    "per_token": "These log-probs were stored as sums; store tokens too.",
    "collision": _ASK.format("collision"),
    "kl": _ASK.format("kl"),
    "weight": _COLUMN.format("weight"),
    "score_margin": _COLUMN.format("score_margin"),
    "probability": _COLUMN.format("probability"),
    "state": "A loss with a state defines `initial_state`, and gets it from the module.",
}
