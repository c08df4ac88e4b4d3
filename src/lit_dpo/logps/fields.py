"""What losses require and references provide: one vocabulary, so that a word that nobody knows is an error."""

from __future__ import annotations

from enum import StrEnum


class Field(StrEnum):
    """What of a record is not always there. Losses say what they require, references what they provide."""

    REFERENCE = "reference"
    """Log-probs of whole completions under the reference: `reference_chosen` and `reference_rejected`."""

    PER_TOKEN = "per_token"
    """Log-probs per token under the policy. The policy always provides them."""

    REFERENCE_PER_TOKEN = "reference_per_token"
    """Log-probs per token under the reference."""

    COLLISION = "collision"
    """log Σ π² over the vocabulary at each token, under the policy; computed if a loss requires it."""

    KL = "kl"
    """KL(π_ref ‖ π) over the vocabulary at each token; computed if a loss requires it, from both models."""


OF_REFERENCE = frozenset({Field.REFERENCE, Field.REFERENCE_PER_TOKEN, Field.KL})
"""Those that a reference has to provide; the policy provides the others."""


def check_fields(owner: type, name: str) -> None:
    """See that a class declares members of `Field` and nothing else, where it declares them as a plain value.

    Args:
        owner: the class.
        name: of the attribute, `requires` or `provides`.

    Raises:
        TypeError: naming the class, what it says, and what there is.
    """
    given = owner.__dict__.get(name)
    if given is None or hasattr(given, "__get__"):  # inherited, or a property, which says it of an object
        return
    if not isinstance(given, frozenset) or not all(isinstance(one, Field) for one in given):
        known = ", ".join(f"Field.{one.name}" for one in Field)
        raise TypeError(f"Expected `{name}` of {owner.__name__} to be a frozenset of {known}, but got {given!r}.")
