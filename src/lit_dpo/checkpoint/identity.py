"""What a checkpoint belongs to, in builtins, and where two runs differ."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

from lit_dpo.compat import CLASS_PATH, INSTANTIATOR
from lit_dpo.errors import ResumeError
from lit_dpo.versions import CHECKPOINT, check_version

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lit_dpo.module import DPOModule
    from lit_dpo.policy import LoRAPolicy


KEY = "lit_dpo"
"""Where a checkpoint holds what `describe` says."""

REMEDY = (
    "To continue that run, give these values as they were. To go on from it under the new ones, let the trainer have "
    "the callback `ExactResume(changes='accept')`: `--trainer.callbacks+=ExactResume "
    "--trainer.callbacks.changes=accept`. To start a new run from its adapter, give `policy.adapter_path` the "
    "directory next to the checkpoint instead of --ckpt_path."
)

# What the trainer says that changes the schedule of training.
_OF_TRAINER = ("gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches", "limit_train_batches")

_OF_SCHEDULE = ("lr_scheduler", "warmup_ratio", "min_lr_ratio", "decay_ratio")

# Hyper-parameters of a module that stand in other parts; the rest is its class, and what a subclass brings.
_SAID_ELSEWHERE = (
    "policy",
    "loss",
    "reference",
    "optimizer",
    *_OF_SCHEDULE,
    "microbatch_tokens",
    INSTANTIATOR,
)

TRUST = "trust_remote_code"

# Fields of the policy that do not change what is computed, beyond rounding, or that its identity says better.
_MAY_CHANGE = (
    *("gradient_checkpointing", "attention", "kernels", "shard", TRUST),
    *("model", "revision", "adapter_path", "adapter_base"),
)


def describe(module: DPOModule, trainer: pl.Trainer | None = None) -> dict[str, Any]:
    """Say what a checkpoint belongs to, in builtins only, so that `torch.load(weights_only=True)` reads it."""
    policy, loss, reference = module.policy, module.loss, module.reference
    schedule = {name: to_builtins(getattr(module, name)) for name in _OF_SCHEDULE}
    if policy.dropout:  # masks are drawn for each row
        schedule |= {"microbatch_tokens": module.microbatch_tokens}
    if trainer is not None:
        schedule |= {
            "precision": str(trainer.precision),
            # the digest of the encoded pairs stands for file, order, columns, truncation and tokenizer
            "data": getattr(getattr(trainer, "datamodule", None), "train_digest", None),
        }
        schedule |= {name: _plain(getattr(trainer, name)) for name in _OF_TRAINER}
    return {
        "training": schedule,
        "module": {name: value for name, value in configuration(module).items() if name not in _SAID_ELSEWHERE},
        "version": CHECKPOINT,
        "base": policy.checkpoint_identity(),
        "policy": _policy(policy),
        "loss": to_builtins(loss),
        # a reference that is remembered is the one that computes
        "reference": {**to_builtins(reference.unwrapped), "content": reference.unwrapped.checkpoint_identity(policy)},
    }


def _policy(policy: LoRAPolicy) -> dict[str, Any]:
    """Its class and the fields that change what is computed, and the adapter that it started from."""
    said = to_builtins(policy)
    kept = {name: value for name, value in said["init_args"].items() if name not in _MAY_CHANGE}
    return {"class_path": said["class_path"], **kept, "adapter": policy.adapter_digest()}


def describe_steps(module: DPOModule) -> dict[str, Any]:
    """How the steps of a run are made: its optimizer as it was configured, and the length of its schedule.

    Asked for before a checkpoint's state is put into the optimizer, which would overwrite what was configured.
    """
    (optimizer,) = module.trainer.optimizers[:1] or (None,)
    groups = [] if optimizer is None else optimizer.param_groups
    return {
        "optimizer": _path(type(getattr(optimizer, "optimizer", optimizer))),
        "groups": [
            {name: _plain(given) for name, given in group.items() if name not in ("params", "lr", "initial_lr")}
            # as it was configured: `lr` itself is where a schedule has moved it by then
            | {"lr": _plain(group.get("initial_lr", group.get("lr")))}
            for group in groups
        ],
        "schedule": module.schedule_steps,
    }


def _plain(given: object) -> Any:
    given = getattr(given, "value", given)  # of an enum
    return given.tolist() if isinstance(given, torch.Tensor) else to_builtins(given)


def compare_steps(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Say how steps are made differently, a sentence each; of the optimizer's settings those that both sides have."""
    found = []
    # the class first: one optimizer's state loads into another of the same fields without an error
    if saved["optimizer"] != current["optimizer"]:
        found.append(f"it was trained with {saved['optimizer']} but the configuration says {current['optimizer']}")
    elif len(saved["groups"]) != len(current["groups"]):
        found.append(f"its optimizer had {len(saved['groups'])} groups but has {len(current['groups'])} now")
    else:
        for there, here in zip(saved["groups"], current["groups"], strict=True):
            # by the names that both have: releases of torch, and optimizers of others, differ in them
            found += [
                f"it was trained with {name}={there[name]} but the configuration says {here[name]}"
                for name in there.keys() & here.keys()
                if there[name] != here[name]
            ]
    if saved["schedule"] != current["schedule"]:
        found.append(
            f"its learning rate's schedule had {saved['schedule']} steps but has {current['schedule']} now "
            "(`max_epochs`, `max_steps`, `lr_scheduler`)"
        )
    return found


