"""Liger's kernels: the model's own numbers and gradients, in one model, and off again without a trace."""

from __future__ import annotations

import copy
import json
import re
import sys

import pytest
import torch

import tiny
from interpreted import interpreter  # noqa: F401 - a fixture
from lit_dpo import LoRAPolicy
from lit_dpo.checkpoint.identity import describe
from lit_dpo.errors import PolicyError
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.score import completion_logps
from lit_dpo.policy import kernels
from lit_dpo.policy.kernels import kernels_of, use_kernels, without_kernels
from lit_dpo.references import BaseReference, CachedReference
from training import adapter, data, module, trainer

# What each architecture gets; whatever else is in `tiny` gets none.
KNOWN = {
    "llama": "LlamaAttention, LlamaMLP, LlamaRMSNorm",
    "llama-tied": "LlamaAttention, LlamaMLP, LlamaRMSNorm",
    "mistral-window": "MistralAttention, MistralMLP, MistralRMSNorm",
    "qwen2-window": "Qwen2Attention, Qwen2MLP, Qwen2RMSNorm",
    "qwen3": "Qwen3Attention, Qwen3MLP, Qwen3RMSNorm",
    "gemma2": "Gemma2Attention, Gemma2MLP, Gemma2RMSNorm",
    "gemma3": "Gemma3Attention, Gemma3MLP, Gemma3RMSNorm",
    "phi3": "Phi3Attention, Phi3MLP, Phi3RMSNorm",
    "mixtral": "MixtralAttention, MixtralRMSNorm",  # experts stay as they are
    "mixtral-router-logits": "MixtralAttention, MixtralRMSNorm",
    "granite-logits-scaling": "GraniteAttention, GraniteMLP, GraniteRMSNorm",
    "olmo2": "Olmo2Attention, Olmo2MLP, Olmo2RMSNorm",
    "olmo3": "Olmo3Attention, Olmo3MLP, Olmo3RMSNorm",
    "gpt-oss": "GptOssAttention, GptOssRMSNorm",
    "llama4": "Llama4TextAttention, Llama4TextMLP, Llama4TextRMSNorm",
}
PROJECTIONS = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
BATCH = tiny.batch((4, 3, 2), (1, 2, 4))


def _model(name="llama", **changes):
    """With an adapter; PEFT can neither adapt the router of Llama 4 nor what Mamba puts out."""
    targets = {"llama4": PROJECTIONS, "mamba": ["in_proj"]}.get(name, "all-linear")
    return tiny.lora(tiny.model(name, **changes), targets=targets)


def _scored(model, batch=BATCH):
    found = completion_logps(model, batch)
    tiny.weighted(found.total).backward()
    return found.per_token.detach(), tiny.gradients(model)


def _said(model):
    with tiny.records("lit_dpo.logps.choice") as lines:
        choose_layout(model)
    return [line.getMessage() for line in lines if "Liger" in line.getMessage()]


def _assert_same(model, plain, batch=BATCH, tolerance=1e-5):
    found, gradients = _scored(model, batch)
    truth, plain_gradients = _scored(plain, batch)
    torch.testing.assert_close(found, truth, rtol=0, atol=tolerance)
    tiny.assert_same_gradients(gradients, plain_gradients, tolerance)


@pytest.mark.parametrize("name", sorted(tiny.FLAT | tiny.PADDED))
def test_numbers_and_gradients_are_the_models_own(name, interpreter):  # noqa: F811
    changes = {} if name not in KNOWN or name == "llama" else {"num_hidden_layers": 1}
    plain, model = (_model(name, **changes) for _ in range(2))
    choose_layout(plain)
    base = model.get_base_model()
    use_kernels(base)
    assert str(kernels_of(base) or "") == KNOWN.get(name, "")
    if name not in KNOWN:
        assert _said(model) == []
        return
    assert _said(model) == [f"{type(base).__name__}: Liger's kernels in {KNOWN[name]}."]
    assert kernels_of(base).on
    _assert_same(model, plain)
    with without_kernels(base):
        assert torch.equal(_scored(model)[0], _scored(plain)[0]), "to the last bit"
        for module, untouched in zip(model.modules(), plain.modules(), strict=True):
            assert vars(module).keys() - {"lit_dpo_kernels"} == vars(untouched).keys(), type(module).__name__
    assert kernels_of(base).on


