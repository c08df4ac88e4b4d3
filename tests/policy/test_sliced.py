"""Products with 4-bit weights in slices are those of bitsandbytes, in less memory."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from lit_dpo.memory import LiveBytes
from lit_dpo.policy import sliced
from lit_dpo.policy.sliced import SlicedLinear4bit, multiply_in_slices
from training import module


def _layers(inputs, outputs, bias=True, double=True, dtype=torch.float32):
    """bitsandbytes' layer, and ours with the same weights."""
    torch.manual_seed(0)
    plain = bnb.nn.Linear4bit(
        inputs, outputs, bias=bias, compute_dtype=dtype, quant_type="nf4", compress_statistics=double
    )
    plain = plain.to("cpu")  # packs
    plain.support_avx512bf16_for_cpu = False
    ours = SlicedLinear4bit.__new__(SlicedLinear4bit)
    ours.__dict__ = plain.__dict__
    return plain, ours


def _pass(layer, x):
    x = x.clone().requires_grad_()
    out = layer(x)
    (gradient,) = torch.autograd.grad(out, x, torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    return out, gradient


@pytest.mark.parametrize("shape", [(64, 48), (128, 8), (64, 5000), (192, 3001), (40, 16), (7, 9)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double", [True, False])
def test_values_and_gradients_are_those_of_bitsandbytes(monkeypatch, shape, bias, double):
    monkeypatch.setattr(sliced, "SLICE", 2**18)  # several slices, the last one short
    with torch.compiler.set_stance("force_eager"):  # else 7 x 9 numbers, no whole block, are waited for 20 s long
        plain, ours = _layers(*shape, bias=bias, double=double)
        x = torch.randn(2, 5, shape[0])
        for found, expected in zip(_pass(ours, x), _pass(plain, x), strict=True):
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_computation_is_kept_and_that_of_the_input_is_given_back(dtype):
    plain, ours = _layers(64, 96, dtype=dtype)
    x = torch.randn(3, 64)
    for found, expected in zip(_pass(ours, x), _pass(plain, x), strict=True):
        assert found.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_autocast_does_not_reach_into_it():
    _, ours = _layers(64, 96)
    x = torch.randn(3, 64)
    expected = ours(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=0)


def test_no_more_than_slices_are_unpacked_at_once():
    plain, ours = _layers(1024, 4096)
    x = torch.randn(1, 16, 1024, requires_grad=True)
    peaks = {}
    for name, layer in (("plain", plain), ("ours", ours)):
        with LiveBytes() as memory:
            layer(x).sum().backward()
        peaks[name] = memory.peak
    assert peaks["plain"] > 16 * 2**20  # the whole weight
    assert peaks["ours"] < 3 * sliced.SLICE


def test_a_policy_in_4_bits_multiplies_so(tiny_model):
    model = module(tiny_model, policy={"quantization": "nf4"}).policy.load()
    kinds = {type(module) for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert kinds == {SlicedLinear4bit}
    multiply_in_slices(model)  # again: nothing
    assert {type(m) for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)} == kinds
