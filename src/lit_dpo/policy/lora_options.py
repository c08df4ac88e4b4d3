"""Options of fresh adapters: PEFT's words, each checked to do something before weights load."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lit_dpo.errors import PolicyError
from lit_dpo.policy.checks import as_policy_error

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lit_dpo.policy import LoRAPolicy
    from lit_dpo.policy.base_model import BaseModel


# Fields of the policy that are fields of PEFT's `LoraConfig`, by name.
PASSED_ON = {
    "r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "target_modules",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "init_lora_weights": "init_lora_weights",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "exclude_modules": "exclude_modules",
    "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern",
    "target_parameters": "target_parameters",
    "trainable_token_indices": "trainable_token_indices",
}

# These choose among what a model has, so what they choose is looked for.
_CHOOSING = (
    *("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("target_parameters", "trainable_token_indices"),
)


def check_values(policy: LoRAPolicy) -> None:
    """See that the fields of a policy agree with one another.

    Raises:
        PolicyError: naming the two that do not.
    """
    if policy.r < 1 or policy.alpha <= 0 or not 0 <= policy.dropout < 1:
        raise PolicyError(
            "Expected `r` >= 1, `alpha` > 0 and `dropout` in [0, 1) but got "
            f"r={policy.r}, alpha={policy.alpha}, dropout={policy.dropout}."
        )
    if not policy.target_modules and not policy.target_parameters:
        raise PolicyError("Expected `target_modules` to name layers but it is empty; `all-linear` takes all.")
    if policy.init_lora_weights not in (True, "gaussian"):
        raise PolicyError(
            f"Expected `init_lora_weights` to be true or gaussian but got {policy.init_lora_weights!r}: with any other "
            "a fresh adapter is not its base to the last bit, or changes it, and the reference would be another model."
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if wrong := {key: given for key, given in (getattr(policy, name) or {}).items() if given <= 0}:
            raise PolicyError(f"Expected `{name}` to give numbers > 0 but got {wrong}.")
    if policy.layers_to_transform is not None and isinstance(policy.target_modules, str):
        raise PolicyError(
            "Expected `target_modules` to be a list of names with `layers_to_transform` but got "
            f"{policy.target_modules!r}: PEFT counts layers for such lists alone."
        )
    if policy.layers_pattern is not None and policy.layers_to_transform is None:
        raise PolicyError("`layers_pattern` has no effect without `layers_to_transform`: leave it out.")
    if policy.shard != "none":
        whole = ("use_dora", "target_parameters", "trainable_token_indices")
        if given := [name for name in whole if getattr(policy, name)]:
            raise PolicyError(
                f"`shard` does not go with `{given[0]}`, which reads whole weights where there are parts."
            )
        check_can_shard(policy)
    if policy.target_parameters:
        refused = {"dropout": policy.dropout, "use_dora": policy.use_dora}
        if given := [name for name, value in refused.items() if value]:
            raise PolicyError(f"`target_parameters` does not go with `{given[0]}`: PEFT has none on a parameter.")
        if policy.quantization != "none":
            raise PolicyError(
                f"Expected quantization=none with `target_parameters` but got {policy.quantization}: only layers are "
                "quantised, so these parameters would stay in 16 bits."
            )


def check_can_shard(model: BaseModel) -> None:
    """See that the weights of a model, a policy's or a reference's, can be sharded.

    Raises:
        PolicyError: for weights of LLM.int8(), whose scales would not be found again.
    """
    if model.quantization == "int8":
        raise PolicyError(
            f"`policy.shard` does not go with `{model.option}.quantization` int8: its weights do not come in parts. "
            "Use nf4 or none."
        )


def check_choices(policy: LoRAPolicy, config: PreTrainedConfig) -> None:
    """See that what the options choose is there, on the model without weights: PEFT leaves out in silence what is not.

    Args:
        policy: with a fresh adapter.
        config: of its model.

    Raises:
        PolicyError: naming the option and what is not there.
    """
    if all(not getattr(policy, name) and getattr(policy, name) != 0 for name in _CHOOSING):
        return
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    _check_tokens(policy, config)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=policy.trust_remote_code)
        layers = [name for name, _ in skeleton.named_modules()]
        with as_policy_error("adapters as the options say"):
            model = get_peft_model(skeleton, policy.lora_config()).get_base_model()
    for module in model.modules():  # PEFT's product with changed rows has none
        if hasattr(module, "token_adapter") and getattr(module.token_adapter.base_layer, "bias", None) is not None:
            raise PolicyError(
                "`trainable_token_indices`: this model's head shares them and has a bias, which PEFT drops."
            )
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(policy, name) or {}:  # as PEFT compares
            _expect(any(re.fullmatch(rf"(.*\.)?({key})", one) for one in adapted), name, key, adapted)
    excluded = policy.exclude_modules or []
    for one in [excluded] if (is_pattern := isinstance(excluded, str)) else excluded:
        names = (re.fullmatch(one, n) if is_pattern else n == one or n.endswith(f".{one}") for n in layers)
        _expect(any(names), "exclude_modules", one, adapted)
    numbers = policy.layers_to_transform
    for number in [] if numbers is None else [numbers] if isinstance(numbers, int) else numbers:
        _expect(any(f".{number}." in name for name in adapted), "layers_to_transform", number, adapted)
    found = {_parameter(name, module) for name, module in model.named_modules() if hasattr(module, "parameter_name")}
    for one in policy.target_parameters or []:
        _expect(any(name == one or name.endswith(f".{one}") for name in found), "target_parameters", one, adapted)


def _check_tokens(policy: LoRAPolicy, config: PreTrainedConfig) -> None:
    """They are ids of the vocabulary, each once."""
    from lit_dpo.policy.limits import skeleton_limits

    if (tokens := policy.trainable_token_indices) is None:
        return
    vocabulary = skeleton_limits(config, policy.trust_remote_code).vocabulary
    if wrong := [one for one in tokens if not 0 <= one < vocabulary]:
        raise PolicyError(f"Expected `trainable_token_indices` from 0 to {vocabulary - 1} but got {wrong[0]}.")
    if len(set(tokens)) != len(tokens):
        raise PolicyError("Expected `trainable_token_indices` to name each token once.")


def _parameter(name: str, module: Any) -> str:
    """Of a parameter with an adapter; several of one module are wrapped in one another."""
    return f"{name.replace('.base_layer', '')}.{module.parameter_name}"


def _expect(there: bool, name: str, one: Any, adapted: list[str]) -> None:
    if not there:
        some = ", ".join(adapted[:3])
        raise PolicyError(f"`{name}`: {one!r} chooses nothing among the layers with an adapter ({some}, …).")
