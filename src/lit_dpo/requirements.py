"""Whether a loss gets what it reads: a reference, and columns of the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_dpo.data.batch import KNOWN_COLUMNS
from lit_dpo.errors import DataError, PolicyError, TrainingError
from lit_dpo.logps.fields import OF_REFERENCE, Field
from lit_dpo.logps.records import CompletionLogps, SequenceLogps, column_remedy
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.composed import within
from lit_dpo.policy.limits import Limits, limits, policy_limits
from lit_dpo.references.adapter import NoReference, default_reference
from lit_dpo.references.base import Reference
from lit_dpo.references.cache import CachedReference
from lit_dpo.references.model import ModelReference

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import Strategy

    from lit_dpo.module import DPOModule
    from lit_dpo.policy import LoRAPolicy


def resolve_reference(reference: Reference | None, loss: PreferenceLoss, policy: LoRAPolicy) -> Reference:
    """Choose the reference that was asked for, or else the right one, if the loss can go with it.

    Raises:
        PolicyError: if the loss reads a reference and there is none, reads none and there is one, or reads what this
            one does not have.
    """
    if isinstance(reference, CachedReference) and reference.reference is None:
        reference = replace(reference, reference=default_reference(policy))
    wanted = Field.REFERENCE in loss.requires
    if reference is None:
        reference = default_reference(policy) if wanted else NoReference()
    if wanted != (Field.REFERENCE in reference.provides):
        what = "needs a reference" if wanted else "reads no reference"
        raise PolicyError(f"{loss} {what} but got {reference}. Leave `reference` out.")
    names = {Field.KL: "whole distribution", Field.REFERENCE_PER_TOKEN: "log-probs per token"}
    if lacking := loss.requires & OF_REFERENCE - reference.provides:
        said = " and ".join(name for field, name in names.items() if field in lacking)
        remedy = "Use another reference"
        if reference.unwrapped != reference:
            remedy = f"Use {reference.unwrapped} itself"
        raise PolicyError(f"{loss} reads the reference's {said}, which {reference} has not. {remedy}.")
    return reference


def check_columns(loss: PreferenceLoss, columns: Mapping[str, frozenset[str]]) -> None:
    """See that what the loss reads of the data is there; say what nothing reads.

    Args:
        loss: of the run.
        columns: by split, the names of its columns of numbers.

    Raises:
        DataError: naming the split, the column and the option that brings it.
    """
    from lightning.pytorch.utilities import rank_zero_info

    name = type(loss).__name__
    for split, there in columns.items():
        if lacking := sorted(loss.columns - there):
            raise DataError(
                f"{split}: {name} reads the rows' {', '.join(lacking)} but they have none. "
                + " ".join(column_remedy(column) for column in lacking)
            )
        # other columns may be for metrics, or for whoever reads the predictions
        if unread := sorted(there & {*KNOWN_COLUMNS} - loss.columns - {"weight"}):
            rank_zero_info(f"{split}: {name} does not read the rows' {', '.join(unread)}")


_INSTEAD = "To spread a base over devices, take `ddp` and `policy.shard: node` or `all`: adapters stay whole."
_REFUSED = {
    "DeepSpeedStrategy": (
        "it keeps gradients to itself, out of reach of the mean over a step's pairs, and its checkpoints are pickles "
        "without the run's identity. Stages 1 and 2 would spread the adapters' optimizer state alone, which is small; "
        "stage 3 makes parameters of size 0, which weights cannot be read into"
    ),
    "FSDPStrategy": (
        "it flattens adapters and base into one tensor, so that adapters have neither gradients nor files of their own"
    ),
    "ModelParallelStrategy": (
        "it leaves sharding to the module and its checkpoints to itself: adapters that are sharded are neither "
        "exported nor resumed exactly, and each batch must run in one piece"
    ),
}
_TENSOR_PARALLEL = (
    "the devices of a tensor group compute one batch together, but each would be given a batch of its own, and PEFT's "
    "adapters on row-wise layers (`o_proj`, `down_proj`) fail on it. A group must be of one device"
)


def check_strategy(strategy: Strategy | str) -> None:
    """Gradients are brought together over ranks, and what trains is whole on each.

    Args:
        strategy: the trainer's, or the name that one is asked for by.

    Raises:
        TrainingError: for a strategy that shards, or leaves synchronising gradients to the module; it says why, and
            what to take.

    Example:
        >>> check_strategy("ddp")
        >>> check_strategy("deepspeed_stage_3")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lit_dpo.errors.TrainingError: Expected a strategy with whole adapters on every rank ... but got ...
    """
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

    if isinstance(strategy, str):
        names = {"deepspeed": "DeepSpeedStrategy", "fsdp": "FSDPStrategy"}
        kind = next((name for start, name in names.items() if strategy.startswith(start)), None)
        if kind is None:
            return
    # DeepSpeed's is a subclass of DDP's, and shards
    elif isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy):
        return
    else:
        kind = next((base.__name__ for base in type(strategy).__mro__ if base.__name__ in _REFUSED), "")
    reason = _TENSOR_PARALLEL if _is_tensor_parallel(strategy) else _REFUSED.get(kind)
    reason = reason or "it shards parameters, or leaves it to the module to bring gradients together"
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    raise TrainingError(
        f"Expected a strategy with whole adapters on every rank (`auto`, `ddp`) but got {name}: {reason}. {_INSTEAD}"
    )


def _is_tensor_parallel(strategy: Strategy | str) -> bool:
    """Whether groups of several devices share each matrix; known once a strategy has met its processes."""
    try:
        mesh = getattr(strategy, "device_mesh", None)
    except RuntimeError:  # not yet
        return False
    names = getattr(mesh, "mesh_dim_names", None) or ()
    return mesh is not None and "tensor_parallel" in names and mesh["tensor_parallel"].size() > 1


def check_wrapped(trainer: pl.Trainer) -> None:
    """See that what the strategy has made of the module can do what the trainer will ask of it.

    Raises:
        TrainingError: for a static graph with accumulation, which PyTorch's DDP ends in an internal error.
    """
    if trainer.accumulate_grad_batches > 1 and getattr(trainer.strategy.model, "static_graph", False):
        raise TrainingError(
            "Expected `static_graph` to be left out of DDPStrategy with `accumulate_grad_batches` "
            f"{trainer.accumulate_grad_batches}: PyTorch fails on the second batch of a step. Or accumulate within a "
            "batch: a larger `data.batch_size`, with `model.microbatch_tokens`."
        )


def check_run(module: DPOModule, trainer: pl.Trainer, *, weights: bool = True) -> None:
    """Find what is wrong with strategy, loss, policy and reference before a weight is read.

    Args:
        module: of the run.
        trainer: of the run.
        weights: whether the policy's must be there.

    Raises:
        TrainingError: for the strategy.
        DataError: for rows that lack what the loss reads, comparisons that it cannot use, or tokens that policy or
            reference cannot read.
        PolicyError: for a policy or reference that cannot be loaded.
    """
    check_strategy(trainer.strategy)
    if module.model is not None and not module.configured:
        raise PolicyError(
            f"`model` of {type(module).__name__} was set by hand, so that its checkpoints would name another base, "
            f"{module.policy.model!r}. Give the model to the policy: `DPOModule(LoRAPolicy.from_model(model))`."
        )
    if not trainer.predicting:
        check_columns(module.loss, getattr(getattr(trainer, "datamodule", None), "columns", {}))
        check_lists = getattr(getattr(trainer, "datamodule", None), "check_lists", None)
        if check_lists is not None and (over_lists := [one for one in within(module.loss) if one.per_prompt]):
            check_lists(partial(_ask, over_lists))
    if module.model is None:
        module.policy.check(weights=weights)
        module.reference.check(module.policy)
    check_tokens = getattr(getattr(trainer, "datamodule", None), "check_tokens", None)
    if check_tokens is not None:
        for name, found in _limits(module):
            check_tokens(*found, model=name)


def _ask(losses: Sequence[PreferenceLoss], counts: Tensor, comparisons: Tensor, compared: Tensor) -> None:
    """Have losses look at lists whose log-probs are all 0."""
    zeros = torch.zeros(int(counts.sum()))
    alike = SequenceLogps(zeros, zeros + 1, zeros)
    pairs = CompletionLogps(alike, alike, alike.length.long(), counts, comparisons, compared).pairs()
    for loss in losses:
        loss(pairs)


def _limits(module: DPOModule) -> Iterator[tuple[str, Limits]]:
    """Of the policy, and of a reference that is a model of its own."""
    loaded = module.model is not None
    yield repr(module.policy.model), limits(module.model) if loaded else policy_limits(module.policy)
    if isinstance(module.reference.unwrapped, ModelReference):
        yield f"the reference {module.reference.unwrapped.model!r}", module.reference.unwrapped.limits()
