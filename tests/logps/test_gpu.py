"""The same laws on a CUDA device, where the pair attention is one variable-length kernel per layer."""

from __future__ import annotations

import pytest
import torch

import tiny
from lit_dpo.data.batch import collate_pairs
from lit_dpo.logps import attention
from lit_dpo.logps.score import choose_layout, pair_logps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PAIRS = ((9, 14, 6), (3, 5, 11))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gpt2"])
def test_the_kernel_equals_padded_rows_in_bfloat16(architecture, monkeypatch):
    calls, varlen = [], attention._varlen
    monkeypatch.setattr(attention, "_varlen", lambda *given: calls.append(1) or varlen(*given))
    batch = collate_pairs(tiny.pairs(*PAIRS)).to("cuda")
    found = {}
    for layout in ("pairs", "sdpa"):
        model = tiny.model(architecture).to("cuda", torch.bfloat16)
        choose_layout(model, layout)
        chosen, rejected = pair_logps(model, batch)
        (chosen.total.sum() - rejected.total.sum()).backward()
        gradient = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
        found[layout] = (torch.cat([chosen.total, rejected.total]), gradient)
    assert calls, "the variable-length kernel ran"
    torch.testing.assert_close(found["pairs"][0], found["sdpa"][0], rtol=2e-2, atol=0.5)
    assert torch.nn.functional.cosine_similarity(found["pairs"][1], found["sdpa"][1], dim=0) > 0.99


def test_float32_on_the_device_is_exact():
    model = tiny.model("llama").to("cuda")
    batch = collate_pairs(tiny.pairs(*PAIRS)).to("cuda")
    assert choose_layout(model) == "flat"
    flat = pair_logps(model, batch)
    choose_layout(model, "sdpa")
    padded = pair_logps(model, batch)
    torch.testing.assert_close(flat[0].total, padded[0].total, rtol=0, atol=1e-3)
    torch.testing.assert_close(flat[1].total, padded[1].total, rtol=0, atol=1e-3)
