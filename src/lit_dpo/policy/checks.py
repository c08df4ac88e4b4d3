"""What can be wrong with a policy, found before or while it loads; each a sentence that says what to do."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lit_dpo.errors import LitDPOError, PolicyError, first_line
from lit_dpo.hub import Place, listing, weight_names
from lit_dpo.policy.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from lit_dpo.policy.base_model import BaseModel


log = logging.getLogger(__name__)


def check_weights(place: Place) -> None:
    """See that a directory has safetensors weights; of a hub id `locate_weights` has seen to it."""
    folder = place.folder
    weight_names(folder)  # an index names files of its folder alone
    if place.commit is not None or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(found.name for found in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        raise PolicyError(
            f"Expected safetensors weights in {folder} but it has only {', '.join(pickled)}, which can run code as "
            "it loads. Convert it once: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)."
        )
    raise PolicyError(f"Expected *.safetensors weights in {place} but it holds {listing(place)}.")


def check_causal(config: PreTrainedConfig, model: str) -> None:
    """See that it is a causal language model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.is_encoder_decoder or not (remote or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise PolicyError(f"Expected a causal language model but {model!r} is {config.model_type}.")


def check_attention(attention: str) -> None:
    """See that the implementation exists."""
    from transformers import AttentionInterface

    if attention.startswith("flash_attention") and find_spec("flash_attn") is None and find_spec("kernels") is None:
        raise PolicyError(f"attention={attention} needs the flash_attn or the kernels package. `auto` needs neither.")
    known = ["auto", "pairs", "eager", *AttentionInterface().valid_keys()]
    if attention not in known and "/" not in attention:  # a kernel of the hub has a slash
        raise PolicyError(f"Expected `attention` among {', '.join(known)} but got {attention!r}.")


def check_bitsandbytes(quantization: str) -> None:
    """See that it is installed."""
    if find_spec("bitsandbytes") is None:
        raise PolicyError(f"quantization={quantization} needs bitsandbytes: pip install bitsandbytes (or use none).")


def check_no_adapter_inside(model: BaseModel, place: Place) -> None:
    """Refuse a model and an adapter in one folder: transformers puts them together, PEFT and we do not."""
    if (place.folder / "adapter_config.json").is_file():
        base = None
        with suppress(ValueError, KeyError, TypeError):  # it only would help
            base = json.loads((place.folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        raise PolicyError(
            f"Expected a model at `{place.option}` but {place} holds a model and an adapter, and it does not say which "
            f"of them is meant. For the adapter, give {place.name} to `{model.option}.adapter_path` and its base"
            f"{f' ({base})' if base else ''} to `{model.option}.model`; for the model alone, give a copy without "
            "adapter_config.json."
        )


def check_prequantized(policy: BaseModel, config: PreTrainedConfig) -> None:
    """Weights that are quantised already are so in the way that the policy says."""
    saved = getattr(config, "quantization_config", None)
    if not saved:
        return
    saved = saved if isinstance(saved, dict) else saved.to_dict()
    if (method := str(saved.get("quant_method", "bitsandbytes"))).partition("_")[0] != "bitsandbytes":
        raise PolicyError(
            f"The weights of {policy.model!r} are quantised with {method}, which is neither trained on nor undone "
            f"here: name the model that they were made of in `{policy.option}.model`."
        )
    mine = (policy.quantization, policy.quantization == "nf4" and policy.double_quantization)
    theirs = ("int8", False)
    if saved.get("load_in_4bit"):
        theirs = (str(saved.get("bnb_4bit_quant_type", "fp4")), bool(saved.get("bnb_4bit_use_double_quant")))
    if mine != theirs:
        names = ("quantization", "double_quantization")
        said, asked = (", ".join(f"{n}={v}" for n, v in zip(names, side, strict=True)) for side in (theirs, mine))
        raise PolicyError(
            f"The weights of {policy.model!r} are quantised already, with {said}, but the policy says {asked}. Set "
            "the policy to what they are, or name the model that they were made of."
        )


def keep_quantized(config: PreTrainedConfig, dtype: torch.dtype) -> bool:
    """Whether the weights are quantised already: as their configuration says, but computing in the policy's dtype."""
    saved = getattr(config, "quantization_config", None)
    if not saved:
        return False
    config.quantization_config = dict(saved if isinstance(saved, dict) else saved.to_dict())
    if config.quantization_config.get("load_in_4bit"):
        config.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    return True


def check_targets(config: PreTrainedConfig, targets: Any, trust_remote_code: bool) -> None:
    """See that the layers exist, on a skeleton without weights."""
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
    wanted = [targets] if isinstance(targets, str) else sorted(targets)
    found = {one: [name for name in names if _is_target(one, name, isinstance(targets, str))] for one in wanted}
    if unknown := [one for one in wanted if not found[one]]:
        there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
        raise PolicyError(f"Expected `target_modules` among {there} (or all-linear) but got {', '.join(unknown)}.")
    if getattr(config.get_text_config(), "tie_word_embeddings", False):
        shared = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
        tied = {name for hits in found.values() for name in hits if skeleton.get_submodule(name) in shared}
        _say_tied(", ".join(sorted(tied)))


def _is_target(one: str, name: str, is_pattern: bool) -> bool:
    return bool(re.fullmatch(one, name)) if is_pattern else name == one or name.endswith(f".{one}")


@lru_cache(maxsize=256)
def _say_tied(names: str) -> None:
    """Once in a process: checks run before training and while loading."""
    if names:
        log.warning(
            "%s will have an adapter, but embeddings and head share one weight in this model: merged into it, the "
            "adapter would change both, so do not merge what comes of this run; or leave it out of `target_modules`",
            names,
        )


def check_complete(info: Any, model: str) -> None:
    """Refuse weights that lack something: transformers makes it up at random and says so in a warning."""
    if lacking := sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]):
        raise PolicyError(
            f"The weights of {model!r} lack {len(lacking)} tensors of its architecture, to be made up "
            f"at random: {', '.join(lacking[:3])}."
        )


def check_quantized(model: nn.Module, quantization: str) -> None:
    """Asked for 4 bits, the adapted layers *are* in 4 bits: a loader that skips quietly is found here."""
    if quantization == "none":
        return
    import bitsandbytes as bnb

    kind = bnb.nn.Linear4bit if quantization == "nf4" else bnb.nn.Linear8bitLt
    bases = {name: module.base_layer for name, module in model.named_modules() if hasattr(module, "lora_A")}
    if not hasattr(model, "peft_config"):  # a model without adapters: some layers are
        bases = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    wrong = [name for name, base in bases.items() if not (isinstance(base, kind) and _packed(base, kind, bnb))]
    if wrong or not bases:
        raise PolicyError(
            f"Expected {kind.__name__} layers under the adapters (quantization={quantization}) but "
            f"{len(wrong)} of {len(bases)} are not, first {wrong[:3]}. Leave them out of `target_modules` or use "
            "quantization=none."
        )


def int8_layers(model: nn.Module) -> list[Any]:
    """Those of LLM.int8(); where bitsandbytes is not loaded there are none."""
    bnb: Any = sys.modules.get("bitsandbytes")
    return [] if bnb is None else [layer for layer in model.modules() if isinstance(layer, bnb.nn.Linear8bitLt)]


def quantization_of(base: PreTrainedModel) -> dict[str, Any]:
    """How the layers are quantised, seen in them."""
    kinds = {type(module).__name__ for module in base.modules()}
    if "Linear4bit" in kinds or "SlicedLinear4bit" in kinds:
        import bitsandbytes as bnb

        states = [m.weight.quant_state for m in base.modules() if isinstance(m, bnb.nn.Linear4bit)]
        if wrong := {state.quant_type for state in states} - {"nf4"}:
            raise PolicyError(f"Expected a model in nf4, int8 or not quantised but its layers are in {wrong.pop()}.")
        return {"quantization": "nf4", "double_quantization": all(state.nested for state in states)}
    if "Linear8bitLt" in kinds:
        return {"quantization": "int8"}
    if getattr(base, "hf_quantizer", None) is not None:
        method = base.hf_quantizer.quantization_config.quant_method
        raise PolicyError(f"The model is quantised with {method}, which is not trained on here: load it without.")
    return {"quantization": "none"}


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    Its Linear4bit repacks, for good, at the first evaluation without gradients; from then on it multiplies in bfloat16
    and cuts every gradient behind it without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - of bitsandbytes' own layers


@contextmanager
def as_policy_error(what: str) -> Iterator[None]:
    """Say what could not be loaded, instead of where in a library."""
    try:
        yield
    except LitDPOError:
        raise
    except Exception as error:  # a stranger's file meets any line of a library
        raise PolicyError(f"Cannot load {what}: {first_line(error)}") from error


def _packed(base: PreTrainedModel, kind: Any, bnb: Any) -> bool:
    if kind is bnb.nn.Linear8bitLt:
        return str(base.weight.dtype) == "torch.int8"
    # of a weight in shards the layer has it
    state = getattr(base.weight, "quant_state", None) or getattr(base, "quant_state", None)
    return state is not None and state.quant_type == "nf4"


def _takes_adapter(module: nn.Module) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D)


