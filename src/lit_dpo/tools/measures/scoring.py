"""A fitted policy as it scores held-out comparisons, next to one reference; all of it is then as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_dpo.checkpoint import random_state, restore_random_state
from lit_dpo.data.batch import CompletionBatch
from lit_dpo.data.budget import BudgetSampler
from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.data.sampler import PromptSampler
from lit_dpo.errors import DataError, PolicyError, TrainingError
from lit_dpo.logps.fields import Field
from lit_dpo.logps.records import PairLogps
from lit_dpo.losses import PreferenceLoss
from lit_dpo.policy.adapters import REFERENCE
from lit_dpo.references import AdapterReference, BaseReference, CachedReference, Reference
from lit_dpo.references.adapter import default_reference

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lit_dpo.data.table import PromptTable
    from lit_dpo.module import DPOModule

_KEPT = ("lit_dpo_cache", "lit_dpo_reference")  # what references keep next to a policy


class Scored(NamedTuple):
    """A batch of held-out comparisons, and what policy and reference say of it, on the CPU, without gradients.

    Attributes:
        set: name of the validation set; `""` where there is only one.
        batch: of comparisons.
        prompts: `(B,)` the number of each one's prompt: of its tokens, so that it is the same in every set.
        sources: what each one's source is called.
        pairs: the record.
    """

    set: str
    batch: CompletionBatch
    prompts: NDArray[np.int64]
    sources: list[str]
    pairs: PairLogps


def the_reference(module: DPOModule, reference: Reference | None) -> Reference:
    """Choose what is compared with: the given one, or else the module's own, or else where the policy started.

    Raises:
        PolicyError: for a reference that follows another policy, or one that cannot be made any more.
    """
    own = module.reference
    if reference is None:
        reference = own if Field.REFERENCE in own.provides else default_reference(module.policy)
    if isinstance(reference, CachedReference) and reference.reference is None:
        reference = replace(reference, reference=default_reference(module.policy))
    if reference == own:
        return own
    if reference.unwrapped == own.unwrapped and not isinstance(own.unwrapped, BaseReference):
        return own  # the same numbers, and it is there already
    if reference.follows_policy:
        raise PolicyError(f"Expected a reference that stays as it is, to measure by, but got {reference}.")
    inner, policy = reference.unwrapped, module.policy
    in_no_file = policy.starts_from_adapter and policy.adapter_path is None
    if isinstance(inner, AdapterReference) and inner.path is None and in_no_file:
        raise PolicyError(
            "Expected the adapter that the policy started from, to measure by, but it came with a model in memory and "
            "has been trained since. Save it, and give its folder as `policy.adapter_path`."
        )
    return reference


@contextmanager
def compared_with(module: DPOModule, reference: Reference) -> Iterator[None]:
    """Let a module have another reference for a while.

    Args:
        module: configured.
        reference: by `the_reference`.
    """
    model, own = module.model, module.reference
    before = {name: model.__dict__[name] for name in _KEPT if name in model.__dict__}
    adapters = set(model.peft_config)
    try:
        if reference != own:
            reference.attach(model, module.policy)
            module.reference = reference
        yield
    finally:
        module.reference = own
        if REFERENCE in set(model.peft_config) - adapters:
            model.delete_adapter(REFERENCE)
        for name in _KEPT:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)


@contextmanager
def measuring(module: DPOModule) -> Iterator[None]:
    """Run a module where and as its trainer runs it, in evaluation; mode, device and random states are then as before.

    Args:
        module: a policy in training or not, also after `fit`, when Lightning has moved it to the CPU.
    """
    module.configure_model()
    trainer = _trainer(module)
    before, training, home = random_state(), module.model.training, next(module.model.parameters()).device
    there = home if trainer is None else trainer.strategy.root_device
    with ExitStack() as stack:
        # what a trainer's evaluation wraps around it would forbid gradients of the losses
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(nullcontext() if trainer is None else trainer.precision_plugin.val_step_context())
        try:
            if there != home:
                module.to(there)
            module.model.eval()
            yield
        finally:
            module.model.train(training)
            if there != home:
                module.to(home)
            restore_random_state([before], 0)


def _trainer(module: DPOModule) -> pl.Trainer | None:
    with suppress(RuntimeError):
        return module.trainer if module.fabric is None else None
    return None


@dataclass(frozen=True)
class _Reading(PreferenceLoss):
    """Stands in a module for all losses that it is measured by: what they read is computed."""

    fields: frozenset[Field] = frozenset()

    @property
    def requires(self) -> frozenset[Field]:  # type: ignore[override]
        """What any of them reads."""
        return self.fields

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Nothing is trained with it."""
        raise NotImplementedError


