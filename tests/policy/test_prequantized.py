"""Weights that are quantised already: the policy says what they are, or stops."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tiny
from lit_dpo.errors import PolicyError
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.score import completion_logps
from lit_dpo.policy import LoRAPolicy
from lit_dpo.policy.checks import keep_trainable

BATCH = tiny.batch()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.directory(tmp_path_factory.mktemp("model") / "base", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def saved(folder):
    """The same model as bitsandbytes has quantised it, in three ways, computing in half precision."""

    def save(name, **options):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))
        model.save_pretrained(folder.parent / name)
        tiny.tokenizer().save_pretrained(folder.parent / name)
        return folder.parent / name

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return {
        ("nf4", True): save("double", **nf4, bnb_4bit_use_double_quant=True),
        ("nf4", False): save("single", **nf4),
        ("int8", True): save("int8", load_in_8bit=True),
        "fp4": save("fp4", load_in_4bit=True),
    }


def _totals(model):
    choose_layout(model)
    return completion_logps(model, BATCH).total.detach()


KINDS = [("nf4", True), ("nf4", False), ("int8", True)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_agrees_with_its_weights_loads_and_trains(saved, kind):
    policy = LoRAPolicy(str(saved[kind]), quantization=kind[0], double_quantization=kind[1], r=2)
    model = policy.load()
    tiny.randomize(model)
    choose_layout(model)
    tiny.weighted(completion_logps(model, BATCH).total).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    said = policy.checkpoint_identity()
    assert (said["quantization"], said["double_quantization"]) == (kind[0], kind == ("nf4", True))


@pytest.mark.parametrize("kind", [("nf4", True), ("nf4", False)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_computes_in_the_policys_dtype_as_the_model_that_is_quantised_here(folder, saved, kind, dtype):
    options = {"quantization": kind[0], "double_quantization": kind[1], "dtype": dtype, "r": 2}
    here = LoRAPolicy(str(folder), **options).load()
    there = LoRAPolicy(str(saved[kind]), **options).load()
    layers = [module for module in there.modules() if hasattr(module, "compute_dtype")]
    assert {str(layer.compute_dtype) for layer in layers} == {f"torch.{dtype}"}
    torch.testing.assert_close(_totals(there), _totals(here), rtol=0, atol=1e-4 if dtype == "float32" else 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [*KINDS, ("none", True)])
def test_what_contradicts_its_weights_is_refused_with_both(saved, kind, asked):
    if asked == kind:
        return
    policy = LoRAPolicy(str(saved[kind]), quantization=asked[0], double_quantization=asked[1])
    for refuse in (policy.check, policy.load):
        with pytest.raises(PolicyError) as error:
            refuse()
        assert f"quantization={kind[0]}, double_quantization={kind == ('nf4', True)}" in str(error.value)
        assert f"says quantization={asked[0]}, double_quantization={asked == ('nf4', True)}" in str(error.value)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_fp4_is_refused_by_name(saved, quantization):
    with pytest.raises(PolicyError, match="quantization=fp4"):
        LoRAPolicy(str(saved["fp4"]), quantization=quantization).check()


@pytest.mark.parametrize("method", ["gptq", "awq", "mxfp4", "compressed-tensors", "fp8"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_another_method_is_refused_by_name(folder, tmp_path, method, quantization):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": method}}))
    with pytest.raises(PolicyError, match=f"quantised with {method}.*name the model that they were made of"):
        LoRAPolicy(str(tmp_path / "model"), quantization=quantization).check()


def test_it_is_the_checkpoint_loaded_alone(saved):
    """Nothing is quantised a second time."""
    alone = AutoModelForCausalLM.from_pretrained(saved["nf4", True])
    for module in alone.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    keep_trainable(alone)
    model = LoRAPolicy(str(saved["nf4", True]), r=2, dtype="float32").load()
    assert torch.equal(_totals(model), _totals(alone))
