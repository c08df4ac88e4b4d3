"""The interface of preference losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lit_dpo.logps.fields import Field, check_fields
from lit_dpo.logps.records import PairLogps
from lit_dpo.losses.checks import positive


@dataclass(frozen=True)
class PreferenceLoss(ABC):
    """A preference loss: a frozen strategy from the log-probs of `B` pairs to `B` losses, or one per prompt.

    Subclass it anywhere; nothing has to be registered. The arguments of a loss are its dataclass fields, so that an
    argument it does not have is an error where it is written, and the loss compares, prints and pickles by value.

    Args:
        beta: inverse temperature, the strength of the pull towards the reference. Expected > 0.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> from lit_dpo.losses import PreferenceLoss
        >>> @dataclass(frozen=True)
        ... class HingeLoss(PreferenceLoss):
        ...     def __call__(self, pairs):
        ...         return torch.relu(1 - self.beta * pairs.margin)
        >>> HingeLoss(beta=0.5)
        HingeLoss(beta=0.5)
    """

    beta: float = 0.1

    requires: ClassVar[frozenset[Field]] = frozenset({Field.REFERENCE})
    """What the loss reads that is not always there. `frozenset()` for one without a reference; only these work with
    `NoReference`. The policy provides what is its own; what the reference lacks is said before weights load."""

    columns: ClassVar[frozenset[str]] = frozenset()
    """Names of the data's columns that the loss reads by `pairs.column`. Data without one of them are refused before
    weights load."""

    per_prompt: ClassVar[bool] = False
    """True for losses that return `(P,)`: one for each prompt, of the list of its completions, `PairLogps.lists`."""

    couples_pairs: ClassVar[bool] = False
    """True for losses in which a pair's loss depends on pairs of other prompts, so on what else is in the batch. One
    that depends on the completions of its own prompt does not couple: micro-batches are whole prompts. Such a loss is
    called with the batch's pairs of all ranks; the losses of this rank's count, and its gradients are of all."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """See that what a loss declares exists."""
        super().__init_subclass__(**kwargs)
        check_fields(cls, "requires")
        declared = cls.__dict__.get("columns")
        if isinstance(declared, str) or (isinstance(declared, Iterable) and {*declared} & {*Field}):
            raise TypeError(
                f"Expected `columns` of {cls.__name__} to be a set of the names of data columns but got {declared!r}. "
                "What the models compute belongs to `requires`."
            )

    def __post_init__(self) -> None:
        """Check the arguments; subclasses call `super().__post_init__()` first.

        Raises:
            ValueError: if `beta` is not a positive number.
        """
        positive("beta", self.beta)

    @abstractmethod
    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`, or `(P,)` if `per_prompt`, not reduced: the module takes their mean."""

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """Implicit rewards of both sides, `(B,)` each: β · log π/π_ref (arXiv 2305.18290, eq. 5).

        One definition for all losses, so that ablations compare. Without a reference: β · log π.
        """
        if Field.REFERENCE in self.requires:
            return self.beta * pairs.chosen_logratio, self.beta * pairs.rejected_logratio
        return self.beta * pairs.policy_chosen.total, self.beta * pairs.policy_rejected.total

    # ---- losses made of losses ----

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the parts that are logged along with their sum; see `MixtureLoss`."""
        return ()

    def parts(self, pairs: PairLogps) -> dict[str, Tensor]:
        """Those parts, of the shape of the losses each, unweighted."""
        return {}

    # ---- losses with a memory ----

    def initial_state(self) -> Tensor | None:
        """Return what the loss remembers from step to step, such as a running mean: `(S,)`, float64. None: nothing.

        The module keeps it, checkpoints it, and hands it over as `pairs.state`.
        """
        return None

    def sums(self, pairs: PairLogps) -> Tensor:
        """Sum over a training batch what it adds to the memory, `(S,)`, float64; the number of pairs is one of them.

        The module adds up those of all ranks, however the pairs are shared out among them. A mean could not be put
        together: ranks may have different numbers of pairs.

        Args:
            pairs: the batch of this rank, without gradients.
        """
        raise NotImplementedError(f"Expected {type(self).__name__} to define `sums`, since it has an `initial_state`.")

    def next_state(self, state: Tensor, sums: Tensor) -> Tensor:
        """Return the state after a training batch, which that batch's losses then read; evaluation only reads.

        Args:
            state: `(S,)` before the batch.
            sums: `(S,)` over the pairs of all ranks. By default they are added to the state.
        """
        return state + sums
