"""A module whose checkpoints hold adapters, and what they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fsspec
import lightning.pytorch as pl
import torch
from lightning.pytorch.core.saving import load_hparams_from_yaml

from lit_dpo.checkpoint.identity import TRUST, check_belongs, describe
from lit_dpo.errors import ResumeError
from lit_dpo.policy import adapter_parameters


class AdapterModule(pl.LightningModule):
    """A module whose checkpoints hold adapters, and what they belong to.

    The frozen base and reference are named there, not stored.
    """

    model: Any
    policy: Any
    reference: Any
    fresh: bool
    accepts_changes = False
    """Whether what is loaded may be of a run with another loss or reference."""

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
        training = self._trainer is not None and self.trainer.state.fn == "fit" and not self.accepts_changes
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


def _trusts(given: Any) -> bool:
    return bool(given != _without_trust(given))


def _without_trust(given: Any) -> Any:
    """The same, but `trust_remote_code` is false wherever it stands."""
    if isinstance(given, Mapping):
        return {key: key != TRUST and _without_trust(value) for key, value in given.items()}
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
