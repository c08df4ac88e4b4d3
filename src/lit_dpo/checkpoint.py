"""Checkpoints of adapters: what is in them, what they belong to, and the PEFT directory beside each."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import torch
from lightning.pytorch.core.saving import load_hparams_from_yaml
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO

from lit_dpo.errors import ResumeError, TrainingError
from lit_dpo.policy import adapter_parameters
from lit_dpo.writing import beside, put_in_place, refusals, remove, written_whole

KEY = "lit_dpo"
"""Where a checkpoint holds what `describe` says."""


def describe(module: Any) -> dict[str, Any]:
    """What a checkpoint's adapters belong to, in builtins only, so that `torch.load(weights_only=True)` reads it."""
    policy, loss, reference, trainer = module.policy, module.loss, module.reference, module._trainer
    course = {"lr_scheduler": module.lr_scheduler, "warmup_ratio": module.warmup_ratio}
    if policy.dropout:  # masks are drawn for each row
        course |= {"row_tokens": module.row_tokens}
    if trainer is not None:
        course |= {"gradient_clip_val": trainer.gradient_clip_val, "precision": str(trainer.precision)}
    return {
        "training": course,
        "version": 1,
        "base": policy.identity(),
        "policy": {k: v for k, v in to_builtins(policy).items() if k not in _MAY_CHANGE} | {"adapter": policy.start()},
        "loss": to_builtins(loss),
        "reference": {**to_builtins(reference.bare), "content": reference.bare.content(policy)},
    }


_TRUST = "trust_remote_code"

# Fields of the policy that do not change what is computed, beyond rounding, or that its identity says better.
_MAY_CHANGE = (
    *("gradient_checkpointing", "attention", _TRUST),
    *("model", "revision", "adapter_path", "adapter_base"),
)


def compare(saved: Mapping[str, Any], current: Mapping[str, Any], *, training: bool) -> None:
    """Stop where adapters would be put onto another base, or a run be continued as another one.

    Args:
        saved: `describe` of the checkpoint.
        current: `describe` of what it is loaded into.
        training: a resumed `fit` must agree in loss, reference and adapters too; evaluation may differ in loss.

    Raises:
        ResumeError: listing each difference with both values.
    """
    parts = ("base", "policy", "loss", "reference", "training") if training else ("base",)
    # the same content under another path is the same base
    ignored = {"base.model", "base.revision"}
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
        raise ResumeError(
            "The checkpoint belongs to another run:\n"
            + "\n".join(different)
            + "\nTo continue that run, give these values as they were. To start a new run from its adapter, give "
            "`policy.adapter_path` the directory beside the checkpoint instead of --ckpt_path."
        )


def check_belongs(checkpoint: Mapping[str, Any], here: Mapping[str, Any], *, training: bool) -> None:
    """`compare` a file with what it is loaded into.

    Raises:
        ResumeError: listing what differs, or if the file does not say.
    """
    if KEY not in checkpoint:
        raise ResumeError("Expected a checkpoint of lit_dpo but it does not say what its weights belong to.")
    compare(checkpoint[KEY], here, training=training)


def load_strictly(known: Mapping[str, torch.Tensor], given: dict[str, torch.Tensor], *, training: bool) -> None:
    """Copy into the tensors of a module what a checkpoint has for them.

    Args:
        known: the module's tensors.
        given: the checkpoint's.
        training: it goes on training. Else another loss or reference may evaluate what these trained, and the memory of
            a loss and a reference that moved are left out if they are not known, and a memory stays as it is.

    Raises:
        ResumeError: listing keys that are missing, unknown or of another shape; nothing is copied then.
    """
    if not training:
        given = {name: p for name, p in given.items() if name in known or not _of_training(name)}
        given |= {name: known[name] for name in known.keys() & {"loss_state"} - given.keys()}
    wrong = [f"missing {name}" for name in known.keys() - given.keys()]
    wrong += [f"unknown {name}" for name in given.keys() - known.keys()]
    wrong += [
        f"{name}: {tuple(given[name].shape)} instead of {tuple(known[name].shape)}"
        for name in known.keys() & given.keys()
        if given[name].shape != known[name].shape
    ]
    if wrong:
        raise ResumeError("The checkpoint's adapter does not fit the policy:\n  " + "\n  ".join(sorted(wrong)[:10]))
    with torch.no_grad():
        for name, tensor in known.items():
            tensor.copy_(given[name])


def _of_training(name: str) -> bool:
    return name == "loss_state" or ".reference." in f"{name}."


def random_states(world_size: int) -> list[dict[str, Any]]:
    """The random state of every rank, so that dropout masks continue too. All ranks ask together."""
    mine = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
    if world_size == 1:
        return [mine]
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, mine)
    return gathered


