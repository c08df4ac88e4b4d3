"""A merge is what the adapter computes, of whatever kind it is, or it is refused by name; wrong bases are found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tiny
from lit_dpo.cli import main
from lit_dpo.errors import LitDPOError
from lit_dpo.tools import export

PLAIN = {"target_modules": "all-linear"}
KINDS = {
    "lora": ("llama-tied", PLAIN),
    "dora": ("llama", {**PLAIN, "use_dora": True}),
    "rslora and patterns": (
        "llama",
        {**PLAIN, "use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 9}},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    "tokens": ("llama-tied", {**PLAIN, "trainable_token_indices": [5, 6]}),
    "tied head": ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
    "tied embeddings": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "pairs.jsonl"
    rows = [{"prompt": f"What is {n}?", "chosen": f" It is {n * n}.", "rejected": " No" + " no" * n} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def adapter(base: Path, at: Path, **options) -> Path:
    """An adapter with random weights on a base on disk, as PEFT writes it."""
    loaded = AutoModelForCausalLM.from_pretrained(base)
    model = tiny.lora(loaded, 1, targets=options.pop("target_modules"), **options)
    model.save_pretrained(at, save_embedding_layers=False)
    return at


def merged(trained: Path, out: Path, pairs: Path, *more: object) -> dict:
    export.main([str(trained), str(out), "--merge", "--probe", str(pairs), *map(str, more)])
    return json.loads((out / "certificate.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_merges_into_what_it_computes(kind, pairs, tmp_path):
    """In float32 to rounding; the files alone, in transformers, say what PEFT says of adapter and base."""
    name, options = KINDS[kind]
    base = tiny.directory(tmp_path / "base", name)
    trained = adapter(base, tmp_path / "adapter", **dict(options))
    said = merged(trained, tmp_path / "out", pairs, "--dtype", "float32")
    assert said["rounding"]["largest"] < 1e-4
    assert said["gap"]["largest"] < 1e-4  # the base was not quantised
    assert said["untied"] is kind.startswith("tied")
    assert said["before"]["margin"] == pytest.approx(said["after"]["margin"], abs=1e-2)
    from peft import PeftModel

    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained)(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
        mine = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert (plain - theirs).abs().max() > 1e-2


@pytest.fixture(scope="module")
def one(tmp_path_factory, pairs):
    """A base and an adapter on it."""
    root = tmp_path_factory.mktemp("one")
    base = tiny.directory(root / "base")
    return base, adapter(base, root / "adapter", **PLAIN)


def test_16_bits_are_rounded_once(one, pairs, tmp_path):
    """What is written is the exact sum, rounded: no weight is off by more than half of its last bit."""
    base, trained = one
    said = merged(trained, tmp_path / "out", pairs)
    assert 1e-5 < said["rounding"]["mean"] <= said["rounding"]["largest"] < 0.05
    from peft import PeftModel

    exact = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained).merge_and_unload()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == exact.state_dict().keys()
    assert all(torch.equal(written[name], given.bfloat16()) for name, given in exact.state_dict().items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert not {"quantization_config", "_name_or_path"} & config.keys()


def test_a_bound_refuses_and_leaves_nothing(one, pairs, tmp_path):
    with pytest.raises(LitDPOError, match=r"drift by .* nats per token .* may by 1e-09 .*`--max_drift`.*Nothing was"):
        merged(one[1], tmp_path / "out", pairs, "--max_drift", 1e-9)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_computes_something_else_is_found(one, pairs, tmp_path, monkeypatch):
    """As a library would that forgets the scale: the files are read again, and do not say what the adapter says."""
    from peft.tuners.lora import Linear

    delta = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: delta(self, name) * 0.5)
    with pytest.raises(LitDPOError, match="The merged model is not what the adapter computes on the same base"):
        merged(one[1], tmp_path / "out", pairs)
    assert not (tmp_path / "out").exists()


def test_a_planted_base_of_the_same_shapes_is_refused_by_its_content(one, pairs, tmp_path):
    """The adapter's record, as `fit` writes it, knows what was trained on; a folder in its place is another."""
    base, trained = one
    place, mine = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(base, place)
    shutil.copytree(trained, mine)
    from lit_dpo.policy import LoRAPolicy

    said = {"base": LoRAPolicy(str(place), quantization="none").model_identity()}
    (mine / "lit_dpo.json").write_text(json.dumps(said))
    known = json.loads((mine / "adapter_config.json").read_text())
    (mine / "adapter_config.json").write_text(json.dumps({**known, "base_model_name_or_path": str(place)}))
    assert "content as in training" in merged(mine, tmp_path / "out", pairs)["base"]
    tiny.model("llama", seed=7).save_pretrained(place)
    with pytest.raises(LitDPOError, match=r"it is another model\. Give the base that it was trained on with `--base`"):
        merged(mine, tmp_path / "other", pairs)
    assert "content as in training" in merged(mine, tmp_path / "moved", pairs, "--base", base)["base"]
    assert not (tmp_path / "other").exists()
    allowed = merged(mine, tmp_path / "allowed", pairs, "--adapter_base", "any")
    assert "another content than in training, as allowed" in allowed["base"]


