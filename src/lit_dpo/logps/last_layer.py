"""The last layer's MLP, for the rows that are scored alone: nothing reads what it makes of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def last_mlp_on(backbone: Any, needed: Tensor) -> Iterator[None]:
    """Let the last layer's MLP see the `needed` rows; the others come out as zeros.

    Nothing after it mixes tokens, so those zeros are not read. Measured with four layers, it saves 8 % of a step where
    prompts are 83 % of the tokens and 4 % where they are 30 %; with more layers less.

    Args:
        backbone: a transformers decoder; one whose last layer has no `mlp` of `(1, T, H)` runs as it is.
        needed: `(M,)` positions in the row, each once.
    """
    layers = getattr(backbone, "layers", None)
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    if mlp is None or _is_checkpointing(backbone):  # which runs it again, after this context
        yield
        return
    lengths: list[int | None] = []

    def cut(module: Any, inputs: tuple[Tensor, ...]) -> Any:
        fits = bool(inputs) and inputs[0].ndim == 3
        lengths.append(inputs[0].shape[1] if fits else None)
        return (inputs[0].index_select(1, needed), *inputs[1:]) if fits else None

    def restore(module: Any, inputs: Any, output: Any) -> Any:
        if (length := lengths.pop()) is None:
            return None
        rows, *others = output if isinstance(output, tuple) else (output,)  # experts return their router's scores too
        whole = rows.new_zeros(1, length, rows.shape[-1]).index_copy(1, needed, rows.view(1, len(needed), -1))
        return (whole, *others) if isinstance(output, tuple) else whole

    hooks = [mlp.register_forward_pre_hook(cut), mlp.register_forward_hook(restore)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_checkpointing(backbone: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules())
