"""An adapter goes onto the base that it was trained on, wherever that lies, and onto another only if that is said."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import tiny
from lit_dpo import AdapterReference, ModelReference
from lit_dpo.errors import PolicyError
from lit_dpo.policy import LoRAPolicy
from lit_dpo.policy.adapter_checks import RECORD, _say
from lit_dpo.policy.checks import check_targets, enable_checkpointing, quantization_of
from lit_dpo.policy.files import LARGEST_FILE, check_patterns, json_object
from lit_dpo.policy.heap import returned_at_once
from lit_dpo.policy.layerwise import NotInLayersError, _find, _whole
from lit_dpo.policy.sharding import layers_of, shard
from training import data, module, trainer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models of the same shapes."""
    root = tmp_path_factory.mktemp("models")
    return tiny.directory(root / "mine"), tiny.directory(root / "other", seed=1)


@pytest.fixture(scope="module")
def adapter(folders):
    """Trained on the first; it names that directory."""
    model = tiny.lora(AutoModelForCausalLM.from_pretrained(folders[0]), seed=3)
    model.save_pretrained(folders[0].parent / "adapter")
    return folders[0].parent / "adapter"


@pytest.fixture
def no_weights(monkeypatch):
    """Reading weights fails the test."""

    def fail(*_, **__):
        pytest.fail("weights were read")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)


def _renamed(adapter, to, **changes):
    shutil.copytree(adapter, to)
    path = to / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return to


def _lines(policy):
    _say.cache_clear()
    with tiny.records("lit_dpo.policy.adapter_checks") as lines:
        policy.check()
        policy.check()
    return [line.getMessage() for line in lines]


def test_an_adapter_goes_onto_its_base_and_onto_a_copy_of_it(folders, adapter, tmp_path):
    shutil.copytree(folders[0], tmp_path / "copy")
    for folder in (folders[0], tmp_path / "copy"):
        assert _lines(LoRAPolicy(str(folder), adapter_path=str(adapter))) == []


@pytest.mark.parametrize("attribute", ["check", "load", "load_frozen"])
def test_an_adapter_of_another_base_is_refused_before_weights_load(folders, adapter, no_weights, attribute):
    policy = LoRAPolicy(str(folders[1]), adapter_path=str(adapter))
    with pytest.raises(
        PolicyError, match=r"another base: .*/mine; the policy is .*/other.*`policy.adapter_base` to any"
    ):
        getattr(policy, attribute)()


def test_it_is_taken_if_that_is_said(folders, adapter):
    policy = LoRAPolicy(str(folders[1]), quantization="none", adapter_path=str(adapter), adapter_base="any")
    config = policy.load().peft_config["default"]
    assert config.base_model_name_or_path == str(folders[1]), "what it is exported as from here"


def test_a_references_adapter_is_held_to_the_same(folders, adapter, no_weights):
    reference = AdapterReference(str(adapter))
    reference.check(LoRAPolicy(str(folders[0])))
    with pytest.raises(PolicyError, match=r"`reference.path`.*another base"):
        reference.check(LoRAPolicy(str(folders[1])))
    reference.check(LoRAPolicy(str(folders[1]), adapter_base="any"))


def test_a_model_references_adapter_is_held_to_its_model(folders, adapter, no_weights):
    policy = LoRAPolicy(str(folders[1]))
    ModelReference(str(folders[0]), adapter_path=str(adapter)).check(policy)
    with pytest.raises(PolicyError, match=r"`reference.adapter_path`.*another base.*`reference.adapter_base` to any"):
        ModelReference(str(folders[1]), adapter_path=str(adapter)).check(policy)
    ModelReference(str(folders[1]), adapter_path=str(adapter), adapter_base="any").check(policy)


@pytest.mark.parametrize(
    ("base", "said"), [("/gone/model", "/gone/model"), (None, "does not name"), ("gone/model", "cannot be compared")]
)
def test_a_base_that_is_nowhere_is_said_once_and_training_goes_on(folders, adapter, tmp_path, base, said):
    found = _renamed(adapter, tmp_path / "adapter", base_model_name_or_path=base)
    (line,) = _lines(LoRAPolicy(str(folders[1]), adapter_path=str(found)))
    assert said in line
    assert str(found) in line


