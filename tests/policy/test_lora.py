"""The policy: quantised as asked, only adapters train, and mistakes are found before weights load."""

from __future__ import annotations

import copy
import json
import shutil

import bitsandbytes as bnb
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from lit_dpo.errors import PolicyError
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.score import completion_logps
from lit_dpo.policy import LoRAPolicy
from lit_dpo.policy.checks import keep_trainable
from lit_dpo.references import BaseReference

BATCH = tiny.batch()
QUANTIZATIONS = [("nf4", True), ("nf4", False), ("int8", True), ("none", True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.directory(tmp_path_factory.mktemp("policy") / "base")


@pytest.fixture(scope="module")
def adapter(folder):
    model = tiny.lora(tiny.model(), seed=3, targets=["q_proj", "v_proj"])
    model.save_pretrained(folder.parent / "adapter")
    return folder.parent / "adapter"


@pytest.fixture
def no_weights(monkeypatch):
    """Reading weights fails the test."""

    def fail(*_, **__):
        pytest.fail("weights were read")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)


def _totals(model):
    return completion_logps(model, BATCH).total.detach()


def _bases(model):
    return [module.base_layer for module in model.modules() if hasattr(module, "base_layer")]


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- what is loaded ----


@pytest.mark.parametrize(("quantization", "double"), QUANTIZATIONS)
def test_adapted_layers_are_quantised_as_asked(quantization, double, folder):
    model = LoRAPolicy(str(folder), quantization=quantization, double_quantization=double, r=2).load()
    bases = _bases(model)
    assert len(bases) == 2 * 7  # all linear layers but the head
    for base in bases:
        if quantization == "nf4":
            assert isinstance(base, bnb.nn.Linear4bit)
            assert base.weight.dtype == torch.uint8
            assert base.weight.numel() * 2 == base.in_features * base.out_features
            assert base.weight.quant_state.quant_type == "nf4"
            assert base.weight.quant_state.nested is double
        elif quantization == "int8":
            assert isinstance(base, bnb.nn.Linear8bitLt)
            assert base.weight.dtype == torch.int8
        else:
            assert type(base) is torch.nn.Linear
            assert base.weight.dtype == torch.float32


@pytest.mark.parametrize(("quantization", "double"), QUANTIZATIONS)
def test_only_adapters_require_gradients_and_they_are_float32(quantization, double, folder):
    model = LoRAPolicy(str(folder), quantization=quantization, double_quantization=double, r=2).load()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert model.training


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_adapters_are_float32_on_a_bfloat16_base(quantization, folder):
    model = LoRAPolicy(str(folder), quantization=quantization, r=2, dtype="bfloat16").load()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("quantization", "double"), QUANTIZATIONS)
def test_a_fresh_adapter_is_the_base_to_the_last_bit(quantization, double, folder):
    policy = LoRAPolicy(str(folder), quantization=quantization, double_quantization=double, r=2)
    model = policy.load()
    choose_layout(model)
    assert torch.equal(_totals(model), BaseReference().logps(model, BATCH).total)


def test_a_fresh_adapter_on_an_nf4_base_is_that_base_loaded_alone(folder):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    alone = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    keep_trainable(alone)  # some CPUs would repack it and compute in bfloat16
    model = LoRAPolicy(str(folder), r=2).load()
    for given in (alone, model):
        choose_layout(given)
    assert torch.equal(_totals(model), _totals(alone))
    full = LoRAPolicy(str(folder), quantization="none", r=2).load()
    choose_layout(full)
    assert not torch.allclose(_totals(model), _totals(full))  # 4 bits show


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_every_adapter_gets_a_gradient(quantization, folder):
    model = LoRAPolicy(str(folder), quantization=quantization, r=2, gradient_checkpointing=True).load()
    tiny.randomize(model)
    choose_layout(model)
    tiny.weighted(completion_logps(model, BATCH).total).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not missing


def test_a_continued_adapter_starts_where_it_was_and_trains(folder, adapter):
    from peft import PeftModel

    model = LoRAPolicy(str(folder), quantization="none", adapter_path=str(adapter)).load()
    alone = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder), adapter)
    for given in (model, alone):
        choose_layout(given)
    assert torch.equal(_totals(model), _totals(alone))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    assert model.peft_config["default"].r == 2


