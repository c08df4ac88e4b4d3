"""A reference that is another checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from lit_dpo import ModelReference
from lit_dpo.errors import PolicyError
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.score import completion_logps
from lit_dpo.policy import BaseModel, LoRAPolicy
from training import adapter, data, module, trainer

BATCH = tiny.batch()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The policy's base, and another architecture with the same tokenizer."""
    root = tmp_path_factory.mktemp("models")
    return tiny.directory(root / "mine"), tiny.directory(root / "other", "qwen3", seed=5)


def _totals(logps):
    return logps.total.detach()


def _attached(reference, folder, **options):
    policy = LoRAPolicy(str(folder), r=2, **{"quantization": "none", **options})
    reference.check(policy)
    model = policy.load()
    reference.attach(model, policy)
    choose_layout(model)
    return model


def test_it_is_that_model_loaded_alone(folders):
    reference = ModelReference(str(folders[1]), quantization="none")
    model = _attached(reference, folders[0], quantization="nf4")
    alone = AutoModelForCausalLM.from_pretrained(folders[1])
    choose_layout(alone)
    found = _totals(reference.logps(model, BATCH))
    assert torch.equal(found, _totals(completion_logps(alone, BATCH)))
    assert not torch.allclose(found, _totals(completion_logps(model, BATCH)))


def test_it_has_its_own_quantisation(folders):
    full, four = (ModelReference(str(folders[0]), quantization=kind) for kind in ("none", "nf4"))
    sides = [_totals(one.logps(_attached(one, folders[0]), BATCH)) for one in (full, four)]
    assert not torch.allclose(*sides)
    policy = LoRAPolicy(str(folders[0]), quantization="nf4", r=2).load()
    choose_layout(policy)
    assert torch.equal(sides[1], _totals(completion_logps(policy, BATCH)))  # a fresh adapter does nothing


def test_it_may_carry_an_adapter(folders, tmp_path):
    trained = tiny.lora(AutoModelForCausalLM.from_pretrained(folders[1]), seed=3)
    trained.save_pretrained(tmp_path / "adapter")
    reference = ModelReference(str(folders[1]), quantization="none", adapter_path=str(tmp_path / "adapter"))
    choose_layout(trained)
    model = _attached(reference, folders[0])
    torch.testing.assert_close(
        _totals(reference.logps(model, BATCH)), _totals(completion_logps(trained, BATCH)), rtol=0, atol=1e-5
    )


def test_it_is_neither_trained_nor_counted_nor_saved_with_the_policy(folders):
    model = _attached(ModelReference(str(folders[1])), folders[0])
    policy = LoRAPolicy(str(folders[0]), quantization="none", r=2).load()
    assert model.get_nb_trainable_parameters() == policy.get_nb_trainable_parameters()
    assert set(model.state_dict()) == set(policy.state_dict())
    model.train()
    other = model.__dict__["lit_dpo_reference"]
    assert not other.training
    assert not any(p.requires_grad for p in other.parameters())


def test_training_against_it_moves_the_policy_and_not_it(tiny_model, pairs_file, tmp_path):
    reference = ModelReference(str(tiny_model), quantization="nf4")
    dpo = module(tiny_model, reference=reference)
    dpo.configure_model()
    probe = tiny.batch(vocabulary=200)
    before, start = _totals(reference.logps(dpo.model, probe)), adapter(dpo)
    trainer(tmp_path).fit(dpo, data(pairs_file))
    assert torch.equal(_totals(reference.logps(dpo.model, probe)), before)
    assert all(not torch.equal(p, start[name]) for name, p in adapter(dpo).items() if "lora_B" in name)


def test_it_follows_the_policy_to_another_device(folders):
    reference = ModelReference(str(folders[1]), quantization="none")
    model = _attached(reference, folders[0]).to("meta")
    with reference.activated(model) as other:
        assert next(other.parameters()).device.type == "meta"


def test_what_is_not_in_four_bits_is_refused_if_it_was_asked_for(folders, monkeypatch):
    monkeypatch.setattr(LoRAPolicy, "quantization_config", lambda self, dtype: None)
    with pytest.raises(PolicyError, match="Expected Linear4bit"):
        LoRAPolicy(str(folders[0])).load_frozen()


def test_a_model_with_another_vocabulary_is_refused_before_weights_load(folders, tiny_model, pairs_file, tmp_path):
    dpo = module(folders[0], reference=ModelReference(str(tiny_model)))
    with pytest.raises(PolicyError, match=r"differ in \d+ tokens, first"):
        trainer(tmp_path).fit(dpo, data(pairs_file))
    assert dpo.model is None


def test_a_model_that_is_not_there_is_named_before_weights_load(folders, tmp_path):
    reference = ModelReference(str(tmp_path / "nothing"))
    with pytest.raises(PolicyError, match="nothing"):
        reference.check(LoRAPolicy(str(folders[0])))
    with pytest.raises(PolicyError, match="`quantization`"):
        ModelReference("x", quantization="fp4")


def _gptq(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))


def _remote(folder):
    path = folder / "config.json"
    code = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **code}))
    (folder / "mine.py").write_text("")


def _adapter_alone(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def _adapter_too(folder):
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize("spoil", [_gptq, _remote, _adapter_alone, _adapter_too, shutil.rmtree])
@pytest.mark.parametrize("kind", [LoRAPolicy, ModelReference])
def test_what_is_wrong_with_a_model_is_said_in_the_options_of_whoever_loads_it(spoil, kind, folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(PolicyError) as error:
        kind(str(tmp_path / "model")).check_model()
    assert set(re.findall(r"`(\w+)\.(?:model|adapter_path|trust_remote_code)`", str(error.value))) == {kind.option}


def test_a_reference_has_every_field_of_a_base_model_and_a_policy_more():
    of = {kind: {one.name: one.default for one in fields(kind)} for kind in (BaseModel, ModelReference, LoRAPolicy)}
    assert of[ModelReference] == of[BaseModel]
    assert of[BaseModel].items() < of[LoRAPolicy].items()
