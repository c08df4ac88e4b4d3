"""Whether a loss gets what it reads: a reference, and columns of the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_dpo.data.batch import ROW_FIELDS
from lit_dpo.errors import DataError, PolicyError, TrainingError
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.policy.limits import Limits, limits, policy_limits
from lit_dpo.references.adapter import NoReference, default_reference
from lit_dpo.references.base import Reference
from lit_dpo.references.cache import CachedReference
from lit_dpo.references.model import ModelReference

if TYPE_CHECKING:
    from lit_dpo.policy import LoRAPolicy


def resolve_reference(reference: Reference | None, loss: PreferenceLoss, policy: LoRAPolicy) -> Reference:
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
    names = {"kl": "whole distribution", "reference_per_token": "log-probs per token"}
    given = {"reference_per_token" if name == "per_token" else name for name in reference.gives}
    if lacking := [said for name, said in names.items() if name in loss.needs - given]:
        remedy = f"Use {reference.unwrapped} itself" if reference.unwrapped != reference else "Use another reference"
        raise PolicyError(f"{loss} reads the reference's {' and '.join(lacking)}, which {reference} has not. {remedy}.")
    return reference


def check_rows(loss: PreferenceLoss, row_fields: Mapping[str, frozenset[str]]) -> None:
    """What the loss reads of the rows is there; what nothing reads is said.

    Args:
        loss: of the run.
        row_fields: by split, those of `ROW_FIELDS` that its rows have.

    Raises:
        DataError: naming the split, the field and the option that brings it.
    """
    from lightning.pytorch.utilities import rank_zero_info

    name, wanted = type(loss).__name__, loss.needs & frozenset(ROW_FIELDS)
    for split, there in row_fields.items():
        if lacking := sorted(wanted - there):
            raise DataError(
                f"{split}: {name} reads the rows' {', '.join(lacking)} but they have none. "
                + " ".join(f"Name the column: --data.format.{field} COLUMN." for field in lacking)
            )
        if unread := sorted(there - wanted - {"weight"}):
            rank_zero_info(f"{split}: {name} does not read the rows' {', '.join(unread)}")


def check_strategy(strategy: Any) -> None:
    """Gradients are brought together over ranks, and parameters are whole.

    Args:
        strategy: the trainer's.

    Raises:
        TrainingError: for a strategy that shards, or leaves synchronising gradients to the module.
    """
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

    # DeepSpeed's is a subclass of DDP's, and shards
    if isinstance(strategy, DeepSpeedStrategy) or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise TrainingError(
            f"Expected a strategy with whole parameters on every rank (`auto`, `ddp`) but got "
            f"{type(strategy).__name__}: it shards them, or leaves it to the module to bring gradients together, and "
            "adapters would differ from rank to rank."
        )


def check_run(module: Any, trainer: Any, *, weights: bool = True) -> None:
    """Find what is wrong with strategy, loss, policy and reference before a weight is read.

    Args:
        module: of the run.
        trainer: of the run.
        weights: whether the policy's must be there.

    Raises:
        TrainingError: for the strategy.
        DataError: for rows that lack what the loss reads, or tokens that policy or reference cannot read.
        PolicyError: for a policy or reference that cannot be loaded.
    """
    check_strategy(trainer.strategy)
    if module.model is not None and not module.configured:
        raise PolicyError(
            f"`model` of {type(module).__name__} was set by hand, so that its checkpoints would name another base, "
            f"{module.policy.model!r}. Give the model to the policy: `DPOModule(LoRAPolicy.from_model(model))`."
        )
    if not trainer.predicting:
        check_rows(module.loss, getattr(getattr(trainer, "datamodule", None), "row_fields", {}))
    if module.model is None:
        module.policy.check(weights=weights)
        module.reference.check(module.policy)
    check_tokens = getattr(getattr(trainer, "datamodule", None), "check_tokens", None)
    if check_tokens is not None:
        for name, found in _limits(module):
            check_tokens(*found, model=name)


def _limits(module: Any) -> Iterator[tuple[str, Limits]]:
    """Of the policy, and of a reference that is a model of its own."""
    loaded = module.model is not None
    yield repr(module.policy.model), limits(module.model) if loaded else policy_limits(module.policy)
    if isinstance(module.reference.unwrapped, ModelReference):
        yield f"the reference {module.reference.unwrapped.model!r}", module.reference.unwrapped.limits()
