"""A model that the user already holds: it trains, its checkpoints know its weights, and nothing claims another base."""

from __future__ import annotations

import copy
import functools
import json
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import tiny
from lit_dpo import AdapterReference, BaseReference, CachedReference, DPOModule, LoRAPolicy, ModelReference
from lit_dpo.errors import PolicyError, ResumeError
from lit_dpo.logps.attention import plain_attention
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.score import completion_logps
from lit_dpo.policy import HeldPolicy
from lit_dpo.policy.checks import keep_trainable
from lit_dpo.policy.held import _digest
from training import adapter, data, trainer

BATCH = tiny.batch()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.directory(tmp_path_factory.mktemp("base") / "base", attention_dropout=0.3)


def _quantized(quantization):
    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.float32)  # fmt: skip


def _model(folder, quantization="none", **changes):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=_quantized(quantization), dtype=torch.float32, **changes
    )


def _totals(logps):
    return logps.total.detach()


def _fit(policy, pairs_file, root, *, ckpt_path=None, steps=2, **kwargs):
    torch.manual_seed(0)
    keep = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    dpo = DPOModule(policy, optimizer=optimizer, lr_scheduler="constant", **kwargs)
    run = trainer(root, callbacks=[keep], enable_checkpointing=True, max_steps=steps)
    run.fit(dpo, data(pairs_file), ckpt_path=ckpt_path)
    return dpo


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_it_trains_as_the_model_of_its_folder_does_and_goes_on_when_given_again(
    quantization, folder, pairs_file, tmp_path
):
    loaded = _fit(LoRAPolicy(str(folder), quantization=quantization, r=4), pairs_file, tmp_path / "folder")
    policy = LoRAPolicy.from_model(_model(folder, quantization), r=4)
    assert (policy.quantization, policy.dtype) == (quantization, "float32")
    dpo = _fit(policy, pairs_file, tmp_path / "a")
    assert all(torch.equal(p, adapter(loaded)[name]) for name, p in adapter(dpo).items()), "dropout is off too"
    exported = json.loads((tmp_path / "a" / "adapter" / "adapter_config.json").read_text())
    assert exported["base_model_name_or_path"] == str(folder)
    # it is told from memory, and given again
    said = torch.load(tmp_path / "a" / "step=1.ckpt", weights_only=True)["lit_dpo"]
    assert said["base"]["fingerprint"].startswith("memory ")
    assert said["base"]["quantization"] == quantization
    assert said["policy"]["class_path"] == "lit_dpo.policy.held.HeldPolicy"
    again = LoRAPolicy.from_model(_model(folder, quantization), r=4)
    resumed = _fit(again, pairs_file, tmp_path / "b", ckpt_path=tmp_path / "a" / "step=1.ckpt")
    third = LoRAPolicy.from_model(_model(folder, quantization), r=4)
    for other in (resumed, DPOModule.load_from_checkpoint(tmp_path / "a" / "step=2.ckpt", policy=third)):
        assert all(torch.equal(p, adapter(dpo)[name]) for name, p in adapter(other).items())


def test_no_file_builds_the_model_again_and_no_other_weights_are_taken(folder, pairs_file, tmp_path):
    _fit(LoRAPolicy.from_model(_model(folder), r=4), pairs_file, tmp_path, steps=1)
    path = tmp_path / "step=1.ckpt"
    with pytest.raises(
        PolicyError, match=r"given as an object.*load_from_checkpoint\(path, policy=LoRAPolicy.from_model"
    ):
        DPOModule.load_from_checkpoint(path)
    other = _model(folder)
    with torch.no_grad():
        other.model.norm.weight[5] += 1e-3
    with pytest.raises(ResumeError, match=r"base\.fingerprint"):
        DPOModule.load_from_checkpoint(path, policy=LoRAPolicy.from_model(other, r=4))
    with pytest.raises(ResumeError, match=r"base\.fingerprint"):
        DPOModule.load_from_checkpoint(path, policy=LoRAPolicy(str(folder), quantization="none", r=4))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_adapter_that_the_model_came_with_is_continued_and_is_the_reference(
    quantization, folder, pairs_file, tmp_path
):
    def given(**changes):
        return tiny.lora(_model(folder, quantization, **changes), seed=3)

    policy = LoRAPolicy.from_model(given())
    dpo = _fit(policy, pairs_file, tmp_path / "a", steps=3)
    assert dpo.reference == AdapterReference()
    before = given(attention_dropout=0.0).eval()
    keep_trainable(before)  # some CPUs would repack it and compute in bfloat16
    choose_layout(before)
    start = _totals(completion_logps(before, BATCH))
    torch.testing.assert_close(_totals(dpo.reference.logps(dpo.model, BATCH)), start, rtol=0, atol=1e-4)
    assert not torch.allclose(_totals(completion_logps(dpo.model.eval(), BATCH)), start, atol=1e-2)
    assert {name.partition(".lora_")[2] for name in adapter(dpo)} == {"A.default.weight", "B.default.weight"}
    again = LoRAPolicy.from_model(given())
    resumed = _fit(again, pairs_file, tmp_path / "b", ckpt_path=tmp_path / "a" / "step=1.ckpt", steps=3)
    assert all(torch.equal(p, adapter(dpo)[name]) for name, p in adapter(resumed).items())
    other = LoRAPolicy.from_model(tiny.lora(_model(folder, quantization), seed=4))
    with pytest.raises(ResumeError, match=r"policy\.adapter"):
        _fit(other, pairs_file, tmp_path / "b", ckpt_path=tmp_path / "a" / "step=1.ckpt", steps=3)