def test_an_adapter_saved_in_16_bits_continues_in_float32(folder, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "half")
    weights = tmp_path / "half" / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}, weights)
    model = LoRAPolicy(str(folder), quantization="none", adapter_path=str(tmp_path / "half")).load()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
        ("opt-projected", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
        ("gpt-neox", {"attention_dropout": 0.5, "hidden_dropout": 0.5}),
        ("phi3", {"resid_pdrop": 0.5, "embd_pdrop": 0.5}),
    ],
)
def test_the_dropouts_of_the_base_are_off_and_said_to_be(name, changes, tmp_path):
    tiny.directory(tmp_path / "base", name, **changes)
    with tiny.records("lit_dpo.policy.checks") as lines:
        model = LoRAPolicy(str(tmp_path / "base"), quantization="none", r=2).load()
    assert len(lines) == 1
    assert all(field in lines[0].getMessage() for field in changes)
    choose_layout(model)
    training = _totals(model.train())
    assert torch.equal(_totals(model), training)
    assert torch.equal(_totals(model.eval()), training)


def test_the_adapters_dropout_is_on_in_training_only(folder):
    model = LoRAPolicy(str(folder), quantization="none", r=2, dropout=0.5).load()
    tiny.randomize(model)
    choose_layout(model)
    assert not torch.equal(_totals(model), _totals(model))
    model.eval()
    assert torch.equal(_totals(model), _totals(model))


def test_building_a_policy_reads_nothing():
    assert LoRAPolicy("no/such-model", adapter_path="nowhere").r == 16


# ---- what is refused before weights load ----


def _expect(match, *args, **options):
    """Both `check` and `load` refuse, and neither reads weights."""
    policy = LoRAPolicy(*args, **options)
    for refuse in (policy.check, policy.load):
        with pytest.raises(PolicyError, match=match):
            refuse()


def test_a_good_policy_passes_check(folder, adapter, no_weights):
    LoRAPolicy(str(folder)).check()
    LoRAPolicy(str(folder), target_modules=["q_proj", "self_attn.v_proj"]).check()
    LoRAPolicy(str(folder), target_modules=r".*\.[qv]_proj").check()
    LoRAPolicy(str(folder), adapter_path=str(adapter)).check()
    LoRAPolicy(str(folder), adapter_path=str(adapter), r=2, alpha=4, target_modules=["v_proj", "q_proj"]).check()


@pytest.mark.parametrize("name", ["/no/such/dir", "./no-such-dir", "no-such-dir", "~/no-such-dir"])
def test_a_missing_directory_is_refused(name, no_weights):
    _expect("no-such-dir|/no/such/dir", name)


def test_a_directory_without_a_configuration_is_refused_with_what_it_holds(tmp_path, no_weights):
    (tmp_path / "notes.txt").write_text("")
    _expect(r"config\.json.*notes\.txt", str(tmp_path))


def test_a_configuration_is_everybody_s_own_and_that_of_its_file(tmp_path, no_weights):
    """Though it is read once as long as the file stays as it is."""
    policy = LoRAPolicy(str(tiny.directory(tmp_path / "base")))
    before = policy.config()
    before.rope_parameters["rope_theta"] = before.vocab_size = 7
    assert 7 not in (policy.config().rope_parameters["rope_theta"], policy.config().vocab_size)
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 99}))
    assert policy.config().max_position_embeddings == 99


def test_a_broken_configuration_is_refused(tmp_path, no_weights):
    (tmp_path / "config.json").write_text("{")
    _expect("configuration", str(tmp_path))


def test_an_unknown_model_type_is_refused(tmp_path, no_weights):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    _expect("no-such-type", str(tmp_path))


def test_a_directory_without_weights_is_refused_with_what_it_holds(tmp_path, no_weights):
    tiny.config("llama").save_pretrained(tmp_path)
    _expect(r"safetensors.*config\.json", str(tmp_path))


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path, no_weights):
    tiny.config("llama").save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    _expect(r"only pytorch_model\.bin.*save_pretrained", str(tmp_path))


@pytest.mark.parametrize("wanted", [["q_proj", "c_attn"], ["c_attn"], "c_attn", r".*\.c_attn"])
def test_an_unknown_target_module_is_refused_with_those_that_are_there(wanted, folder, no_weights):
    _expect("among .*down_proj.*q_proj.*c_attn", str(folder), target_modules=wanted)