def test_what_is_shared_with_other_models_stays_as_it_was(interpreter):  # noqa: F811
    """Functions and classes of transformers' source, methods of its classes, and what torch has."""

    def shared():
        sources = {name: module for name, module in [*sys.modules.items()] if name.startswith("transformers.models.")}
        classes = {found for module in sources.values() for found in vars(module).values() if isinstance(found, type)}
        return {thing: dict(vars(thing)) for thing in (*sources.values(), *classes, torch.nn.functional, torch.nn)}

    for name in KNOWN:
        model = tiny.model(name)
        before = shared()
        use_kernels(model)
        for thing, names in before.items():
            now = vars(thing)
            assert [each for each in names if now.get(each) is not names[each]] == [], thing
        assert kernels_of(model).on


@pytest.mark.parametrize(("name", "field"), [("llama", "hidden_act"), ("gemma2", "hidden_activation")])
def test_an_mlp_with_another_activation_keeps_its_own(name, field, interpreter):  # noqa: F811
    """Liger takes it for granted; the exact GELU is within 16 bits' tolerance of the one it has."""
    model, plain = _model(name, **{field: "gelu"}), _model(name, **{field: "gelu"})
    use_kernels(model.get_base_model())
    choose_layout(plain)
    (line,) = _said(model)
    assert "RMSNorm" in line
    assert "MLP" not in line
    _assert_same(model, plain)


def _off(_, hidden):
    return 1.01 * hidden


def _wrong_derivative(module, hidden):
    right = type(module).forward(module, hidden)
    return 2 * right - right.detach()


def _broken(_, hidden):
    raise RuntimeError("no image for this device.\nA trace follows")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (_off, r"log-probs are off by \S+ nats per token \(tolerance 0.001\)"),
        (_wrong_derivative, r"gradients are off by \S+ of their size \(tolerance 0.01\)"),
        (_broken, r"no image for this device"),
    ],
)
def test_a_kernel_that_does_not_fit_is_taken_off_in_one_line(kernel, reason, interpreter, monkeypatch):  # noqa: F811
    """A kernel of that kind in Liger's place, under the name that patched norms have."""
    from liger_kernel.transformers import monkey_patch

    kernel.__qualname__ = "LigerRMSNorm.forward"
    monkeypatch.setattr(monkey_patch.LigerRMSNorm, "forward", kernel)
    model, plain = _model(), _model()
    use_kernels(model.get_base_model())
    (line,) = _said(model)
    assert re.fullmatch(rf"LlamaForCausalLM: no kernels of Liger: {reason}\.", line), line
    assert not kernels_of(model.get_base_model()).on
    choose_layout(plain)
    assert torch.equal(_scored(model)[0], _scored(plain)[0])


def test_a_liger_that_does_not_know_this_transformers_changes_nothing(interpreter, monkeypatch):  # noqa: F811
    """It stops in the middle: what it had patched by then is put back."""
    from liger_kernel.transformers import monkey_patch

    def stop(*_):
        raise AttributeError("no gate_proj")

    monkeypatch.setattr(monkey_patch, "_patch_swiglu_module", stop)
    model = tiny.model()
    before = [dict(vars(module)) for module in model.modules()]
    with tiny.records("lit_dpo.policy.kernels") as lines:
        use_kernels(model)
    assert [line.getMessage() for line in lines] == ["LlamaForCausalLM: Liger's kernels are not used: no gate_proj"]
    assert kernels_of(model) is None
    assert [dict(vars(module)) for module in model.modules()] == before


