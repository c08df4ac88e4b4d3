"""The last layer's MLP, for the rows that are scored alone: nothing reads what it makes of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def last_mlp_on(backbone: Any, needed: Tensor) -> Iterator[None]:
    """Let the last layer's MLP see the `needed` rows; the others come out as zeros.

    A layer after it reads rows of other tokens in its attention, the final norm and the head read each row alone. With
    four layers and prompts of 80 % of the tokens this saves a tenth of a step, with more layers less.

    Args:
        backbone: a transformers decoder; one whose last layer has no `mlp` runs as it is.
        needed: `(M,)` positions in the flattened rows, each once.
    """
    mlp = getattr(next(iter(reversed(getattr(backbone, "layers", None) or [])), None), "mlp", None)
    if mlp is None or getattr(backbone, "gradient_checkpointing", False):  # which runs it again, after this context
        yield
        return

    def cut(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes.append(inputs[0].shape)
        return (inputs[0].flatten(0, 1)[needed].unsqueeze(0), *inputs[1:])

    def restore(module: Any, inputs: Any, output: Any) -> Any:
        rows, *others = output if isinstance(output, tuple) else (output,)
        shape = shapes.pop()
        whole = rows.new_zeros(shape[0] * shape[1], rows.shape[-1]).index_copy(0, needed, rows.flatten(0, -2))
        whole = whole.view(*shape[:2], -1)
        return (whole, *others) if isinstance(output, tuple) else whole

    shapes: list[Any] = []
    hooks = [mlp.register_forward_pre_hook(cut), mlp.register_forward_hook(restore)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
