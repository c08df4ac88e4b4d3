"""Files of models and adapters that somebody else wrote: what they say is looked at before a library believes it."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_dpo.errors import LitDPOError, PolicyError, first_line

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedConfig

LARGEST_FILE = 50_000_000
"""Bytes of a configuration of a model or an adapter."""

LARGEST_RANK = 1024
"""Of an adapter whose file holds none as large: that many rows and columns may be made before they are compared."""

MOST_LAYERS = 10_000
"""Of a model whose weights are not there to be counted."""

_PACKED = 16  # numbers in one that is stored, at most: of 2 bits in 32
_USUAL = 512  # layers, experts, heads: so many are built in no time
_SECONDS = 5
_MATCH = "import json, re, sys; p, n = json.load(sys.stdin); [re.fullmatch(one, name) for one in p for name in n]"
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Say which file a library could not read, whatever it raises: what a stranger writes meets any line of it.

    Raises:
        PolicyError: with the library's first line.
    """
    try:
        yield
    except LitDPOError:
        raise
    except Exception as error:
        raise PolicyError(f"{what} cannot be read: {type(error).__name__}: {first_line(error)[:500]}") from error


def json_object(path: Path) -> dict[str, Any]:
    """Read a file of one JSON object.

    Raises:
        PolicyError: if it is no such file, or far larger than any configuration.
    """
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise PolicyError(f"Expected a configuration of at most {LARGEST_FILE} bytes but {path} has {size}.")
    with refused(str(path)):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise PolicyError(f"Expected a JSON object in {path} but it holds a {type(found).__name__}.")
    return found


def model_config(folder: Path, values: Mapping[str, Any], trust_remote_code: bool) -> PreTrainedConfig:
    """Read a model's configuration, once as long as its file holds these `values`: a run asks for it six times."""
    # whoever gets it may change it: models do
    return copy.deepcopy(_model_config(folder, json.dumps(values), trust_remote_code))


@lru_cache(maxsize=8)
def _model_config(folder: Path, values: str, trust_remote_code: bool) -> PreTrainedConfig:
    from transformers import AutoConfig

    found: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return found


