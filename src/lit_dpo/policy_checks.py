"""What can be wrong with a policy, found before or while it loads; each a sentence that says what to do."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lit_dpo.errors import PolicyError

log = logging.getLogger(__name__)

_LORA_FIELDS = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": "target_modules"}


def check_weights(folder: Path) -> None:
    """A directory has safetensors weights; a hub id is not looked at."""
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(found.name for found in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        raise PolicyError(
            f"Expected safetensors weights in {folder} but it has only {', '.join(pickled)}, which can run code as "
            "it loads. Convert it once: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)."
        )
    raise PolicyError(f"Expected *.safetensors weights in {folder} but it holds {listing(folder)}.")


def check_causal(config: Any, model: str) -> None:
    """It is a causal language model."""
    from transformers import AutoModelForCausalLM

    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.is_encoder_decoder or not (remote or type(config) in AutoModelForCausalLM._model_mapping):
        raise PolicyError(f"Expected a causal language model but {model!r} is {config.model_type}.")


def check_attention(attention: str) -> None:
    """The implementation exists."""
    from transformers import AttentionInterface

    if attention.startswith("flash_attention") and find_spec("flash_attn") is None and find_spec("kernels") is None:
        raise PolicyError(f"attention={attention} needs the flash_attn or the kernels package. `auto` needs neither.")
    known = ["auto", "pairs", "eager", *AttentionInterface().valid_keys()]
    if attention not in known and "/" not in attention:  # a kernel of the hub has a slash
        raise PolicyError(f"Expected `attention` among {', '.join(known)} but got {attention!r}.")


def check_bitsandbytes(quantization: str) -> None:
    """It is installed."""
    if find_spec("bitsandbytes") is None:
        raise PolicyError(f"quantization={quantization} needs bitsandbytes: pip install bitsandbytes (or use none).")


def check_adapter(policy: Any, folder: Path) -> Any:
    """The adapter is one that can be continued and compared with; returns the layers that it is for."""
    adapter = check_lora(folder, "policy.adapter_path")
    for field in fields(policy):
        if field.name not in _LORA_FIELDS or field.default is MISSING:
            continue
        mine, theirs = getattr(policy, field.name), getattr(adapter, _LORA_FIELDS[field.name])
        theirs = sorted(theirs) if isinstance(theirs, set | list) else theirs
        mine = sorted(mine) if isinstance(mine, list) else mine
        if mine not in (field.default, theirs):
            raise PolicyError(
                f"Expected `policy.{field.name}` to be left out with `adapter_path` but got {mine!r}: "
                f"the adapter in {folder} has {theirs!r}, and continues with it."
            )
    return adapter.target_modules


def check_lora(folder: Path, option: str) -> Any:
    """The directory holds a LoRA adapter that changes nothing but its layers; returns its configuration.

    Args:
        folder: a PEFT directory, or a hub id, of which less is known.
        option: that named it, for messages.
    """
    from peft import LoraConfig, PeftConfig

    looks_like_path = str(folder).startswith((".", "/", "~")) or str(folder).count("/") != 1
    if not folder.is_dir() and looks_like_path:
        raise PolicyError(f"No adapter at `{option}` {str(folder)!r}: there is no such directory.")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if folder.is_dir() and not (folder / name).is_file():
            raise PolicyError(f"Expected a PEFT adapter in {folder} but it has no {name}: {listing(folder)}.")
    try:
        adapter = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise PolicyError(f"No adapter at `{option}` {str(folder)!r}: {first_line(error)}") from error
    if not isinstance(adapter, LoraConfig):
        raise PolicyError(f"Expected a LoRA adapter in {folder} but it is {adapter.peft_type}.")
    if adapter.bias != "none" or adapter.modules_to_save:
        raise PolicyError(
            f"The adapter in {folder} also trained biases or whole modules (bias={adapter.bias!r}, "
            f"modules_to_save={adapter.modules_to_save}), which turning adapters off does not undo. Merge it into "
            "its base first."
        )
    if adapter.init_lora_weights not in (True, False, "gaussian"):
        raise PolicyError(
            f"The adapter in {folder} changes its base as it loads (init_lora_weights={adapter.init_lora_weights!r}), "
            "so policy and reference would share another base. Convert it to a plain LoRA first, see PEFT's "
            "`path_initial_model_for_weight_conversion`."
        )
    return adapter


def check_targets(config: Any, targets: Any, trust_remote_code: bool) -> None:
    """The layers exist, seen on a skeleton without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    names = [name for name, module in skeleton.named_modules() if _takes_adapter(module)]
    if targets is None:  # an adapter on parameters instead of layers
        return
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise PolicyError(
                f"Expected `target_modules` to be a regular expression but {targets!r}: {error}."
            ) from None
        unknown = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        unknown = [one for one in sorted(targets) if not any(name == one or name.endswith(f".{one}") for name in names)]
    if unknown:
        there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
        raise PolicyError(f"Expected `target_modules` among {there} (or all-linear) but got {', '.join(unknown)}.")