def test_a_fresh_adapter_of_the_users_is_compared_with_its_base(folder, pairs_file, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_model(folder), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    dpo = _fit(LoRAPolicy.from_model(model), pairs_file, tmp_path, steps=1)
    assert dpo.reference == BaseReference()
    assert dpo.model is model


def test_what_is_exported_is_what_was_trained(folder, pairs_file, tmp_path):
    from peft import AutoPeftModelForCausalLM

    dpo = _fit(LoRAPolicy.from_model(_model(folder), r=4, use_dora=True, revision="v1"), pairs_file, tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(folder), "v1")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = torch.arange(40, 75)[None]
    with torch.no_grad(), plain_attention(dpo.model.eval()):
        torch.testing.assert_close(loaded(ids).logits, dpo.model(ids).logits, rtol=0, atol=1e-5)


def test_a_cache_knows_the_weights_in_memory(folder, pairs_file, tmp_path):
    policies = [
        LoRAPolicy.from_model(_model(folder), r=4),
        LoRAPolicy.from_model(tiny.model(seed=1), tiny.tokenizer(), r=4),
    ]
    contents = [CachedReference(directory=str(tmp_path)).cache_identity(policy) for policy in policies]
    assert contents[0] != contents[1]
    _fit(policies[0], pairs_file, tmp_path, steps=1, reference=CachedReference(directory=str(tmp_path / "cache")))


def test_a_policy_is_not_copied_with_its_model_nor_sent_with_it(folder):
    policy = LoRAPolicy.from_model(_model(folder), AutoTokenizer.from_pretrained(folder), r=4)
    assert copy.deepcopy(policy) is policy
    assert len(pickle.dumps(policy)) < 2000
    assert policy.load_tokenizer()("a").input_ids
    policy.check()
    policy.load()
    with pytest.raises(PolicyError, match="another module's policy already"):
        policy.load()
    with pytest.raises(PolicyError, match="given as an object"):
        pickle.loads(pickle.dumps(policy)).check()


def _merged(folder):
    model = tiny.lora(_model(folder))
    model.merge_adapter()
    return model


def _second(folder):
    model = tiny.lora(_model(folder))
    model.add_adapter("other", model.peft_config["default"])
    return model


REFUSED = {
    "no model": (lambda folder: torch.nn.Linear(2, 2), {}, "Expected a transformers or PEFT model but got a Linear"),
    "adapters inside": (lambda folder: tiny.lora(_model(folder)).get_base_model(), {}, "has adapters inside already"),
    "biases": (lambda folder: tiny.lora(_model(folder), bias="all"), {}, "adapter of the model also trained biases"),
    "another name": (_second, {}, "one adapter named default but the model has default, other"),
    "merged": (_merged, {}, "merged into its weights"),
    "a rank for an adapter": (lambda folder: tiny.lora(_model(folder)), {"r": 4}, "`r` has no effect"),
    "a quantisation": (_model, {"quantization": "nf4"}, "`quantization` has no effect"),
    "a dtype": (_model, {"dtype": "float16"}, "`dtype` has no effect"),
    "no such layer": (_model, {"target_modules": ["q_prj"]}, "`target_modules` among"),
    "fp4": (
        lambda folder: AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
        ),
        {},
        "its layers are in fp4",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_scored_or_compared_is_refused(case, folder):
    make, options, said = REFUSED[case]
    with pytest.raises(PolicyError, match=said):
        LoRAPolicy.from_model(make(folder), **options).check()


def test_a_model_that_was_set_by_hand_is_refused_with_the_way_in(folder, pairs_file, tmp_path):
    """It would train, and its checkpoints would claim another base."""
    dpo = DPOModule(LoRAPolicy(str(folder)))
    dpo.model = tiny.lora(_model(folder))
    with pytest.raises(PolicyError, match=r"set by hand.*LoRAPolicy.from_model\(model\)"):
        trainer(tmp_path).fit(dpo, data(pairs_file))


def test_a_subclass_takes_a_model_if_it_is_one_of_held_policies(folder):
    class Loads(LoRAPolicy):
        pass

    class Holds(HeldPolicy):
        pass

    assert type(Holds.from_model(_model(folder), r=2)) is Holds
    with pytest.raises(PolicyError, match="policies of `HeldPolicy`"):
        Loads.from_model(_model(folder))


@pytest.mark.parametrize("take", [DPOModule, LoRAPolicy, ModelReference])
def test_a_model_where_something_else_is_expected_is_told_where_it_goes(take, folder):
    with pytest.raises(PolicyError, match=r"but got a LlamaForCausalLM.*`LoRAPolicy.from_model\(model\)`"):
        take(_model(folder))


def test_a_model_that_is_nowhere_is_refused_and_its_name_need_not_have_a_tokenizer(folder, tmp_path):
    with torch.device("meta"):
        nowhere = AutoModelForCausalLM.from_config(tiny.config("llama"))
    with pytest.raises(PolicyError, match="Expected a model on one device but its weights are on meta"):
        LoRAPolicy.from_model(nowhere)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config._name_or_path = model.name_or_path = str(tmp_path)
    with pytest.raises(PolicyError, match=r"No tokenizer for .*from_model\(model, tokenizer=tokenizer\)"):
        LoRAPolicy.from_model(model).load_tokenizer()


def test_a_model_is_scored_by_the_attention_that_is_asked_for(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    policy = LoRAPolicy.from_model(model, attention="eager")
    assert policy.load_base(torch.device("cpu"), torch.float32).config._attn_implementation == "eager"


def test_a_large_weight_is_known_by_numbers_from_its_beginning_to_its_end():
    weight = torch.zeros(2**15)
    found = {_digest([("w", weight)], whole=False)}
    for place in (0, -1):
        weight[place] = 1.0
        found.add(_digest([("w", weight)], whole=False))
    assert len(found) == 3
    assert _digest([("w", weight)], whole=True) not in found
