"""Which reference a run has."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lit_dpo.errors import PolicyError
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.references.adapter import NoReference, default_reference
from lit_dpo.references.base import Reference
from lit_dpo.references.cache import CachedReference

if TYPE_CHECKING:
    from lit_dpo.policy import QLoRAPolicy


def resolve_reference(reference: Reference | None, loss: PreferenceLoss, policy: QLoRAPolicy) -> Reference:
    """The reference that was asked for, or else the right one, if the loss can go with it.

    Raises:
        PolicyError: if the loss reads a reference and there is none, reads none and there is one, or reads what this
            one does not have.
    """
    if isinstance(reference, CachedReference) and reference.reference is None:
        reference = replace(reference, reference=default_reference(policy))
    if reference is None:
        reference = default_reference(policy) if loss.needs_reference else NoReference()
    if loss.needs_reference == isinstance(reference, NoReference):
        wanted = "needs a reference" if loss.needs_reference else "reads no reference"
        raise PolicyError(f"{loss} {wanted} but got {reference}. Leave `reference` out.")
    if lacking := loss.needs & frozenset({"kl", *(("tokens",) if loss.needs_reference else ())}) - reference.gives:
        raise PolicyError(f"{loss} reads {', '.join(sorted(lacking))} of the reference, which {reference} has not.")
    return reference
