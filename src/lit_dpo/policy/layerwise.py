"""Weights read a few layers at a time, each sharded before the next: no rank ever holds the base.

transformers loads them, as it loads a whole model: names, conversions and quantisation are its own. For each few layers
it is given their tensors alone, and leaves the rest of the model without memory.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_dpo.errors import PolicyError, first_line
from lit_dpo.policy.sharding import layers_of, shard_module

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedConfig, PreTrainedModel


class NotInLayersError(PolicyError):
    """A model that has to be read whole, with the reason."""


class _Files(NamedTuple):
    """A directory's tensors: the file that each is in, and which layer it belongs to, `None` for the rest."""

    file_of: Mapping[str, Path]
    layer_of: Mapping[str, int | None]

    def tensors(self, layers: Sequence[int | None]) -> dict[str, torch.Tensor]:
        """Read those of some layers."""
        from safetensors import safe_open

        found: dict[str, torch.Tensor] = {}
        names = [name for name, layer in self.layer_of.items() if layer in layers]
        for file in sorted({self.file_of[name] for name in names}):
            with safe_open(file, framework="pt") as opened:
                found |= {name: opened.get_tensor(name) for name in names if self.file_of[name] == file}
        return found


def load_in_layers(
    folder: Path,
    config: PreTrainedConfig,
    device: torch.device,
    mesh: DeviceMesh,
    *,
    trust_remote_code: bool,
    **options: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a causal language model whose layers are sharded as they come.

    Args:
        folder: of the model, in safetensors.
        config: of the model.
        device: where the weights go.
        mesh: of one dimension; all of its ranks load at the same time.
        trust_remote_code: run code that comes with the model.
        **options: of `from_pretrained`.

    Returns:
        The model, frozen, and what transformers says of missing and mismatched tensors.

    Raises:
        NotInLayersError: if the model cannot be loaded so.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    _, skeletons = layers_of(skeleton.get_decoder())
    path = next(name for name, module in skeleton.named_modules() if module is skeletons)
    files = _find(folder, path.rpartition(".")[2], len(skeletons))

    def load(layers: Sequence[int | None]) -> tuple[PreTrainedModel, dict[str, Any]]:
        devices = _placed(skeleton, path, layers, device)
        given = {"config": config, "state_dict": files.tensors(layers), "device_map": devices}
        model, info = type(skeleton).from_pretrained(None, output_loading_info=True, **given, **options)
        _without_hooks(model)
        return model, info

    with _quietly(), torch.random.fork_rng(devices=[]):
        try:
            base, info = load([None])
            at_once = max(1, len(skeletons) // (4 * mesh.size()))
            for start in range(0, len(skeletons), at_once):
                numbers = range(start, min(start + at_once, len(skeletons)))
                part, of_part = load(numbers)
                layers: Any = base.get_submodule(path)
                for number in numbers:
                    layer = _whole(part.get_submodule(path)[number], f"{path}.{number}").requires_grad_(False)
                    layers[number] = _configured_as(layers[number], layer)
                    shard_module(layers[number], mesh, set())
                for name in ("missing_keys", "mismatched_keys"):
                    info[name] = set(info[name]) & set(of_part[name])
                del part
        except (ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
            raise NotInLayersError(first_line(error)) from error
    _whole(base, type(base).__name__)
    return base.requires_grad_(False), info


def _find(folder: Path, name: str, count: int) -> _Files:
    """Find the tensors of a directory, by layer, with the name that a list of so many layers has."""
    from safetensors import safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        file_of = {key: folder / file for key, file in json.loads(index.read_text())["weight_map"].items()}
    elif single.is_file():
        with safe_open(single, framework="pt") as opened:
            file_of = dict.fromkeys(opened.keys(), single)
    else:
        raise NotInLayersError("its files have other names than model.safetensors")
    found = {key: re.search(rf"(?:^|\.){re.escape(name)}\.(\d+)\.", key) for key in file_of}
    layer_of = {key: None if one is None else int(one[1]) for key, one in found.items()}
    if {*range(count)} != {*layer_of.values()} - {None}:
        raise NotInLayersError(f"its files do not name the tensors of {count} layers")
    return _Files(file_of, layer_of)


def _placed(
    skeleton: PreTrainedModel, path: str, layers: Sequence[int | None], device: torch.device
) -> dict[str, torch.device]:
    """Say for all parts of a model where they go: `device`, or nowhere."""
    import torch

    nowhere = torch.device("meta")
    rest = device if None in layers else nowhere
    found: dict[str, torch.device] = {}
    for name, _ in skeleton.named_modules():
        if not name or path.startswith(f"{name}.") or name == path or name.startswith(f"{path}."):
            continue
        if not any(name.startswith(f"{other}.") for other in found):
            found[name] = rest
    every = dict(skeleton.get_submodule(path).named_children())
    return found | {f"{path}.{number}": device if int(number) in layers else nowhere for number in every}


def _without_hooks(model: PreTrainedModel) -> None:
    """Take off what would move inputs from one part of a model to the next: all will be in one place."""
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        vars(module).pop("forward", None)  # which it puts back as the instance's own
    for name in ("to", "cuda", "hf_device_map"):
        vars(model).pop(name, None)


def _configured_as(empty: Any, layer: Any) -> Any:
    """Give a layer the configuration of the model that it comes into, through which attention is switched."""
    for old, new in zip(empty.modules(), layer.modules(), strict=True):
        if "config" in vars(old):
            new.config = old.config
    return layer


def _whole(module: Any, name: str) -> Any:
    """See that nothing of a module was left nowhere."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if lacking := [one for one, tensor in tensors if tensor.is_meta]:
        raise NotInLayersError(f"{lacking[0]} of {name} was not found")
    return module


@contextmanager
def _quietly() -> Iterator[None]:
    """Without reports of missing tensors, of which there are many on purpose, and without a bar for each few layers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what looks at every attribute of the model
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
