"""Products with 4-bit weights on a CPU, a slice of the weight at a time.

bitsandbytes unpacks a weight whole, in each pass, to multiply it once. A slice that is unpacked and multiplied while it
is in the processor's cache is faster (2 to 3 times for short rows and large weights, no slower for long ones), and in
the heap it leaves no holes of whole weights between the activations that stay: a step of OPT-350m took a third more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_blockwise
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn


SLICE = 2 * 2**20
"""Bytes of an unpacked slice. From 2 MiB on products are as fast as they get (weights of 4 to 64 MiB, 32 to 1024
tokens); larger slices leave holes between activations, which smaller tensors break up."""


class SlicedLinear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' layer; on a CPU with its product in slices."""

    def forward(self, x: Tensor) -> Tensor:
        """`(…, in)` to `(…, out)`, in the layer's dtype of computation, given back in that of `x`."""
        state = getattr(self.weight, "quant_state", None) or self.quant_state  # a gathered weight has none
        if x.device.type != "cpu" or not _fits(state) or x.numel() == 0:
            return super().forward(x)  # type: ignore[no-any-return]
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(x.to(dtype), self.weight.data, state, bias).to(x.dtype)  # type: ignore[no-any-return, no-untyped-call]


def multiply_in_slices(model: nn.Module) -> None:
    """Let the 4-bit layers of a model multiply so, wherever they are on a CPU when they do."""
    for module in model.modules():
        if type(module) is bnb.nn.Linear4bit:
            module.__class__ = SlicedLinear4bit


def _fits(state: Any) -> bool:
    """Whether each row of the weight has scales of its own, as in all but odd widths."""
    return state is not None and len(state.shape) == 2 and state.shape[1] % state.blocksize == 0


class _Product(torch.autograd.Function):
    """`x · Wᵀ + b` with a frozen packed weight; its gradient is of `x` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, state: Any, bias: Tensor | None) -> Tensor:
        ctx.packed, ctx.state = packed, state
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(len(rows), state.shape[0])
        with torch.autocast("cpu", enabled=False):
            for place, weight in _slices(packed, state, x.dtype):
                if bias is None:
                    torch.mm(rows, weight.t(), out=out[:, place])
                else:
                    torch.addmm(bias[place], rows, weight.t(), out=out[:, place])
        return out.view(*x.shape[:-1], state.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        rows = gradient.reshape(-1, gradient.shape[-1])
        out = rows.new_zeros(len(rows), ctx.state.shape[1])
        with torch.autocast("cpu", enabled=False):
            for place, weight in _slices(ctx.packed, ctx.state, gradient.dtype):
                out.addmm_(rows[:, place], weight)
        return out.view(*gradient.shape[:-1], ctx.state.shape[1]), None, None, None


def _slices(packed: Tensor, state: Any, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Places among the weight's outputs, and the weight of each, `(outputs, in)`, unpacked; each until the next."""
    outputs, width = state.shape
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    scales = scales.float().view(outputs, width // state.blocksize)
    packed = packed.view(torch.uint8).view(outputs, width // 2)
    count = max(1, SLICE // (width * dtype.itemsize))
    for start in range(0, outputs, count):
        place = slice(start, min(start + count, outputs))
        shape = (place.stop - start, width)
        part = packed[place].reshape(-1, 1), scales[place].reshape(-1)
        yield place, torch.ops.bitsandbytes.dequantize_4bit(*part, state.blocksize, state.quant_type, shape, dtype)