def turn_off_dropout(config: PreTrainedConfig, *, quiet: bool = False) -> None:
    """Turn dropout off: under different masks policy and reference do not compare, and rewards at step 0 are noise."""
    found = {}
    for one in settings(config):
        if one.is_number and one.value > 0 and re.search(r"drop(out)?($|_)|jitter", one.name):
            found[one.path] = one.value
            one.change(type(one.value)(0))  # some configurations hold an entry to its type
    if found and not quiet:
        log.info("dropout of the base is off: %s", ", ".join(f"{name} {given}" for name, given in found.items()))


def turn_off_dropout_layers(base: PreTrainedModel) -> None:
    """Those that the model's code makes by itself; what is random in other ways the start-up probe refuses."""
    from torch import nn

    kinds_of = nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout | nn.FeatureAlphaDropout
    found = {name: layer for name, layer in base.named_modules() if isinstance(layer, kinds_of) and layer.p > 0}
    if found:
        kinds = sorted({f"{name.rsplit('.', 1)[-1]} {layer.p}" for name, layer in found.items()})
        log.info("dropout that is not in the base's configuration is off: %s", ", ".join(kinds))
    for layer in found.values():
        layer.p = 0.0


def enable_checkpointing(base: PreTrainedModel) -> None:
    """Recompute each layer in the backward pass."""
    # reentrant checkpoints need inputs that require gradients, and embeddings are frozen
    keywords = {"use_reentrant": False}
    if hasattr(base, "activation_checkpointing_enable"):  # the name from transformers 5.20 on
        base.activation_checkpointing_enable(keywords)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors of this dtype, whatever Lightning's "true" precisions have set."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