def test_an_adapter_that_was_exported_names_the_base_it_was_trained_on(tiny_model, pairs_file, tmp_path):
    """Also where it continued an adapter whose base lay elsewhere, and is loaded right."""
    shutil.copytree(tiny_model, tmp_path / "moved")
    runs = [(tiny_model, {}), (tmp_path / "moved", {"adapter_path": str(tmp_path / "0" / "adapter")})]
    for number, (folder, options) in enumerate(runs):
        dpo = module(folder, policy={"r": 16, **options})
        trainer(tmp_path / str(number), max_steps=1).fit(dpo, data(pairs_file))
        exported = tmp_path / str(number) / "adapter"
        assert json.loads((exported / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)


def test_a_model_and_an_adapter_in_one_folder_are_refused_with_both_remedies(folders, adapter, tmp_path, no_weights):
    both = tmp_path / "both"
    shutil.copytree(folders[0], both)
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    with pytest.raises(
        PolicyError, match=f"a model and an adapter.*{both} to `policy.adapter_path`.*{folders[0]}"
    ) as error:
        LoRAPolicy(str(both)).check()
    assert "a copy without adapter_config.json" in str(error.value)
    LoRAPolicy(str(folders[0]), adapter_path=str(both)).check()
    with pytest.raises(PolicyError, match="a model and an adapter"):
        ModelReference(str(both)).check(LoRAPolicy(str(folders[0])))


def test_an_adapter_given_as_the_model_is_told_where_it_belongs(adapter):
    with pytest.raises(PolicyError, match=r"has no config.json.*That is an adapter: give it to `policy.adapter_path`"):
        LoRAPolicy(str(adapter)).check()


def test_a_revision_of_a_directory_is_refused(folders):
    with pytest.raises(PolicyError, match="no effect on a directory: leave 'v1' out"):
        LoRAPolicy(str(folders[0]), revision="v1").check()


def test_logits_of_the_same_adapter_differ_between_the_two_bases(folders, adapter):
    """So that what is refused above would have shown."""
    from peft import PeftModel

    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        one, other = (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)(ids).logits
            for folder in folders
        )
    assert (one - other).abs().max() > 1


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"base": 5}', '{"base": {"fingerprint": "of another kind"}}'])
def test_a_record_that_does_not_say_what_the_base_held_refuses_nothing(folders, adapter, tmp_path, record):
    found = _renamed(adapter, tmp_path / "adapter")
    (found / RECORD).write_text(record)
    assert _lines(LoRAPolicy(str(folders[0]), adapter_path=str(found))) == []
    (found / RECORD).write_text('{"base": {"fingerprint": "sha256 of other weights"}}')
    with pytest.raises(PolicyError, match="which has other weights now"):
        LoRAPolicy(str(folders[0]), adapter_path=str(found)).check()


def test_a_base_without_weights_here_is_not_compared(folders, adapter, tmp_path):
    """A folder that was emptied to save room: what is left does not say that it is another base."""
    empty = tmp_path / "other"
    shutil.copytree(folders[1], empty, ignore=shutil.ignore_patterns("*.safetensors"))
    found = _renamed(adapter, tmp_path / "adapter", base_model_name_or_path=str(empty))
    (line,) = _lines(LoRAPolicy(str(folders[0]), adapter_path=str(found)))
    assert f"names {empty} as its base, whose weights are not here to compare" in line


def test_an_adapter_s_expression_that_is_none_is_named(tmp_path):
    for pattern, said in (("(q_proj+", "missing|unterminated"), ("*+", "nothing to repeat|multiple repeat")):
        config = peft.LoraConfig(target_modules=pattern)
        with pytest.raises(PolicyError, match=f"chooses layers by no regular expression: .*({said})"):
            check_patterns(config, lambda: ["layers.0.q_proj"], tmp_path)


def test_a_configuration_is_no_larger_than_any(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(PolicyError, match=f"Expected a configuration of at most {LARGEST_FILE} bytes"):
        json_object(tmp_path / "config.json")


def test_a_method_of_quantisation_that_nobody_trains_on_is_named():
    base = torch.nn.Linear(1, 1)
    assert quantization_of(base) == {"quantization": "none"}
    base.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gptq"))
    with pytest.raises(PolicyError, match="The model is quantised with gptq, which is not trained on here"):
        quantization_of(base)


def test_layers_are_found_in_files_of_any_kind_or_it_is_said_why_not(tmp_path):
    weights = {f"model.layers.{number}.mlp.weight": torch.zeros(1) for number in range(3)} | {"norm": torch.zeros(1)}
    with pytest.raises(NotInLayersError, match=r"its files have other names than model.safetensors"):
        _find(tmp_path, "layers", 3)
    save_file(weights, tmp_path / "model.safetensors")
    single = _find(tmp_path, "layers", 3)
    assert set(single.file_of) == set(weights)
    with pytest.raises(NotInLayersError, match="its files do not name the tensors of 4 layers"):
        _find(tmp_path, "layers", 4)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "part.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    parts = _find(tmp_path, "layers", 3)
    assert parts.layer_of == single.layer_of
    assert set(parts.tensors([1])) == {"model.layers.1.mlp.weight"}
    assert set(parts.tensors([None])) == {"norm"}
    with pytest.raises(NotInLayersError, match=r"weight of layers.0 was not found"):
        _whole(torch.nn.Linear(1, 1, device="meta"), "layers.0")


def test_a_model_without_a_list_of_layers_or_a_decoder_is_not_sharded():
    with pytest.raises(PolicyError, match=r"Linear has no list of layers to shard. Use `none`"):
        layers_of(torch.nn.Linear(1, 1))
    model = tiny.model()
    model.get_decoder = lambda: model
    with pytest.raises(PolicyError, match="LlamaForCausalLM does not tell its decoder from its head"):
        shard(model, None)


def test_memory_is_left_alone_where_the_environment_says_how(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    with returned_at_once():
        assert torch.ones(2**16).sum() == 2**16


def test_layers_recompute_without_reentering_whatever_the_release_calls_it():
    """The hook has another name from transformers 5.20 on; an adapter on parameters alone names no layers."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        asked = []
        enable_checkpointing(
            SimpleNamespace(**{name: lambda *one, asked=asked, **other: asked.append((*one, *other.values()))})
        )
        assert asked == [({"use_reentrant": False},)]
    assert check_targets(tiny.config("llama"), None, trust_remote_code=False) is None