def check_complete(info: Any, model: str) -> None:
    """What the weights lack, transformers makes up at random and says in a warning."""
    if lacking := sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]):
        raise PolicyError(
            f"The weights of {model!r} lack {len(lacking)} tensors of its architecture, to be made up "
            f"at random: {', '.join(lacking[:3])}."
        )


def check_adapter_keys(model: Any, folder: Path, adapter: str = "default") -> None:
    """What a file lacks, peft fills with fresh weights and a warning."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    if not folder.is_dir():
        return
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        given = set(file.keys())
    there = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    if different := sorted(given ^ set(there)):
        raise PolicyError(
            f"The adapter in {folder} does not fit the model: {', '.join(different[:3])} on one side only."
        )


def check_quantized(model: Any, quantization: str) -> None:
    """Asked for 4 bits, the adapted layers *are* in 4 bits: a loader that skips quietly is found here."""
    if quantization == "none":
        return
    import bitsandbytes as bnb

    kind = bnb.nn.Linear4bit if quantization == "nf4" else bnb.nn.Linear8bitLt
    bases = {name: module.base_layer for name, module in model.named_modules() if hasattr(module, "base_layer")}
    if not hasattr(model, "peft_config"):  # a model without adapters: some layers are
        bases = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    wrong = [name for name, base in bases.items() if not (isinstance(base, kind) and _packed(base, kind, bnb))]
    if wrong or not bases:
        raise PolicyError(
            f"Expected {kind.__name__} layers under the adapters (quantization={quantization}) but "
            f"{len(wrong)} of {len(bases)} are not, first {wrong[:3]}. Leave them out of `target_modules` or use "
            "quantization=none."
        )


def keep_trainable(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    Its Linear4bit repacks, for good, at the first evaluation without gradients; from then on it multiplies in bfloat16
    and cuts every gradient behind it without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def as_policy_error(what: str) -> Iterator[None]:
    """Say what could not be loaded, instead of where in a library."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise PolicyError(f"Cannot load {what}: {first_line(error)}") from error


def _packed(base: Any, kind: Any, bnb: Any) -> bool:
    if kind is bnb.nn.Linear8bitLt:
        return str(base.weight.dtype) == "torch.int8"
    state = getattr(base.weight, "quant_state", None)
    return state is not None and state.quant_type == "nf4"


def _takes_adapter(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D)


def listing(folder: Path) -> str:
    """What a folder holds, for a message."""
    return ", ".join(sorted(found.name for found in folder.iterdir())[:12]) or "nothing"


def first_line(error: Exception) -> str:
    """What a library's error begins with."""
    return str(error).strip().split("\n")[0]


def turn_off_dropout(config: Any) -> None:
    """A policy and a reference under different dropout masks do not compare: rewards at step 0 would be noise."""
    found = {}
    for part in (config, config.get_text_config()):
        for name, given in part.to_dict().items():
            if re.search(r"drop(out)?($|_)|jitter", name) and isinstance(given, int | float) and given > 0:
                found[name] = given
                setattr(part, name, 0.0)
    if found:
        log.info("dropout of the base is off: %s", ", ".join(f"{name} {given}" for name, given in found.items()))