def restore_random_state(states: list[dict[str, Any]], rank: int) -> None:
    """Continue this rank's random state; with another number of ranks or devices there is none to continue."""
    if rank >= len(states):
        return
    torch.set_rng_state(states[rank]["cpu"].cpu())
    if states[rank]["cuda"] and len(states[rank]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states[rank]["cuda"]])


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    flat: dict[str, Any] = {}
    for name, given in nested.items():
        if isinstance(given, Mapping):
            flat |= flatten(given, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = given
    return flat


def configuration(module: Any) -> dict[str, Any]:
    """A module's hyper-parameters as the command line would have written them, wherever it was built.

    A lambda has no name to write; where one was given, a reload takes the default.
    """
    given = dict(module.hparams)
    if "_instantiator" in given:
        return given
    named = {name: to_builtins(value) for name, value in given.items() if not _is_lambda(value)}
    named["_class_path"] = f"{type(module).__module__}.{type(module).__qualname__}"
    return named | {"_instantiator": "lightning.pytorch.cli.instantiate_module"}


def _is_lambda(given: Any) -> bool:
    return getattr(given, "__name__", "") == "<lambda>"


def to_builtins(given: Any) -> Any:
    """Strategies, classes and partials as configuration, `{class_path, init_args}`; the rest as it is or by name."""
    if is_dataclass(given) and not isinstance(given, type):
        arguments = {field.name: to_builtins(getattr(given, field.name)) for field in fields(given) if field.init}
        # the policy is named by its place in the signature, strategies by their class
        if type(given).__name__ == "QLoRAPolicy":
            return arguments
        return {"class_path": _path(type(given)), "init_args": arguments}
    if isinstance(given, functools.partial):
        # jsonargparse wraps a class that it parsed: partial(call, instantiator, Class, **arguments)
        made = next((part for part in reversed(given.args) if isinstance(part, type)), given.func)
        return {"class_path": _path(made), "init_args": {k: to_builtins(v) for k, v in given.keywords.items()}}
    if isinstance(given, Mapping):
        return {str(key): to_builtins(value) for key, value in given.items()}
    if isinstance(given, list | tuple | set):
        return [to_builtins(value) for value in given]
    if given is None or isinstance(given, str | int | float | bool):
        return given
    return _path(given) if hasattr(given, "__qualname__") else repr(given)


def _path(given: Any) -> str:
    return f"{given.__module__}.{given.__qualname__}"


class AdapterModule(pl.LightningModule):
    """A module whose checkpoints hold adapters, and what they belong to.

    The frozen base and reference are named there, not stored.
    """

    model: Any
    policy: Any
    reference: Any
    fresh: bool

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The policy's adapter and whatever a subclass added."""
        model = self._modules.pop("model", None)
        try:
            state: dict[str, Any] = super().state_dict(*args, **kwargs)
        finally:
            self._modules["model"] = model
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        if model is not None:
            names = ("default", "reference") if self.reference.moves else ("default",)
            adapters = (adapter_parameters(model, name) for name in names)
            state.update({f"{prefix}model.{name}": p.detach() for one in adapters for name, p in one.items()})
        return state

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_frozen_is_not_missing)  # type: ignore[no-untyped-call]

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load adapters, strictly: every key must match.

        Raises:
            ResumeError: listing keys that are missing, unknown or of another shape.
        """
        self.configure_model()
        training = self._trainer is not None and self.trainer.state.fn == "fit"
        load_strictly(self.state_dict(keep_vars=True), dict(state_dict), training=training)
        self.fresh = False
        return torch.nn.modules.module._IncompatibleKeys([], [])

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """A module as a checkpoint says it was, with its adapter; see Lightning.

        But no file says that code is run: `trust_remote_code` is false unless it is given here, within `policy=` or
        `reference=`.

        Raises:
            ResumeError: if the base that is there now is not the one that the adapter belongs to.
            PolicyError: if that base comes with code of its own.
        """
        file = kwargs.get("hparams_file", args[1] if len(args) > 1 else None)
        stored = _read(checkpoint_path).get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}) if file is None else _hparams(file)
        kwargs = {name: _without_trust(value) for name, value in stored.items() if _trusts(value)} | kwargs
        module = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        check_belongs(_read(checkpoint_path), describe(module), training=False)
        return module


def _trusts(given: Any) -> bool:
    return bool(given != _without_trust(given))


def _without_trust(given: Any) -> Any:
    """The same, but `trust_remote_code` is false wherever it stands."""
    if isinstance(given, Mapping):
        return {key: key != _TRUST and _without_trust(value) for key, value in given.items()}
    return [_without_trust(value) for value in given] if isinstance(given, list | tuple) else given


def _hparams(file: Any) -> dict[str, Any]:
    return dict(load_hparams_from_yaml(file) if str(file).endswith(("yml", "yaml")) else {})


def _frozen_is_not_missing(module: torch.nn.Module, keys: Any) -> None:
    """A module that is loaded inside another one (a callback's average) lacks what its `state_dict` never holds."""
    held = tuple(module.state_dict())
    keys.missing_keys[:] = [name for name in keys.missing_keys if name.endswith(held)]


def _read(path: Any) -> dict[str, Any]:
    """A checkpoint from wherever Lightning can read one."""
    if hasattr(path, "read"):
        path.seek(0)
        found = dict(torch.load(path, map_location="cpu", weights_only=True))
        path.seek(0)
        return found
    with fsspec.open(str(path), "rb") as stream:
        return dict(torch.load(stream, map_location="cpu", weights_only=True))


class AdapterCheckpointIO(CheckpointIO):
    """Writes each checkpoint whole or not at all, and a PEFT directory of the same name beside it.

    Args:
        inner: the strategy's own plugin.
        on_save: adds to a checkpoint what every file shall say.
        on_load: looks at what a file says.
        export: writes the PEFT directory of a checkpoint.
    """

    def __init__(
        self,
        inner: CheckpointIO,
        on_save: Callable[[dict[str, Any]], None],
        on_load: Callable[[dict[str, Any]], None],
        export: Callable[[dict[str, Any], Path], None],
    ) -> None:
        self.inner, self.on_save, self.on_load, self.export = inner, on_save, on_load, export

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write both to temporary names, then rename: a folder that is there goes, the file comes, its folder comes.

        Raises:
            TrainingError: if the disk refuses; what was there is as it was.
        """
        self.on_save(checkpoint)
        if "://" in str(path):  # a remote store: its own writes are whole
            self.inner.save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        folder = _beside(path)
        if isinstance(self.inner, AsyncCheckpointIO):  # it writes later, and whole
            self.inner.save_checkpoint(checkpoint, path, storage_options)
            self.export(checkpoint, folder)
            return
        check_writable(folder)
        with refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = beside(path, "tmp")
            try:
                self.export(checkpoint, scratch / folder.name)
                self.inner.save_checkpoint(checkpoint, scratch / path.name, storage_options)
                # the file, which is all that a run needs, is there at any moment; its folder only when it is its own
                put_in_place({path: scratch / path.name, folder: scratch / folder.name})
            finally:
                remove(scratch)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> Any:
        """Load; nothing but tensors and builtins is ever in it."""
        checkpoint = self.inner.load_checkpoint(path, map_location, weights_only=True)
        self.on_load(checkpoint)
        return checkpoint

    def teardown(self) -> None:
        """Let the inner plugin finish."""
        self.inner.teardown()

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove both."""
        self.inner.remove_checkpoint(path)
        if "://" not in str(path) and _is_adapter(_beside(Path(path))):
            shutil.rmtree(_beside(Path(path)), ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_suffix("") if path.suffix == ".ckpt" else path.with_name(f"{path.name}-adapter")


def check_writable(directory: Path) -> None:
    """An adapter may replace an adapter, and nothing else.

    Raises:
        TrainingError: if the directory holds something else.
    """
    if directory.exists() and not _is_adapter(directory) and not (directory.is_dir() and not any(directory.iterdir())):
        raise TrainingError(f"Expected to write the adapter to {directory}, but something else is there. Name another.")


def _is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()


def save_adapter(model: Any, tokenizer: Any, directory: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """A PEFT directory with the tokenizer, whole or not at all.

    `AutoPeftModelForCausalLM.from_pretrained(directory)` and `pipeline("text-generation", model=directory)` load it.
    The former loads the commit of the base that it was trained on, the latter the main branch unless given `revision=`.

    Args:
        model: the policy.
        tokenizer: goes along.
        directory: where; an adapter that is there is replaced.
        state: the adapter's weights, as in a module's `state_dict`. None: as they are in `model`. They differ where a
            callback saves averages.

    Raises:
        TrainingError: if something else than an adapter is in the directory, or the disk refuses.
    """
    check_writable(directory)
    with written_whole(directory) as fresh:
        # the embeddings are frozen; "auto" would ask the hub whether the vocabulary grew
        weights = None if state is None else {name.removeprefix("model."): tensor for name, tensor in state.items()}
        model.save_pretrained(fresh, selected_adapters=["default"], save_embedding_layers=False, state_dict=weights)
        tokenizer.save_pretrained(fresh)
