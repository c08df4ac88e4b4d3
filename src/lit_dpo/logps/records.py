"""The records that cross from the models into losses and metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_dpo.data.batch import KNOWN_COLUMNS, CompletionBatch, places


class SequenceLogps(NamedTuple):
    """Log-probabilities of `B` completions under one model, in float32 whatever the model's dtype.

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


class CompletionLogps(NamedTuple):
    """Log-probs of the `C` completions of `P` prompts, each once, and which of them are compared.

    What places and counts say is on the CPU and within a prompt, so that the records of micro-batches concatenate.

    Attributes:
        policy: `(C,)` log-probs under the policy, prompt after prompt.
        reference: `(C,)` under the reference; None under `NoReference`.
        lengths: `(C,)` tokens, int64.
        completions_per_prompt: `(P,)` how many completions each prompt has, int64.
        comparisons: `(B, 2)` places of the chosen and the rejected one among their prompt's own completions.
        comparisons_per_prompt: `(P,)` how many comparisons are of each prompt, int64.
    """

    policy: SequenceLogps
    reference: SequenceLogps | None
    lengths: Tensor
    completions_per_prompt: Tensor
    comparisons: Tensor
    comparisons_per_prompt: Tensor

    @classmethod
    def of(cls, batch: CompletionBatch, policy: SequenceLogps, reference: SequenceLogps | None) -> CompletionLogps:
        """Put log-probs of a batch's completions together with what the batch says of them."""
        return cls(
            policy,
            reference,
            batch.completion_lengths,
            batch.completions_per_prompt,
            batch.comparisons,
            batch.comparisons_per_prompt,
        )

    def pairs(self, columns: dict[str, Tensor] | None = None, state: Tensor | None = None) -> PairLogps:
        """Make the record of comparisons: the one place where completions become sides of pairs.

        Args:
            columns: `(B,)` each, of the data.
            state: of the loss.
        """
        taken = _Taken.of(self)
        chosen, rejected = taken.sides(self.policy)
        reference_chosen, reference_rejected = (None, None) if self.reference is None else taken.sides(self.reference)
        return PairLogps(chosen, rejected, reference_chosen, reference_rejected, columns or {}, state, self)

    def per_prompt(self, values: Tensor) -> Tensor:
        """`(P,)` means over each prompt's comparisons of `(B,)` values; a prompt without any is 0."""
        counts = self.comparisons_per_prompt.to(values.device, non_blocking=True)
        sums = torch.segment_reduce(values, "sum", lengths=counts, unsafe=True)
        return sums / counts.clamp(min=1)

    def per_comparison(self, values: Tensor) -> Tensor:
        """`(B,)` values, for each comparison that of its prompt, of `(P,)`."""
        counts = self.comparisons_per_prompt.tolist()
        of = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
        return values.index_select(0, of.to(values.device, non_blocking=True))

    def detach(self) -> CompletionLogps:
        """Return the same numbers without their graph."""
        return self._replace(policy=self.policy.detach(), reference=self.reference and self.reference.detach())


class _Taken(NamedTuple):
    """Places of the sides of pairs among completions, and among their tokens: chosen ones, then rejected ones.

    Made on the CPU, where the lengths are: nothing waits for a device here.
    """

    completions: Tensor
    tokens: Tensor
    border: int  # tokens of the chosen ones

    @classmethod
    def of(cls, lists: CompletionLogps) -> _Taken:
        both, lengths = places(lists).T.flatten(), np.array(lists.lengths.tolist())
        taken = lengths[both]
        begins = (lengths.cumsum() - lengths)[both] - (taken.cumsum() - taken)
        tokens = np.repeat(begins, taken) + np.arange(taken.sum())
        device = lists.policy.total.device
        completions, scored = (torch.from_numpy(one).to(device, non_blocking=True) for one in (both, tokens))
        return cls(completions, scored, int(taken[: len(both) // 2].sum()))

    def sides(self, logps: SequenceLogps) -> tuple[SequenceLogps, SequenceLogps]:
        """Take chosen and rejected completions."""

        def halves(values: Tensor | None, index: Tensor, first: int) -> tuple[Tensor | None, Tensor | None]:
            if values is None:
                return None, None
            found = values.index_select(0, index)  # its backward adds, without a sort
            return found[:first], found[first:]

        size = len(self.completions) // 2
        sums = [halves(values, self.completions, size) for values in (logps.total, logps.length)]
        summands = [halves(values, self.tokens, self.border) for values in (logps.per_token, logps.collision, logps.kl)]
        chosen, rejected = (SequenceLogps(*side) for side in zip(*sums, *summands, strict=True))
        return chosen, rejected


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
        completions: what the pairs were taken from: each completion once, for losses over lists; `lists` reads it.
    """

    policy_chosen: SequenceLogps
    policy_rejected: SequenceLogps
    reference_chosen: SequenceLogps | None = None
    reference_rejected: SequenceLogps | None = None
    columns: dict[str, Tensor] = {}  # noqa: RUF012 - never changed in place
    state: Tensor | None = None
    completions: CompletionLogps | None = None

    @property
    def lists(self) -> CompletionLogps:
        """The completions, prompt by prompt; of a record that was made of sides alone, the two of each pair."""
        return self.completions or _of_sides(self)

    def map_models(self, change: Callable[[SequenceLogps, SequenceLogps | None], Any]) -> PairLogps:
        """Return a record with other log-probs, for a loss that hands a changed view to another one.

        Args:
            change: given log-probs under the policy and under the reference (or None) of the same completions, returns
                both as they shall be. It sees chosen sides, rejected sides, and the completions that they come from.
        """
        if self.completions is not None:
            policy, reference = change(self.completions.policy, self.completions.reference)
            changed = self.completions._replace(policy=policy, reference=reference)
            return changed.pairs(self.columns, self.state)
        policy_chosen, reference_chosen = change(self.policy_chosen, self.reference_chosen)
        policy_rejected, reference_rejected = change(self.policy_rejected, self.reference_rejected)
        return PairLogps(policy_chosen, policy_rejected, reference_chosen, reference_rejected, self.columns, self.state)

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
        completions = self.completions and self.completions.detach()
        # columns come from the data, the state from sums of detached records: neither has a graph
        return PairLogps(policy_chosen, policy_rejected, chosen, rejected, self.columns, self.state, completions)


def _of_sides(pairs: PairLogps) -> CompletionLogps:
    """Each pair as a prompt of its own with two completions, for a record that was made by hand."""
    size = pairs.policy_chosen.total.shape[0]
    lengths = torch.stack([pairs.policy_chosen.length, pairs.policy_rejected.length], 1).flatten().long().cpu()

    def woven(chosen: SequenceLogps, rejected: SequenceLogps) -> SequenceLogps:
        sums = [torch.stack(both, 1).flatten() for both in zip(chosen[:2], rejected[:2], strict=True)]
        summands: list[Tensor | None] = []
        for one, other in zip(chosen[2:], rejected[2:], strict=True):
            if one is None or other is None:
                summands.append(None)
                continue
            sides = (torch.split(values, lengths[first::2].tolist()) for first, values in enumerate((one, other)))
            summands.append(torch.cat([part for both in zip(*sides, strict=True) for part in both]))
        return SequenceLogps(*sums, *summands)

    reference = pairs.reference_chosen and woven(pairs.reference_chosen, pairs.require("reference_rejected"))
    policy = woven(pairs.policy_chosen, pairs.policy_rejected)
    one = torch.ones(size, dtype=torch.long)
    return CompletionLogps(policy, reference, lengths, 2 * one, torch.tensor([[0, 1]]).expand(size, 2), one)


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
