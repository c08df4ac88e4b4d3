"""How many tokens a model knows, and how far it can read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from lit_dpo.policy.settings import rope_limit

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from lit_dpo.policy import BaseModel


class Limits(NamedTuple):
    """What a model's tables hold.

    Attributes:
        vocabulary: ids from 0 that have an embedding and an output.
        context: most tokens of a sequence, by the tables of positions, or because longer ones would move their batch
            mates. None: positions are computed, each by itself.
        made_for: most tokens of a sequence that the model was made for, as its configuration says. None: it does not.
    """

    vocabulary: int
    context: int | None
    made_for: int | None


def limits(model: PreTrainedModel) -> Limits:
    """Of a model, with weights or on the meta device, seen in its tables and not in its name.

    Args:
        model: a transformers model for causal language modelling, or a PEFT model of one.
    """
    config = model.config.get_text_config()
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    sizes = [_rows(inputs), getattr(outputs, "out_features", None)]
    made_for = getattr(config, "max_position_embeddings", None)
    made_for = made_for if isinstance(made_for, int) and made_for > 0 else None
    found = [] if made_for is None else _position_tables(model, inputs, made_for)
    if (rope := rope_limit(config)) is not None:  # beyond it positions depend on batch mates
        found.append(rope.tokens)
    return Limits(min(size for size in sizes if size), min(found, default=None), made_for)


def policy_limits(policy: BaseModel) -> Limits:
    """Of the model that a policy or a reference would load, by its configuration: without weights."""
    return skeleton_limits(policy.config(), policy.trust_remote_code)


def skeleton_limits(config: PreTrainedConfig, trust_remote_code: bool = False) -> Limits:
    """Of the model that a configuration describes."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return limits(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))


def _rows(table: Any) -> int | None:
    return int(table.weight.shape[0]) if getattr(table, "weight", None) is not None else None


def _position_tables(model: PreTrainedModel, inputs: nn.Module, made_for: int) -> list[int]:
    """How many positions each table of the model has: learned ones, and what is worked out ahead and kept."""
    found = []
    tokens = set(inputs.modules())  # the table itself may be in an adapter
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module not in tokens:
            # OPT leaves the first rows out, and RoBERTa those up to its padding
            offset = getattr(module, "offset", 0) or (module.padding_idx or -1) + 1
            if module.num_embeddings - offset <= made_for <= module.num_embeddings:
                found.append(module.num_embeddings - offset)
        for name, table in module.named_buffers(recurse=False):  # sines by position; those of RoPE grow
            if table.ndim > 1 and table.shape[0] == made_for and not name.lstrip("_").startswith(("cos", "sin")):
                found.append(made_for)
    return found