def test_an_encoder_decoder_is_refused(tmp_path, no_weights):
    """T5 has a configuration and weights, and is no causal language model."""
    transformers.T5Config(vocab_size=97, d_model=32).save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    _expect("t5", str(tmp_path))


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_without_its_files_is_refused_by_the_missing_name(missing, folder, adapter, tmp_path, no_weights):
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / missing).unlink()
    _expect(missing, str(folder), adapter_path=str(tmp_path / "adapter"))


def test_a_missing_adapter_directory_is_refused(folder, tmp_path, no_weights):
    _expect("no-such-adapter", str(folder), adapter_path=str(tmp_path / "no-such-adapter"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_an_adapter_that_turning_off_does_not_undo_is_refused(changes, match, folder, adapter, tmp_path, no_weights):
    shutil.copytree(adapter, tmp_path / "adapter")
    _edit(tmp_path / "adapter" / "adapter_config.json", **changes)
    _expect(match, str(folder), adapter_path=str(tmp_path / "adapter"))


@pytest.mark.parametrize("given", [{"r": 8}, {"alpha": 8}, {"dropout": 0.1}, {"target_modules": ["o_proj"]}])
def test_a_field_in_conflict_with_the_adapter_is_refused_by_name(given, folder, adapter, no_weights):
    _expect(f"policy.{next(iter(given))}`", str(folder), adapter_path=str(adapter), **given)


def test_an_adapter_for_other_layers_is_refused(folder, adapter, tmp_path, no_weights):
    """An adapter of a GPT-2 has no place in a Llama."""
    shutil.copytree(adapter, tmp_path / "adapter")
    _edit(tmp_path / "adapter" / "adapter_config.json", target_modules=["c_attn"])
    _expect("c_attn", str(folder), adapter_path=str(tmp_path / "adapter"))


def test_an_unknown_attention_is_refused_by_name(folder, no_weights):
    _expect("flash_attentoin", str(folder), attention="flash_attentoin")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"quantization": "fp4"}, "`quantization`.*'fp4'"),
        ({"r": 0}, "r=0"),
        ({"alpha": 0}, "alpha=0"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"dropout": -0.1}, r"dropout=-0\.1"),
        ({"dtype": "float8"}, "`dtype`.*'float8'"),
        ({"target_modules": []}, "`target_modules`"),
    ],
)
def test_a_value_outside_its_domain_is_refused_where_it_is_written(given, match):
    with pytest.raises(PolicyError, match=match):
        LoRAPolicy("some/model", **given)


# ---- what is refused while loading ----


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_an_adapted_layer_that_the_loader_left_unquantised_is_refused_by_name(quantization, folder):
    """transformers never quantises the head."""
    policy = LoRAPolicy(str(folder), quantization=quantization, r=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(PolicyError, match=r"1 of 3 are not.*lm_head"):
        policy.load()


def test_all_adapted_layers_left_unquantised_are_refused(folder, monkeypatch):
    """A loader that skips quietly, as transformers does with names that it takes for ones to skip."""

    def skipping(self, dtype):
        skipped = [r"model\.layers", "lm_head"]
        return transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)

    monkeypatch.setattr(LoRAPolicy, "quantization_config", skipping)
    with pytest.raises(PolicyError, match="14 of 14 are not"):
        LoRAPolicy(str(folder), r=2).load()


def test_another_4_bit_type_than_nf4_is_refused(folder, monkeypatch):
    def fp4(self, dtype):
        return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")

    monkeypatch.setattr(LoRAPolicy, "quantization_config", fp4)
    with pytest.raises(PolicyError, match="14 of 14 are not"):
        LoRAPolicy(str(folder), r=2).load()


def test_the_head_can_have_an_adapter_without_quantisation(folder):
    policy = LoRAPolicy(str(folder), quantization="none", r=2, target_modules=["q_proj", "lm_head"])
    assert any("lm_head" in name for name, p in policy.load().named_parameters() if p.requires_grad)


def test_a_damaged_weight_file_is_a_policy_error(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PolicyError, match="base"):
        LoRAPolicy(str(tmp_path / "base"), quantization="none").load()


