"""What all runs of an ablation share of their reference: one pass over the data, before the first run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace

from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.errors import PolicyError
from lit_dpo.logps.fields import Field
from lit_dpo.logps.microbatch import microbatches
from lit_dpo.module import DPOModule
from lit_dpo.references import CachedReference, NoReference, Reference, default_reference
from lit_dpo.requirements import check_run

_CACHED = "lit_dpo.references.CachedReference"
_ORDER = ("batch_size", "eval_batch_size", "max_tokens", "num_workers", "seed")
"""Options of the data that change no completion, but for `seed` with `val_split`."""


class Shared(NamedTuple):
    """How a run takes part."""

    arguments: list[str]
    """More of them, for its reference to be read."""
    key: str | None
    """Runs with the same one need one pass. None: it cannot be read."""
    measures_alone: bool = False
    """Whether training reads none: the pass is for what is measured on the held-out pairs."""
    why_not: str = ""


def share(module: Any, config: Namespace, cache: Path) -> Shared:
    """Say how a run's reference is read instead of computed.

    Args:
        module: of the run, built, without weights.
        config: its whole configuration.
        cache: where the log-probs go.
    """
    if not isinstance(module, DPOModule):
        return Shared([], None, why_not=f"{type(module).__name__} may have none")
    reference = module.reference
    if isinstance(reference, NoReference):
        return Shared([], _key(measured_by(module, cache), module, config), measures_alone=True)
    if isinstance(reference, CachedReference):  # the user's own, and place
        return Shared([], _key(reference, module, config))
    if reference.follows_policy:
        return Shared([], None, why_not=f"{type(reference).__name__} follows the policy")
    if Field.KL in module.loss.requires:
        return Shared([], None, why_not=f"{type(module.loss).__name__} reads the reference's whole distribution")
    per_token = Field.REFERENCE_PER_TOKEN in reference.provides
    try:
        key = _key(reference, module, config)
    except PolicyError as error:
        return Shared([], None, why_not=str(error))
    given: dict[str, Any] = {"directory": str(cache)}
    if not per_token:
        given["per_token"] = False
    typed = config.model.init_args.get("reference")
    if typed is not None:
        given["reference"] = plain(typed)
    return Shared([f"--model.reference={json.dumps({'class_path': _CACHED, 'init_args': given})}"], key)


def measured_by(module: DPOModule, cache: Path) -> Reference:
    """Choose the reference that a fitted run is measured against: its own, or where it has none its base."""
    if not isinstance(module.reference, NoReference):
        return module.reference
    return CachedReference(default_reference(module.policy), str(cache))


def _key(reference: Reference, module: DPOModule, config: Namespace) -> str:
    data = plain(config.data)
    options = dict(data.get("init_args") or {})
    split = options.get("val_split")
    data["init_args"] = {n: value for n, value in options.items() if n not in _ORDER or (n == "seed" and split)}
    place = {name: str(config.trainer.get(name)) for name in ("accelerator", "precision", "plugins")}
    found = [reference.cache_identity(module.policy), module.policy.dtype, place, data]
    return json.dumps(found, sort_keys=True, default=str)


def plain(value: Any) -> Any:
    """Turn a configuration into builtins, without where parts of it were read."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items() if not str(key).startswith("__")}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def fill(module: DPOModule, data: pl.LightningDataModule, trainer: pl.Trainer, cache: Path) -> int:
    """Let a run's reference see all completions of training and validation once; how many batches those were.

    Args:
        module: built as for the run.
        data: likewise.
        trainer: likewise; it does not run.
        cache: for a module without a reference.
    """
    trainer.strategy.connect(module)
    module.trainer = data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    check_run(module, trainer)
    module.configure_model()
    reference = measured_by(module, cache)
    if reference is not module.reference:
        reference.attach(module.model, module.policy)
    module.model.eval()
    device, count = trainer.strategy.root_device, 0
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        for batch in _batches(data, train=reference is module.reference):
            moved = batch.to(device)
            for part in microbatches(moved, module.microbatch_limit, module.prompt_limit):
                reference.logps(module.model, part)
            count += 1
    return count


def _batches(data: pl.LightningDataModule, *, train: bool) -> Iterator[Any]:
    """All batches of validation, and those of an epoch of training that is no stream."""
    loaders = data.val_dataloader()
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    loaders = list(loaders) if isinstance(loaders, list | tuple) else [loaders]
    if train and not (isinstance(data, PreferenceDataModule) and data.streaming):
        loaders.append(data.train_dataloader())
    for loader in loaders:
        yield from loader