def test_quantised_weights_are_never_merged_into_and_the_gap_finds_a_wrong_base(pairs, tmp_path, caplog):
    """Trained on weights that are in 4 bits on disk: no digest compares them with a base in 16 bits, log-probs do."""
    base = tiny.directory(tmp_path / "base", hidden_size=64, intermediate_size=128)
    packed = tmp_path / "packed"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(packed)
    tiny.tokenizer().save_pretrained(packed)
    trained = adapter(packed, tmp_path / "adapter", **PLAIN)
    nf4 = ("--quantization", "nf4")
    with pytest.raises(LitDPOError, match=r"are quantised, .* name the model .* with `--merge_base`"):
        merged(trained, tmp_path / "a", pairs, *nf4)
    said = merged(trained, tmp_path / "b", pairs, *nf4, "--merge_base", base, "--max_gap", 9)
    assert said["gap"]["mean"] > 10 * said["rounding"]["mean"] > 0
    assert ("preferred the other way round: what was" in caplog.text) is (said["turned"] > 0.05 * said["pairs"])
    other = tiny.directory(tmp_path / "wrong", seed=7, hidden_size=64, intermediate_size=128)
    bound = said["gap"]["mean"] * 1.2
    with pytest.raises(LitDPOError, match=r"far from what was trained.*4-bit NF4.*see that this is the same model"):
        merged(trained, tmp_path / "c", pairs, *nf4, "--merge_base", other, "--max_gap", bound)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({**PLAIN, "bias": "lora_only"}, "also trained biases or whole modules"),
        ({**PLAIN, "modules_to_save": ["norm"]}, "also trained biases or whole modules"),
        ({**PLAIN, "init_lora_weights": "pissa"}, "changes its base as it loads"),
        ({**PLAIN, "init_lora_weights": "olora"}, "changes its base as it loads"),
        ({**PLAIN, "layer_replication": [[0, 2], [1, 2]]}, "uses PEFT's `layer_replication`"),
    ],
)
def test_what_does_not_merge_is_refused_by_name(one, pairs, tmp_path, options, said):
    trained = adapter(one[0], tmp_path / "adapter", **dict(options))
    with pytest.raises(LitDPOError, match=said):
        merged(trained, tmp_path / "out", pairs)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_not_written(one, tmp_path):
    trained = shutil.copytree(one[1], tmp_path / "adapter")
    weights = load_file(trained / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("inf")
    save_file(weights, trained / "adapter_model.safetensors")
    with pytest.raises(LitDPOError, match="numbers that are not finite"):
        export.main([str(trained), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--dtype", "float16"], "`--dtype` has no effect without `--merge`"),
        (["--private"], "`--private` has no effect without `--push`"),
        (["--merge"], "certified on pairs, and no `config.yaml` of a run is next to"),
        (["--merge", "--max_gap", "0"], "Expected `--max_gap` > 0 but got 0.0"),
        (["--push", "a/b"], "HF_HUB_OFFLINE forbids"),
        (["--push", "a b/c"], "Expected `--push` as organisation/name"),
        (["--base", "no/such/folder"], "there is no 'no/such/folder'"),
    ],
)
def test_refusals(one, tmp_path, capsys, args, said):
    with pytest.raises(SystemExit) as stop:
        main(["export", str(one[1]), str(tmp_path / "out"), *args])
    assert stop.value.code == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_goes_over_what_is_there(one, tmp_path):
    for name in ("empty", "file"):
        path = tmp_path / name
        path.mkdir() if name == "empty" else path.write_text("mine")
        with pytest.raises(LitDPOError, match="is there: name another"):
            export.main([str(one[1]), str(path)])
    with pytest.raises(LitDPOError, match="is a whole model"):
        export.main([str(one[0]), str(tmp_path / "out")])
