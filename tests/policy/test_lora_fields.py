"""Each field of PEFT's LoraConfig: we score as PEFT's own forward does, or refuse the adapter by the field's name."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, fields

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from lit_dpo import AdapterReference, BaseReference, hub
from lit_dpo.data.batch import collate
from lit_dpo.errors import PolicyError
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.score import completion_logps
from lit_dpo.policy import LoRAPolicy
from lit_dpo.policy.adapter_checks import check_embeddings
from lit_dpo.policy.checks import _say_tied

PAIRS = tiny.pairs()
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WITH_EMBEDDINGS = ["q_proj", "lm_head", "embed_tokens"]

# One value that is not the default, on which model.
SCORED = {
    "r": (3, "llama"),
    "lora_alpha": (16, "llama"),
    "lora_dropout": (0.5, "llama"),
    "target_modules": (["q_proj", "down_proj"], "llama"),
    "exclude_modules": (["q_proj"], "llama"),
    "fan_in_fan_out": (True, "gpt2"),
    "use_rslora": (True, "llama"),
    "init_lora_weights": ("orthogonal", "llama"),
    "layers_to_transform": ([1], "llama"),
    "layers_pattern": ("layers", "llama"),
    "rank_pattern": ({"q_proj": 5}, "llama"),
    "alpha_pattern": ({"q_proj": 9}, "llama"),
    "use_dora": (True, "llama"),
    "lora_bias": (True, "llama"),
    "target_parameters": (["mlp.experts.gate_up_proj"], "mixtral"),
    "trainable_token_indices": ([50, 60, 72], "llama-tied"),
}
REFUSED = {
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "alora_invocation_tokens": [5, 6],
    "layer_replication": [[0, 2], [1, 2]],
    "use_qalora": True,
    "megatron_config": {"a": 1},
    "ensure_weight_tying": True,
    "corda_config": {"cache_file": "x"},
    "lora_ga_config": {},
    "velora_config": {},
    "monteclora_config": {},
    "use_bdlora": {},
    "arrow_config": {"top_k": 2},
    "kasa_config": {},
}
# They say what an adapter is, or are read with another field alone.
DESCRIBING = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_core", "loftq_config", "eva_config", "qalora_group_size", "runtime_config"),
}


def test_each_field_of_this_peft_is_here():
    known = SCORED.keys() | REFUSED.keys() | DESCRIBING
    assert {field.name for field in fields(LoraConfig)} <= known


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return lambda name: root / name if (root / name).is_dir() else tiny.directory(root / name, name)


def _saved(base, to, targets=ALL, **options):
    tiny.lora(AutoModelForCausalLM.from_pretrained(base), targets=targets, **options).save_pretrained(to)
    return to


def _edit(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _assert_scores_as_peft_does(base, adapter):
    """With the adapter on and off; and it does something."""
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        on = torch.cat(tiny.one_at_a_time(theirs, PAIRS))
        with theirs.disable_adapter():
            off = torch.cat(tiny.one_at_a_time(theirs, PAIRS))
        assert (on - off).abs().max() > 0.01
        model = LoRAPolicy(str(base), quantization="none", adapter_path=str(adapter)).load()
        choose_layout(model)
        batch = collate(PAIRS)
        found = completion_logps(model.eval(), batch).per_token
        without = BaseReference().logps(model, batch).per_token
    torch.testing.assert_close(found, on, rtol=0, atol=1e-5)
    torch.testing.assert_close(without, off, rtol=0, atol=1e-5)


@pytest.mark.parametrize("field", SCORED)
def test_an_adapter_with_a_feature_of_layers_is_scored_as_peft_does(field, folder, tmp_path):
    value, name = SCORED[field]
    targets = {"gpt2": ["c_attn"], "mixtral": ["q_proj"]}.get(name, ALL)
    options = {field: value} if field != "target_modules" else {}
    options |= {"layers_to_transform": [0]} if field == "layers_pattern" else {}
    adapter = _saved(folder(name), tmp_path / "adapter", value if field == "target_modules" else targets, **options)
    _assert_scores_as_peft_does(folder(name), adapter)


@pytest.mark.parametrize("field", REFUSED)
def test_an_adapter_with_any_other_feature_is_refused_by_its_name(field, folder, tmp_path):
    if field not in {one.name for one in fields(LoraConfig)}:
        pytest.skip("a field of a later PEFT")
    adapter = _saved(folder("llama"), tmp_path / "adapter")
    given = REFUSED[field]
    _edit(adapter, **{field: given if given != {} else _defaults(field)})
    policy = LoRAPolicy(str(folder("llama")), quantization="none", adapter_path=str(adapter))
    for refuse in (policy.check, policy.load, lambda: AdapterReference(str(adapter)).check(policy)):
        with pytest.raises(PolicyError, match=field):
            refuse()


def _defaults(field):
    """What PEFT itself writes for a nested configuration."""
    kinds = {
        "lora_ga_config": "LoraGAConfig",
        "velora_config": "VeloraConfig",
        "monteclora_config": "MontecloraConfig",
        "use_bdlora": "BdLoraConfig",
        "kasa_config": "KasaConfig",
    }
    return asdict(getattr(peft, kinds[field])())


def test_adalora_is_no_lora(folder, tmp_path):
    """Its configuration is a subclass of LoRA's."""
    adapter = _saved(folder("llama"), tmp_path / "adapter")
    _edit(adapter, peft_type="ADALORA", total_step=10)
    with pytest.raises(PolicyError, match=r"Expected a LoRA adapter.*ADALORA"):
        LoRAPolicy(str(folder("llama")), adapter_path=str(adapter)).check()


