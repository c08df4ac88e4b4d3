"""Where a causal language model is cut: its backbone, and what it does after it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lit_dpo.errors import PolicyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_head(model: PreTrainedModel) -> nn.Module:
    """Return what a transformers causal LM does after its backbone: head, soft-cap, logit scale, adapters on them.

    It is the model's own `forward` with the backbone replaced by one that returns what it is given, on a shallow copy
    that shares every parameter, so that no architecture's arithmetic is written here a second time.
    """
    return _Head(_replace(model, backbone(model), _Given()))


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a transformers causal LM that turns token ids into hidden states.

    What the model calls its decoder, unless that is the model itself (Llama 4) or its last layer (ModernBERT); then the
    one whole model inside it.

    Raises:
        PolicyError: if it cannot be told from the head.
    """
    from transformers import PreTrainedModel

    found = model.get_decoder()
    if found is not model and "input_ids" in arguments(found):
        return found
    inside = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(inside) != 1:
        raise PolicyError(f"{type(model).__name__} does not tell its backbone from its head, so it cannot be scored.")
    return inside[0]


def arguments(module: nn.Module) -> frozenset[str]:
    """Name what a module's `forward` takes; it is asked in every pass."""
    # of its class; one that somebody has put onto the module itself may be another the next time
    function = getattr(module.forward, "__func__", None)
    return frozenset(inspect.signature(module.forward).parameters) if function is None else _names(function)


@lru_cache(maxsize=64)
def _names(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


class _Head(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, states: Tensor) -> Tensor:
        # as if they were the embeddings of one sequence, which `_Given` hands through
        logits: Tensor = self.model(inputs_embeds=states.unsqueeze(0), use_cache=False).logits
        return logits.squeeze(0)  # the backward of an index fills a tensor as large as the logits


class _Given(nn.Module):
    """A backbone that returns its input embeddings as its last hidden state."""

    # models also pass positions, masks and caches on, of which nothing is computed here
    def forward(self, input_ids: Tensor | None = None, *, inputs_embeds: Tensor, **_: Any) -> Any:
        return _output_type()(last_hidden_state=inputs_embeds)


@cache
def _output_type() -> type[Any]:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class GivenOutput(BaseModelOutputWithPast):
        """Heads copy what else their backbone returns (router logits, caches, …) into their own output: nothing."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return GivenOutput


def _replace(module: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Shallow copies of the modules on the way down to `old`, with `new` in its place."""
    if module is old:
        return new
    for name, child in module.named_children():
        if any(found is old for found in child.modules()):
            clone = copy.copy(module)
            # `_modules`, `_parameters`, `_buffers` and hooks; what is in them stays shared
            registries = {key: copy.copy(own) for key, own in vars(module).items() if isinstance(own, dict)}
            vars(clone).update(registries)  # the copy shares them: another child would be the module's too
            setattr(clone, name, _replace(child, old, new))
            return clone
    raise ValueError(f"{type(module).__name__} does not hold its decoder")
