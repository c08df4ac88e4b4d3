"""What of a module is in its checkpoints: adapters, by name, and settings that run nobody's code."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import fsspec
import torch
from lightning.pytorch.core.saving import load_hparams_from_yaml

from lit_dpo.checkpoint.identity import KEY, TRUST, check_readable
from lit_dpo.errors import ResumeError, first_line
from lit_dpo.policy.adapters import DEFAULT, REFERENCE, adapter_parameters

if TYPE_CHECKING:
    from lit_dpo.module import DPOModule


_MOST_PARTS, _DEEPEST = 1_000_000, 100


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
    stored = hyper_parameters(file, key, hparams_file)
    return {name: _without_trust(value) for name, value in stored.items() if _trusts(value)}


def hyper_parameters(file: Any, key: str, hparams_file: Any = None) -> dict[str, Any]:
    """Read what a checkpoint says that its module was built from.

    Args:
        file: the checkpoint.
        key: where it holds its hyper-parameters.
        hparams_file: where they are instead.

    Raises:
        ResumeError: if they are no such thing, or larger than any module's.
    """
    stored = read_checkpoint(file).get(key, {}) if hparams_file is None else _hparams(hparams_file)
    if not isinstance(stored, Mapping):
        raise ResumeError(f"Expected the checkpoint's `{key}` to be an object but got a {type(stored).__name__}.")
    check_parts(stored, key)
    return dict(stored)


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
    try:
        found = load_hparams_from_yaml(file) if str(file).endswith(("yml", "yaml")) else {}
    except Exception as error:  # of whatever kind
        raise ResumeError(f"Expected hyper-parameters in {file}: {first_line(error)}") from error
    check_parts(found, str(file))  # an anchor may stand in itself, over and over
    return dict(found)


def frozen_is_not_missing(module: torch.nn.Module, keys: Any) -> None:
    """Accept a module inside another one (a callback's average): it lacks what its `state_dict` never holds."""
    # the names come with a prefix of the module around; torch reads this very list afterwards
    held = tuple(module.state_dict())
    keys.missing_keys[:] = [name for name in keys.missing_keys if name.endswith(held)]


def read_checkpoint(path: Any) -> dict[str, Any]:
    """Read a checkpoint from wherever Lightning can; see `loaded`.

    Raises:
        VersionError: if a newer release has written it.
    """
    if hasattr(path, "read"):
        # Lightning reads the same stream too, before or after
        path.seek(0)
        found = loaded(path, "the checkpoint")
        path.seek(0)
    else:
        # on the CPU: the device that it was written on need not be here
        with fsspec.open(str(path), "rb") as stream:
            found = loaded(stream, str(path))
    check_readable(found, "The checkpoint" if hasattr(path, "read") else path)
    return found


def loaded(stream: Any, name: str) -> dict[str, Any]:
    """Read a checkpoint: tensors and builtins, and nothing that a file of torch's would not have.

    Args:
        stream: the file, open.
        name: what errors call it.

    Raises:
        ResumeError: if it holds something else, is damaged, or would become far more than it is.
    """
    try:
        stream.seek(0)
        # torch stores without compressing: a few bytes that become a tensor of any size are no checkpoint's
        if zipfile.is_zipfile(stream):
            stream.seek(0)
            packed = [one.filename for one in zipfile.ZipFile(stream).infolist() if one.compress_type]
            if packed:
                raise ResumeError(f"Expected a checkpoint as torch writes it but {name} compresses `{packed[0]}`.")
        stream.seek(0)
        found = torch.load(stream, map_location="cpu", weights_only=True)
    except ResumeError:
        raise
    except Exception as error:  # of whatever kind: a stranger's bytes meet any line of torch's reader
        raise ResumeError(
            f"Expected a checkpoint of tensors and builtins but {name} cannot be read as one: "
            f"{type(error).__name__}: {first_line(error)[:300]}"
        ) from error
    if not isinstance(found, dict):
        raise ResumeError(f"Expected a checkpoint but {name} holds a {type(found).__name__}.")
    check_parts({key: value for key, value in found.items() if key in (KEY, "state_dict")}, name)
    return found


def check_parts(value: Any, name: str) -> None:
    """See that what a checkpoint says is not short in the file and endless in memory, and that tensors have memory.

    Args:
        value: a part of it.
        name: what errors call it.

    Raises:
        ResumeError: if it has more parts than any run writes, or holds a tensor that is larger than its numbers.
    """
    todo, parts = [(value, 0)], 0
    while todo:
        one, depth = todo.pop()
        parts += 1
        if parts > _MOST_PARTS or depth > _DEEPEST:
            raise ResumeError(f"Expected a checkpoint of a run but {name} holds more than any run writes.")
        if isinstance(one, Mapping):
            todo += [(inner, depth + 1) for inner in one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            todo += [(inner, depth + 1) for inner in one]
        elif isinstance(one, torch.Tensor) and _is_hollow(one):
            raise ResumeError(f"Expected a checkpoint of a run but {name} holds a tensor larger than its numbers.")


def _is_hollow(tensor: torch.Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return True
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