# ---- embeddings and head ----


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("embeddings", ["auto", True, False])
def test_an_adapter_on_head_and_embeddings_is_taken_with_the_bases_weights_or_without(
    name, embeddings, folder, tmp_path
):
    """PEFT saves the base's own embeddings along with it."""
    model = tiny.lora(AutoModelForCausalLM.from_pretrained(folder(name)), targets=WITH_EMBEDDINGS)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=embeddings)
    whole = [key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "lora_" not in key]
    assert bool(whole) is bool(embeddings)
    _assert_scores_as_peft_does(folder(name), tmp_path / "adapter")


def test_an_adapter_that_brings_other_embeddings_is_refused_with_the_way_out(folder, tmp_path):
    adapter = _saved(folder("llama"), tmp_path / "adapter", WITH_EMBEDDINGS)
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    (key,) = [key for key in tensors if "lora_" not in key and "embed_tokens" in key]
    tensors[key][3] += 1e-3
    save_file(tensors, weights)
    policy = LoRAPolicy(str(folder("llama")), quantization="none", adapter_path=str(adapter))
    for refuse in (policy.check, policy.load, lambda: AdapterReference(str(adapter)).check(policy)):
        with pytest.raises(
            PolicyError, match=r"not the base's \(.*embed_tokens.*\)[\s\S]*merge_and_unload[\s\S]*`policy.model`"
        ):
            refuse()


def test_the_way_out_works(folder, tmp_path):
    """A resized vocabulary, as after supervised training with new tokens: merged, the model is an ordinary one."""
    base = AutoModelForCausalLM.from_pretrained(folder("llama"))
    base.resize_token_embeddings(tiny.VOCABULARY + 3)
    adapted = tiny.lora(base, targets=["q_proj"])
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(PolicyError, match="merge_and_unload"):
        LoRAPolicy(str(folder("llama")), quantization="none", adapter_path=str(tmp_path / "adapter")).check()
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    tiny.tokenizer().save_pretrained(tmp_path / "merged")
    LoRAPolicy(str(tmp_path / "merged"), quantization="none", r=2).load()


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "lm_head"], "lm_head will"),
        (["embed_tokens"], "model.embed_tokens will"),
        (r".*(q_proj|embed_tokens)", "model.embed_tokens will"),
        (["q_proj"], None),
        ("all-linear", None),
    ],
)
def test_an_adapter_on_tied_weights_is_said_before_training_not_to_merge(targets, said, folder):
    lines = []
    for name in ("llama-tied", "llama"):
        _say_tied.cache_clear()
        policy = LoRAPolicy(str(folder(name)), quantization="none", target_modules=targets, r=2)
        with tiny.records("lit_dpo.policy.checks") as records:
            policy.check()
            policy.load()
        lines.append([record.getMessage() for record in records])
    tied, apart = lines
    assert apart == []
    assert bool(tied) == bool(said)
    assert all(re.match(f"{said}.*share one weight.*do not merge", line) for line in tied)
    assert len(tied) <= 1


def test_what_is_said_of_merging_is_true(folder):
    """Merged into one weight, an adapter of the head changes the embeddings too."""
    drift = {}
    for name in ("llama-tied", "llama"):
        model = tiny.lora(AutoModelForCausalLM.from_pretrained(folder(name)), targets=["lm_head"]).eval()
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            before = model(ids).logits
            drift[name] = float((model.merge_and_unload()(ids).logits - before).abs().max())
    assert drift["llama"] < 1e-4
    assert drift["llama-tied"] > 0.01


def test_a_copied_adapter_is_read_without_its_base(folder, tmp_path):
    """A hub id whose weights are not here yet: the comparison waits until they are."""
    adapter = _saved(folder("llama"), tmp_path / "adapter", WITH_EMBEDDINGS)
    shutil.copytree(folder("llama"), tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()

    class Policy:
        place = hub.Place(tmp_path / "half", "half", None, "policy.model")

    check_embeddings(Policy, hub.Place(adapter, "adapter", None, "policy.adapter_path"))