def compare(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, training: bool, parts: Sequence[str] | None = None
) -> None:
    """Stop where adapters would be put onto another base, or a run be continued as another one.

    Args:
        saved: `describe` of the checkpoint.
        current: `describe` of what it is loaded into.
        training: a resumed `fit` must agree in loss, reference and adapters too; evaluation may differ in loss.
        parts: what to compare, by default all of it.

    Raises:
        ResumeError: listing each difference with both values.
    """
    if parts is None:
        parts = ("base", "policy", "loss", "reference", "training", "module") if training else ("base",)
    # the same content under another path is the same base
    ignored = {"base.model", "base.revision"}
    # and a reference that is known by its content may lie elsewhere too
    if saved.get("reference", {}).get("content"):
        ignored |= {f"reference.init_args.{name}" for name in (*_MAY_CHANGE, "path")}
    there, here = (flatten({part: side.get(part, {}) for part in parts}) for side in (saved, current))
    # commits are compared where both sides are of a hub; a directory is known by its content
    ignored |= {name for name in there.keys() ^ here.keys() if name.endswith(".commit")}
    different = [
        f"  {name}: {there.get(name)!r} in the checkpoint, {here.get(name)!r} now"
        for name in sorted(there.keys() | here.keys())
        if name not in ignored and there.get(name) != here.get(name)
    ]
    if different:
        raise ResumeError("The checkpoint belongs to another run:\n" + "\n".join(different) + f"\n{REMEDY}")


def check_belongs(
    checkpoint: Mapping[str, Any], here: Mapping[str, Any], *, training: bool, parts: Sequence[str] | None = None
) -> None:
    """`compare` a file with what it is loaded into.

    Raises:
        ResumeError: listing what differs, or if the file does not say.
    """
    if KEY not in checkpoint:
        raise ResumeError("Expected a checkpoint of lit_dpo but it does not say what its weights belong to.")
    compare(checkpoint[KEY], here, training=training, parts=parts)


def check_readable(checkpoint: Mapping[str, Any], file: object) -> None:
    """See that a file is of a format that is known here; one that is no checkpoint of ours is refused elsewhere.

    Raises:
        VersionError: for one that a newer release has written.
    """
    said = checkpoint.get(KEY)
    if isinstance(said, Mapping):
        check_version(said.get("version"), CHECKPOINT, file)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    flat: dict[str, Any] = {}
    for name, given in nested.items():
        if isinstance(given, Mapping):
            flat |= flatten(given, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = given
    return flat


def configuration(module: DPOModule) -> dict[str, Any]:
    """Write a module's hyper-parameters as the command line would have, wherever it was built.

    A lambda has no name to write; where one was given, a reload takes the default.
    """
    given = dict(module.hparams)
    if INSTANTIATOR in given:  # LightningCLI, or an earlier call, has written the class
        return {name: to_builtins(value) for name, value in given.items()}
    named = {name: to_builtins(value) for name, value in given.items() if not _is_lambda(value)}
    # so that `load_from_checkpoint` of any class builds the one that was trained
    named[CLASS_PATH] = f"{type(module).__module__}.{type(module).__qualname__}"
    return named | {INSTANTIATOR: "lightning.pytorch.cli.instantiate_module"}


def _is_lambda(given: object) -> bool:
    return getattr(given, "__name__", "") == "<lambda>"


def to_builtins(given: object) -> Any:
    """Strategies, classes and partials as configuration, `{class_path, init_args}`; the rest as it is or by name."""
    if is_dataclass(given) and not isinstance(given, type):
        arguments = {field.name: to_builtins(getattr(given, field.name)) for field in fields(given) if field.init}
        return {"class_path": _path(type(given)), "init_args": arguments}
    if isinstance(given, functools.partial):
        # jsonargparse wraps a class that it parsed: partial(call, instantiator, Class, **arguments)
        made = next((part for part in reversed(given.args) if isinstance(part, type)), given.func)
        return {"class_path": _path(made), "init_args": {k: to_builtins(v) for k, v in given.keywords.items()}}
    if isinstance(given, Mapping):
        return {str(key): to_builtins(value) for key, value in given.items()}
    if isinstance(given, set | frozenset):  # in an order that the next process has too
        return sorted((to_builtins(value) for value in given), key=repr)
    if isinstance(given, list | tuple):
        return [to_builtins(value) for value in given]
    if given is None or isinstance(given, str | int | float | bool):
        return given
    return _path(given) if hasattr(given, "__qualname__") else repr(given)


def _path(given: Any) -> str:
    return f"{given.__module__}.{given.__qualname__}"