def headers(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Read of each tensor in a safetensors file the type and the shape; no values.

    Raises:
        PolicyError: if it is damaged, or says what it does not hold.
    """
    from safetensors import safe_open

    with refused(str(path)), safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {name: (one.get_dtype(), list(one.get_shape())) for name, one in slices.items()}


def check_size(config: Mapping[str, Any], folder: Path) -> None:
    """See that a model does not claim far more layers than it has weights: a skeleton is built before these load.

    Raises:
        PolicyError: naming the entry.
    """
    most = 0
    todo: list[tuple[str, Any]] = [("", config)]
    while todo:
        path, one = todo.pop()
        for name, given in one.items():
            if isinstance(given, Mapping):
                todo.append((f"{path}{name}.", given))
            elif isinstance(given, int) and given > _USUAL and re.search(r"(layer|expert|block|head)s?$", name):
                most = most or sum(len(headers(file)) for file in folder.glob("*.safetensors")) or MOST_LAYERS
                if given > max(most, _USUAL):
                    raise PolicyError(
                        f"Expected `{path}{name}` in {folder / 'config.json'} to be at most {max(most, _USUAL)}, by "
                        f"what there is of its weights, but got {given}."
                    )


def check_widths(config: PreTrainedConfig, folder: Path, trust_remote_code: bool) -> None:
    """See that a model does not claim far more numbers than its weights have: what is missing there would be made.

    Raises:
        PolicyError: with both counts.
    """
    import torch
    from transformers import AutoModelForCausalLM

    shapes = [shape for file in folder.glob("*.safetensors") for _, shape in headers(file).values()]
    widest = max((size for shape in shapes for size in shape), default=None)
    if widest is None or max(_widths(config.to_dict()), default=0) <= widest:
        return  # the usual case costs no skeleton
    with refused(str(folder / "config.json")), torch.device("meta"):
        claimed = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).num_parameters()
    there = sum(math.prod(shape) for shape in shapes)
    if claimed > _PACKED * there:
        raise PolicyError(
            f"Expected a model of about as many numbers as its weights have, {there:,}, but {folder / 'config.json'} "
            f"claims {claimed:,}."
        )


def _widths(config: Mapping[str, Any]) -> Iterator[int]:
    for name, given in config.items():
        if isinstance(given, Mapping):
            yield from _widths(given)
        elif isinstance(given, int) and not re.search(r"position|window|context|length|token|theta", name):
            yield given


# --- adapters --------------------------------------------------------------------------------------------------------


def check_values(config: LoraConfig, folder: Path) -> None:
    """See that an adapter's configuration holds values of the kinds that PEFT computes with.

    Raises:
        PolicyError: naming the first that is of another kind.
    """
    numbers = (int, float)
    wrong = {
        "r": not _is_whole(config.r),
        "lora_alpha": not (isinstance(config.lora_alpha, numbers) and math.isfinite(config.lora_alpha)),
        "lora_dropout": not (isinstance(config.lora_dropout, numbers) and 0 <= config.lora_dropout < 1),
        "rank_pattern": not _is_pattern(config.rank_pattern, _is_whole),
        "alpha_pattern": not _is_pattern(config.alpha_pattern, lambda one: isinstance(one, numbers)),
        "base_model_name_or_path": not _is_name(config.base_model_name_or_path),
        "revision": not _is_name(config.revision),
        "target_modules": not _is_names(config.target_modules),
        "exclude_modules": not _is_names(config.exclude_modules),
        "target_parameters": not _is_names(config.target_parameters),
        "layers_pattern": not _is_names(config.layers_pattern),
        "layers_to_transform": not _is_numbers(config.layers_to_transform),
        "trainable_token_indices": not _is_numbers(config.trainable_token_indices),
        "task_type": config.task_type not in (None, "CAUSAL_LM"),
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        given = repr(getattr(config, found[0]))[:80]
        raise PolicyError(
            f"The adapter in {folder} says `{found[0]}: {given}`, which no LoRA adapter of a causal language model has."
        )


def check_tensors(config: LoraConfig, folder: Path) -> None:
    """See that an adapter's file holds finite numbers, and ranks as large as its configuration says.

    Raises:
        PolicyError: naming a tensor, or the rank.
    """
    import torch
    from safetensors import safe_open

    path = folder / "adapter_model.safetensors"
    found = headers(path)
    for name, (kind, shape) in found.items():
        if kind not in _FLOATS or math.prod(shape) == 0:
            raise PolicyError(f"Expected numbers in {path} but `{name}` is of {kind}, {shape}.")
    largest = max((min(shape) for name, (_, shape) in found.items() if "lora_" in name), default=0)
    claimed = max([config.r, *(config.rank_pattern or {}).values()])
    if claimed > max(largest, LARGEST_RANK):
        raise PolicyError(f"The adapter in {folder} says that it is of rank {claimed} but holds none above {largest}.")
    with refused(str(path)), safe_open(path, "pt") as file:
        for name in found:
            if not bool(torch.isfinite(file.get_tensor(name).float()).all()):
                raise PolicyError(
                    f"The adapter in {folder} holds numbers that are not finite, in `{name}`: it is broken."
                )


def check_patterns(config: LoraConfig, names: Callable[[], Iterable[str]], folder: Path) -> None:
    """See that an adapter's regular expressions end, in a process that can be ended if they do not.

    Raises:
        PolicyError: if they take longer than any does, or are none.
    """
    own = [one for one in (config.target_modules, config.exclude_modules) if isinstance(one, str)]
    own += [rf"(.*\.)?({key})$" for given in (config.rank_pattern, config.alpha_pattern) for key in given or {}]
    if not any(set("*+{?") & set(one.removeprefix(r"(.*\.)?(").removesuffix(")$")) for one in own):
        return
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([own, list(names())]),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PolicyError(
            f"The adapter in {folder} chooses layers by a regular expression that does not end: "
            f"{own[0][:80]!r}. Name the layers in a list instead."
        ) from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no regular expression"])[-1]
        raise PolicyError(f"The adapter in {folder} chooses layers by no regular expression: {said[:200]}")


def _is_whole(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and given > 0


def _is_pattern(given: Any, is_value: Any) -> bool:
    return given is None or (isinstance(given, dict) and all(is_value(one) for one in given.values()))


def _is_name(given: Any) -> bool:
    return given is None or (isinstance(given, str) and "\0" not in given)


def _is_names(given: Any) -> bool:
    several = isinstance(given, list | set | tuple) and all(isinstance(one, str) for one in given)
    return given is None or isinstance(given, str) or several


def _is_numbers(given: Any) -> bool:
    several = isinstance(given, list | tuple) and all(isinstance(one, int) and 0 <= one < 1 << 31 for one in given)
    return given is None or several or (isinstance(given, int) and 0 <= given < 1 << 31)