def scored(module: DPOModule, data: PreferenceDataModule, fields: frozenset[Field]) -> Iterator[Scored]:
    """Score all held-out comparisons, as `lit-dpo predict` does, batch by batch in the order of the data.

    Args:
        module: within `measuring` and `compared_with`.
        data: with validation data.
        fields: what is read of the records.

    Raises:
        DataError: if there are no validation data.
        TrainingError: if a `pair_logps` of one's own makes other pairs than the data have.
    """
    own = module.loss
    try:
        module.loss = _Reading(fields=fields)
        for name, table in held_out(data).items():
            called, keys = _names(name, table), table.prompt_keys
            for indices in _batches(table, data):
                batch = table.batch(indices)
                pairs = on_cpu(module.batch_logps(batch.to(module.device)).detach())
                if len(pairs.policy_chosen.total) != batch.size:
                    raise TrainingError(
                        f"Expected {batch.size} pairs of a batch's comparisons but {type(module).__name__}.pair_logps "
                        f"made {len(pairs.policy_chosen.total)}: a row of the table is a comparison of the data."
                    )
                prompts = np.repeat(keys[indices], batch.comparisons_per_prompt.numpy())
                sources = [called[table.find(row)[0]] for row in batch.indices.tolist()]
                yield Scored(name, batch, prompts, sources, pairs)
    finally:
        module.loss = own


def held_out(data: PreferenceDataModule) -> dict[str, PromptTable]:
    """Return the validation sets by name, `""` for the only one.

    Raises:
        DataError: if there are none, or the data module is of another kind.
    """
    if not isinstance(data, PreferenceDataModule):
        raise DataError(
            f"Expected a PreferenceDataModule, whose held-out pairs are known, but got {type(data).__name__}."
        )
    found: dict[str, PromptTable] = {}
    sources = [source for name, source in data.sources.items() if name.partition("/")[0] == "val"]
    if data.val_split or any(source is not None for source in sources):
        data.setup("validate")
        tables = {name.partition("/"): table for name, table in data.tables.items()}
        found = {name: table for (split, _, name), table in tables.items() if split == "val"}
    if not any(table.size for table in found.values()):
        raise DataError(
            "Expected held-out comparisons to measure by but there are none: name a file with `--data.val`, or hold a "
            "part of the training prompts out with `--data.val_split 0.1`."
        )
    return found


def _batches(table: PromptTable, data: PreferenceDataModule) -> Iterator[list[int]]:
    if data.max_tokens is not None:
        return iter(BudgetSampler(table.lengths, data.max_tokens, data.eval_batch_size, shuffle=False))
    assert data.eval_batch_size is not None
    return iter(PromptSampler(table.lengths, data.eval_batch_size, shuffle=False))


def _names(name: str, table: PromptTable) -> list[str]:
    """Call the sources of a set by the last part of a path where that tells them apart."""
    if name and len(table.sources) == 1:
        return [name]
    whole = [source.name for source in table.sources]
    short = [one.replace("\\", "/").rsplit("/", 1)[-1] for one in whole]
    return short if len(set(short)) == len(set(whole)) else whole


def on_cpu(record: Any) -> Any:
    """Copy the tensors of a record, of dictionaries and records in it, to the CPU."""
    if isinstance(record, Tensor):
        return record.cpu()
    if isinstance(record, dict):
        return {name: on_cpu(one) for name, one in record.items()}
    return type(record)(*(on_cpu(one) for one in record)) if isinstance(record, tuple) else record
