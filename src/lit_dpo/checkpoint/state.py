"""What of a module is in its checkpoints: adapters, by name, and settings that run nobody's code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import fsspec
import torch
from lightning.pytorch.core.saving import load_hparams_from_yaml

from lit_dpo.checkpoint.identity import TRUST, check_readable
from lit_dpo.errors import ResumeError
from lit_dpo.policy.adapters import DEFAULT, REFERENCE, adapter_parameters

if TYPE_CHECKING:
    from lit_dpo.module import DPOModule


def adapter_state(module: DPOModule, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the adapters that a checkpoint holds: the one that trains, and that of a reference that follows it.

    The frozen base and reference are named there, not stored.
    """
    names = (DEFAULT, REFERENCE) if module.reference.follows_policy else (DEFAULT,)
    adapters = (adapter_parameters(module.model, name) for name in names)
    # these share memory with the parameters: `load_strictly` copies into them
    return {f"{prefix}model.{name}": p.detach() for one in adapters for name, p in one.items()}


def untrusting(file: Any, key: str, hparams_file: Any = None) -> dict[str, Any]:
    """Those hyper-parameters of a checkpoint that would run code of a stranger, changed so that they do not.

    Args:
        file: the checkpoint.
        key: where it holds its hyper-parameters.
        hparams_file: where they are instead.
    """
    stored = read_checkpoint(file).get(key, {}) if hparams_file is None else _hparams(hparams_file)
    return {name: _without_trust(value) for name, value in stored.items() if _trusts(value)}


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
    # all of it before the first copy, so that a refusal leaves the module as it was
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
            # in place: dtype and device are the policy's, whatever the file has
            tensor.copy_(given[name])


def _of_training(name: str) -> bool:
    # trained tokens have the adapter's name last, hence the dot at the end
    return name == "loss_state" or ".reference." in f"{name}."


def _trusts(given: object) -> bool:
    return bool(given != _without_trust(given))


def _without_trust(given: object) -> Any:
    """Return the same, but with `trust_remote_code` false wherever it stands."""
    if isinstance(given, Mapping):
        # at the key itself `key != TRUST` is False, which is the value that it gets
        return {key: key != TRUST and _without_trust(value) for key, value in given.items()}
    return [_without_trust(value) for value in given] if isinstance(given, list | tuple) else given


def _hparams(file: Any) -> dict[str, Any]:
    return dict(load_hparams_from_yaml(file) if str(file).endswith(("yml", "yaml")) else {})


def frozen_is_not_missing(module: torch.nn.Module, keys: Any) -> None:
    """Accept a module inside another one (a callback's average): it lacks what its `state_dict` never holds."""
    # the names come with a prefix of the module around; torch reads this very list afterwards
    held = tuple(module.state_dict())
    keys.missing_keys[:] = [name for name in keys.missing_keys if name.endswith(held)]


def read_checkpoint(path: Any) -> dict[str, Any]:
    """Read a checkpoint from wherever Lightning can.

    Raises:
        VersionError: if a newer release has written it.
    """
    if hasattr(path, "read"):
        # Lightning reads the same stream too, before or after
        path.seek(0)
        found = dict(torch.load(path, map_location="cpu", weights_only=True))
        path.seek(0)
    else:
        # on the CPU: the device that it was written on need not be here
        with fsspec.open(str(path), "rb") as stream:
            found = dict(torch.load(stream, map_location="cpu", weights_only=True))
    check_readable(found, "The checkpoint" if hasattr(path, "read") else path)
    return found
