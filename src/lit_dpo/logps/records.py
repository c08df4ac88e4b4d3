"""The records that cross from the models into losses and metrics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_dpo.data.batch import KNOWN_COLUMNS


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
        # `unsafe` leaves out a check of the lengths that waits for the device
        return torch.segment_reduce(values, "sum", lengths=self.length.long(), unsafe=True)

    def detach(self) -> SequenceLogps:
        """Return the same numbers without their graph."""
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
        columns: of the data, `(B,)` float32 each, by name; `column` reads one. The module multiplies every loss by
            `weight`, where there is one; losses do not read it. `score_margin` says how much better the chosen
            completion was scored than the rejected one, `probability` how likely it is the better one.
        state: `(S,)` what a loss remembers between steps, float64; see `PreferenceLoss.initial_state`.
    """

    policy_chosen: SequenceLogps
    policy_rejected: SequenceLogps
    reference_chosen: SequenceLogps | None = None
    reference_rejected: SequenceLogps | None = None
    columns: dict[str, Tensor] = {}  # noqa: RUF012 - never changed in place
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
        """Return a field that may be None, or say what would fill it.

        Args:
            name: of a field, such as `state`, or of a field of a side, such as `policy_chosen.per_token`.

        Raises:
            ValueError: if it is None, saying what would fill it.
        """
        found: Any = self
        for part in name.split("."):
            found = getattr(found, part)
            if found is None:
                raise ValueError(f"Expected `{name}` in the pairs but there is none. {_REMEDIES[part]}")
        return found

    def column(self, name: str) -> Tensor:
        """`(B,)` numbers that the data bring.

        Args:
            name: of the column, such as `score_margin`.

        Raises:
            ValueError: if the data have none of that name, saying what would bring it.
        """
        if name not in self.columns:
            there = ", ".join(sorted(self.columns)) or "none"
            raise ValueError(
                f"Expected a column `{name}` in the pairs but there is none (there: {there}). {column_remedy(name)} A "
                "loss that reads it names it in its `columns`, so that data without are refused before training."
            )
        return self.columns[name]

    def detach(self) -> PairLogps:
        """Return the same numbers without their graph."""
        policy_chosen, policy_rejected = self.policy_chosen.detach(), self.policy_rejected.detach()
        chosen, rejected = (side and side.detach() for side in (self.reference_chosen, self.reference_rejected))
        # columns come from the data, the state from sums of detached records: neither has a graph
        return PairLogps(policy_chosen, policy_rejected, chosen, rejected, self.columns, self.state)


def column_remedy(name: str) -> str:
    """Say what brings a column of the data."""
    option = f"{name} COLUMN" if name in KNOWN_COLUMNS else f"numeric_columns [{name}]"
    return f"Name the column: `--data.format.{option}`."


_NO_REFERENCE = "Under `NoReference` use a loss that does not require `Field.REFERENCE`."
_ASK = "A loss gets it if its `requires` names `Field.{}`."
_REMEDIES = {
    "reference_chosen": _NO_REFERENCE,
    "reference_rejected": _NO_REFERENCE,
    "per_token": "These log-probs were stored as sums; store tokens too.",
    "collision": _ASK.format("COLLISION"),
    "kl": _ASK.format("KL"),
    "state": "A loss with a state defines `initial_state`, and gets it from the module.",
}
