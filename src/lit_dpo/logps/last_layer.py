"""The last layer, for the rows that are scored alone: of a prompt nothing but its keys and values is read there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch import nn


# not keys and values: completions read those of every prompt token
_ROW_BY_ROW = ("self_attn.q_proj", "self_attn.o_proj", "mlp")


@contextmanager
def last_layer_on(backbone: nn.Module, needed: Tensor) -> Iterator[None]:
    """Let the last layer ask, project and transform the `needed` rows alone; of the others come zeros.

    Nothing after it mixes tokens, so those zeros are not read, and nobody reads the answer to a query of zeros. Parts
    that a layer does not have under these names run as they are. Measured with four layers and prompts of 82 % of the
    tokens, the MLP's rows save 8 % of a step and the projections' 2 %; with more layers less.

    Args:
        backbone: a transformers decoder.
        needed: `(M,)` positions in the row, each once.
    """
    layers = getattr(backbone, "layers", None)
    if not layers or _is_checkpointing(backbone, layers[-1]):  # which runs it again, after this context
        yield
        return
    hooks = [hook for name in _ROW_BY_ROW for hook in _hooks(_part(layers[-1], name), needed)]
    try:
        yield
    finally:
        # other passes of this model, `generate` or padded rows, read every position
        for hook in hooks:
            hook.remove()


def _part(layer: nn.Module, name: str) -> Any:
    try:
        return attrgetter(name)(layer)
    except AttributeError:
        return None


def _hooks(part: nn.Module, needed: Tensor) -> list[Any]:
    """Cut the rows of what goes in, and put those of what comes out back in their places."""
    if part is None:
        return []
    # one entry per call, from the hook before it to the one after it; None: this call runs as it is
    lengths: list[int | None] = []

    def cut(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        # not a part that is given its states by keyword, or rows already flattened
        fits = bool(inputs) and inputs[0].ndim == 3
        lengths.append(inputs[0].shape[1] if fits else None)
        return (inputs[0][:, needed], *inputs[1:]) if fits else None

    def restore(module: nn.Module, inputs: Any, output: Any) -> Any:
        if (length := lengths.pop()) is None:
            return None
        rows, *others = output if isinstance(output, tuple) else (output,)  # experts return their router's scores too
        # each position once, or it would be left to chance which of its rows stays
        whole = rows.new_zeros(1, length, rows.shape[-1]).index_copy(1, needed, rows.view(1, len(needed), -1))
        return (whole, *others) if isinstance(output, tuple) else whole

    return [part.register_forward_pre_hook(cut), part.register_forward_hook(restore)]


def _is_checkpointing(backbone: nn.Module, last: nn.Module) -> bool:
    # the flag is on the decoder or on its layers, as the architecture has it; all of its modules would be a long walk
    return any(getattr(module, "gradient_checkpointing", False) for module in (backbone, *last.modules()))