def test_a_weight_file_that_lacks_weights_is_refused_and_not_filled_with_random_ones(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(PolicyError, match="down_proj"):
        LoRAPolicy(str(tmp_path / "base"), quantization="none").load()


def test_an_adapter_file_that_lacks_weights_is_refused_and_not_filled_with_fresh_ones(folder, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, weights)
    with pytest.raises(PolicyError, match="lora_B"):
        LoRAPolicy(str(folder), quantization="none", adapter_path=str(tmp_path / "adapter")).load()


def test_an_adapter_of_another_shape_is_a_policy_error(adapter, tmp_path):
    tiny.directory(tmp_path / "wide", hidden_size=64)
    with pytest.raises(PolicyError, match="adapter"):
        LoRAPolicy(str(tmp_path / "wide"), quantization="none", adapter_path=str(adapter)).load()


# ---- identity ----


def _content(policy):
    """What of the identity is compared: a place is not content."""
    return {name: value for name, value in policy.checkpoint_identity().items() if name not in ("model", "revision")}


def test_a_copied_directory_is_the_same_base(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert _content(LoRAPolicy(str(folder))) == _content(LoRAPolicy(str(tmp_path / "copy")))


def test_a_changed_weight_is_another_base(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    assert _content(LoRAPolicy(str(folder))) != _content(LoRAPolicy(str(tmp_path / "copy")))


def test_a_changed_configuration_is_another_base(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    _edit(tmp_path / "copy" / "config.json", rms_norm_eps=1e-3)
    assert _content(LoRAPolicy(str(folder))) != _content(LoRAPolicy(str(tmp_path / "copy")))


def test_another_quantisation_is_another_base(folder):
    found = [
        _content(LoRAPolicy(str(folder), quantization=quantization, double_quantization=double))
        for quantization, double in QUANTIZATIONS
    ]
    assert all(one != other for number, one in enumerate(found) for other in found[:number])


def test_double_quantisation_without_nf4_is_refused(folder):
    with pytest.raises(PolicyError, match="no effect with quantization=int8"):
        LoRAPolicy(str(folder), quantization="int8", double_quantization=False)


def test_adapters_are_no_part_of_the_identity_of_the_base(folder, adapter):
    assert _content(LoRAPolicy(str(folder), r=4)) == _content(LoRAPolicy(str(folder), adapter_path=str(adapter)))


def test_identity_is_builtins(folder):
    identity = LoRAPolicy(str(folder)).checkpoint_identity()
    assert json.loads(json.dumps(identity)) == identity


# ---- tokenizer ----


def test_the_tokenizer_is_the_models(folder):
    assert LoRAPolicy(str(folder)).load_tokenizer()("ab")["input_ids"] == tiny.tokenizer()("ab")["input_ids"]


def test_the_adapters_own_tokenizer_goes_first(folder, adapter, tmp_path):
    assert LoRAPolicy(str(folder), adapter_path=str(adapter)).load_tokenizer().chat_template is None
    shutil.copytree(adapter, tmp_path / "adapter")
    theirs = copy.deepcopy(tiny.tokenizer())
    theirs.chat_template = "{{ messages[0]['content'] }}"
    theirs.save_pretrained(tmp_path / "adapter")
    found = LoRAPolicy(str(folder), adapter_path=str(tmp_path / "adapter")).load_tokenizer()
    assert found.chat_template == theirs.chat_template


def test_a_model_without_a_tokenizer_is_a_policy_error(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match="No tokenizer"):
        LoRAPolicy(str(tmp_path)).load_tokenizer()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_evaluation_in_between_changes_neither_log_probs_nor_gradients(tmp_path, quantization):
    """bitsandbytes repacks 4-bit weights at the first evaluation on some CPUs; gradients then end there, silently."""
    folder = tiny.directory(tmp_path / "model", hidden_size=64, intermediate_size=128)
    model = LoRAPolicy(str(folder), quantization=quantization, r=2).load()
    choose_layout(model)
    tiny.randomize(model)
    found = []
    for _ in range(2):
        totals = completion_logps(model.train(), BATCH).total
        tiny.weighted(totals).backward()
        found.append((totals.detach(), tiny.gradients(model)))
        with torch.no_grad():
            completion_logps(model.eval(), BATCH)
    assert torch.equal(found[0][0], found[1][0])
    tiny.assert_same_gradients(found[0][1], found[1][1], tolerance=0)
    assert len(found[0][1]) == 2 * 2 * 7, "A and B of seven layers in two blocks"
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())
