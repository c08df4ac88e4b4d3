"""The flat row on a GPU is one sequence at a time: values and LoRA gradients, whatever the type and the weights."""

from __future__ import annotations

import pytest
import torch

import tiny
from lit_dpo import LoRAPolicy
from lit_dpo.data.batch import collate
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.probe import without_outliers
from lit_dpo.logps.score import base_model, completion_logps

pytestmark = pytest.mark.gpu
# Beyond the kernel's blocks of 128, answers of one token, pairs that are nothing but short.
PAIRS = tiny.pairs((150, 90, 40), (9, 14, 70, 33), (1, 1, 3), (170, 1, 130))
SIZES = {"hidden_size": 128, "intermediate_size": 128, "max_position_embeddings": 512}
HEADS = {**SIZES, "head_dim": 32}
SHAPES = {
    "llama": HEADS,
    "mistral-window": {**HEADS, "sliding_window": 33},
    "qwen2-window": {**SIZES, "sliding_window": 33},
    "qwen3": HEADS,
    "gemma2": {**HEADS, "sliding_window": 33},
    "opt-projected": {"hidden_size": 128, "max_position_embeddings": 512},
    "gpt2": {"n_embd": 128, "n_positions": 512},
}
WITHOUT_KERNEL = ("gemma2",)  # its soft-cap


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models on disk, in bfloat16 numbers, so that every dtype loads the same weights."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("models") / name
            model = tiny.model(name, **SHAPES[name])
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16().float()
            model.save_pretrained(made[name])
            tiny.tokenizer().save_pretrained(made[name])
        return made[name]

    return folder


def _policy(folder, gpu, dtype, layout, **options):
    model = LoRAPolicy(str(folder), **{"quantization": "none", "r": 4, **options}).load(gpu, dtype)
    tiny.randomize(model, scale=0.02)
    if layout == "flat":
        assert choose_layout(model) == "flat"
    return model


def _scored(model, alone=False):
    """Log-probs per token and the gradients of a weighted sum, on the CPU."""
    with without_outliers(base_model(model)):
        if alone:
            parts = tiny.one_at_a_time(model, PAIRS)
            tokens, totals = torch.cat(parts), torch.stack([part.sum() for part in parts])
        else:
            found = completion_logps(model, collate(PAIRS).to(model.device))
            tokens, totals = found.per_token, found.total
        tiny.weighted(totals).backward()
    return tokens.detach().cpu(), {name: one.cpu() for name, one in tiny.gradients(model).items()}


def _apart(found, expected):
    """Nats per token, on average, and the distance of the gradients compared with their length."""
    mine, theirs = (torch.cat([one[name].flatten() for name in expected[1]]) for one in (found[1], expected[1]))
    return float((found[0] - expected[0]).abs().mean()), float((mine - theirs).norm() / theirs.norm())


def _assert_is_one_at_a_time(folder, gpu, dtype, kernel_calls, **options):
    """As far from float32 as one sequence at a time in this dtype, or nearer; rounding does not know the layout."""
    twin = {name: one for name, one in options.items() if name != "gradient_checkpointing"}
    truth = _scored(_policy(folder, gpu, torch.float32, "alone", **twin), alone=True)
    alone = _scored(_policy(folder, gpu, dtype, "alone", **twin), alone=True)
    model = _policy(folder, gpu, dtype, "flat", **options)
    kernel_calls.clear()
    flat = _scored(model)
    for what, found, expected in zip(("values", "gradients"), _apart(flat, truth), _apart(alone, truth), strict=True):
        assert found <= 2 * expected + 1e-4, f"{what}: {found:.2g} from float32, one sequence at a time {expected:.2g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_flat_row_is_one_sequence_at_a_time(name, dtype, gpu, folders, kernel_calls):
    _assert_is_one_at_a_time(folders(name), gpu, dtype, kernel_calls)
    takes = dtype != torch.float32 and name not in WITHOUT_KERNEL
    assert set(kernel_calls) == ({dtype} if takes else set())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_quantised_weights(name, quantization, gpu, folders, kernel_calls):
    _assert_is_one_at_a_time(folders(name), gpu, torch.bfloat16, kernel_calls, quantization=quantization)
    assert kernel_calls


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradient_checkpointing_runs_each_layer_twice(quantization, gpu, folders, kernel_calls):
    options = {"gradient_checkpointing": True, "quantization": quantization}
    _assert_is_one_at_a_time(folders("llama"), gpu, torch.bfloat16, kernel_calls, **options)
    assert len(kernel_calls) == 4