def test_a_copy_has_kernels_on_its_own_weights_and_a_cpu_the_plain_code(interpreter, monkeypatch):  # noqa: F811
    model, plain = _model(), _model()
    use_kernels(model.get_base_model())
    choose_layout(model)
    choose_layout(plain)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    _assert_same(twin, plain)
    monkeypatch.setattr(kernels, "_DEVICES", ("cuda",))
    assert torch.equal(_scored(twin)[0], _scored(plain)[0]), "as after training, when the model is on the CPU"


def test_answers_are_generated_as_without(interpreter):  # noqa: F811
    """With a cache of keys, which attention fills."""
    model, plain = tiny.model(), tiny.model()
    use_kernels(model)
    prompt = torch.tensor([[5, 6, 7, 8]])
    settings = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}
    assert torch.equal(model.generate(prompt, **settings), plain.generate(prompt, **settings))


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_policys_layers_of_any_kind_take_them(quantization, checkpointing, tmp_path, interpreter):  # noqa: F811
    tiny.directory(tmp_path)
    given = {"quantization": quantization, "r": 2}
    found = []
    for choice in ("auto", "none"):
        torch.manual_seed(0)
        model = LoRAPolicy(str(tmp_path), kernels=choice, gradient_checkpointing=checkpointing, **given).load()
        tiny.randomize(model)
        said = _said(model)
        assert [line.partition(": ")[2] for line in said] == [f"Liger's kernels in {KNOWN['llama']}."] * (
            choice == "auto"
        )
        found.append(model)
    _assert_same(*found, tolerance=1e-4)


def test_a_whole_run_has_the_same_steps_and_a_cache_of_its_own(tiny_model, pairs_file, tmp_path, interpreter):  # noqa: F811
    """A remembered log-prob is what the kernels gave; which run it was is not part of a checkpoint's identity."""
    found, folder = {}, tmp_path / "cache"
    for choice in ("none", "auto"):
        reference = CachedReference(BaseReference(), directory=str(folder))
        dpo = module(tiny_model, policy={"kernels": choice, "r": 2}, reference=reference)
        with tiny.records("lit_dpo.logps.choice") as lines:
            trainer(tmp_path, max_steps=2).fit(dpo, data(pairs_file, batch_size=2))
        assert [line.getMessage().partition(": ")[2] for line in lines] == [f"Liger's kernels in {KNOWN['llama']}."] * (
            choice == "auto"
        )
        found[choice] = adapter(dpo)
        assert "kernels" not in describe(dpo)["policy"]
        compute = [json.loads(file.read_text())["compute"] for file in folder.rglob("reference.json")]
        assert sorted("liger-kernel" in one for one in compute) == [False, True][: len(found)]
    tiny.assert_same_gradients(found["auto"], found["none"], 1e-3)


def test_without_a_gpu_auto_does_nothing(tiny_model):
    policy = LoRAPolicy(str(tiny_model), quantization="none", r=2)
    assert policy.kernels == "auto"
    assert kernels_of(policy.load().get_base_model()) is None


def test_another_choice_is_refused():
    with pytest.raises(PolicyError, match="Expected `kernels` among auto, none but got 'liger'"):
        LoRAPolicy("x", kernels="liger")


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(KNOWN))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_device_too(gpu, name, dtype):
    if gpu.type == "cpu":
        pytest.skip("Liger's kernels run on a GPU alone; the tests above interpret them")
    pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
    plain, model = (_model(name).to(gpu) for _ in range(2))
    for one in (plain, model):
        for parameter in one.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    use_kernels(model.get_base_model())
    choose_layout(plain)
    assert _said(model) == [f"{type(model.get_base_model()).__name__}: Liger's kernels in {KNOWN[name]}."]
    exact = dtype == torch.float32
    found, truth = (_scored(one, BATCH.to(gpu))[0] for one in (model, plain))
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-3 if exact else 0.5)
