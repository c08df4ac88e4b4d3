"""What a model cannot read is found in the data before weights load, with file and row; what it can read trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import tiny
from lit_dpo import CachedReference, ModelReference
from lit_dpo.errors import DataError
from lit_dpo.policy.limits import limits, skeleton_limits
from training import data, module, trainer

LEARNED = ("gpt2", "opt-projected")
OTHERS = {
    "GPTNeoConfig": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]},
    "GPTBigCodeConfig": {"n_embd": 32, "n_layer": 1, "n_head": 4},
    "BioGptConfig": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64},
    "XGLMConfig": {"d_model": 32, "num_layers": 1, "attention_heads": 4, "ffn_dim": 64},
    "GPTJConfig": {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4},
    "CodeGenConfig": {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4},
    "CTRLConfig": {"n_embd": 32, "n_layer": 1, "n_head": 4, "dff": 64},
    "OpenAIGPTConfig": {"n_embd": 32, "n_layer": 1, "n_head": 4},
    "RobertaConfig": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "is_decoder": True,
    },
    "MptConfig": {"d_model": 32, "n_layers": 1, "n_heads": 4},
}


def _pairs(path: Path, *lengths: int) -> Path:
    """One pair for each number of tokens of its longer side, under `tiny.tokenizer`: a character is a token."""
    rows = [{"prompt": "q" * 5, "chosen": "a" * (length - 6), "rejected": "no"} for length in lengths]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _reads(model, length: int) -> bool:
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, length), 5), use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", [*tiny.FLAT, "falcon-alibi", "bloom", "mamba", *OTHERS])
def test_the_context_is_how_far_the_model_can_read(name):
    """The definition: the longest sequence that goes through."""
    if name in OTHERS:
        place = "n_positions" if "n_embd" in OTHERS[name] else "max_position_embeddings"
        given = {"vocab_size": tiny.VOCABULARY, place: 64, "pad_token_id": 1, **OTHERS[name]}
        config = getattr(transformers, name)(**given)
    else:
        config = tiny.config(name)
    model = AutoModelForCausalLM.from_config(config).eval()
    found = limits(model)
    assert found == skeleton_limits(config)
    assert found.vocabulary == tiny.VOCABULARY
    if found.context is None:
        assert _reads(model, 200)
    else:
        assert _reads(model, found.context)
        assert not _reads(model, found.context + 1)


@pytest.mark.parametrize("name", LEARNED)
def test_pairs_up_to_a_learned_context_train_and_one_token_more_is_named(name, tmp_path):
    model = tiny.directory(tmp_path / "model", name)
    exact = _pairs(tmp_path / "exact.jsonl", 64, 30, 64)
    trainer(tmp_path / "run").fit(module(model), data(exact, val=str(exact)))
    trainer(tmp_path / "run").predict(module(model), data(exact, predict=str(exact)))
    beyond = _pairs(tmp_path / "beyond.jsonl", 64, 30, 65)
    for stage, pairs in (
        ("fit", data(beyond)),
        ("fit", data(exact, val=str(beyond))),
        ("validate", data(exact, val=str(beyond))),
        ("predict", data(exact, predict=str(beyond))),
        ("fit", data(exact, val={"one": str(exact), "two": str(beyond)})),
    ):
        dpo = module(model)
        with pytest.raises(DataError) as error:
            getattr(trainer(tmp_path / "run"), stage)(dpo, pairs)
        assert f"{beyond}, row 2 (from 0): 65 tokens" in str(error.value)
        assert "up to 64 tokens" in str(error.value)
        assert "--data.max_length 64" in str(error.value)
        assert dpo.model is None
    trainer(tmp_path / "run").fit(module(model), data(beyond, max_length=64))


def test_rows_beyond_are_named_by_their_own_file_and_dropped_ones_do_not_count(tmp_path):
    model = tiny.directory(tmp_path / "model", "gpt2")
    files = [_pairs(tmp_path / "a.jsonl", 90, 20), _pairs(tmp_path / "b.jsonl", 90, 20, 65)]
    pairs = data("unused", max_length=80)
    pairs.sources["train"] = [str(file) for file in files]
    with pytest.raises(DataError, match=r"b\.jsonl, row 2 \(from 0\): 65 tokens"):
        trainer(tmp_path).fit(module(model), pairs)


def test_a_long_pair_of_a_model_with_computed_positions_is_said_and_trained(tmp_path):
    model = tiny.directory(tmp_path / "model", "llama")
    pairs = data(_pairs(tmp_path / "long.jsonl", 65, 30, 64))
    with tiny.records("lit_dpo") as found:
        trainer(tmp_path / "run").fit(module(model), pairs)
    said = [one.getMessage() for one in found if "made for" in one.getMessage()]
    assert len(said) == 1
    assert "train: 1 of 3 pairs are longer than the 64 tokens" in said[0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_token_that_the_model_has_not_is_named(name, tmp_path):
    model = tiny.directory(tmp_path / "model", name)
    larger = tiny.tokenizer()
    larger.add_tokens(["<new>"])
    larger.save_pretrained(tmp_path / "larger")
    path = _pairs(tmp_path / "pairs.jsonl", 20, 20)
    trainer(tmp_path / "run").fit(module(model), data(path, tokenizer=str(tmp_path / "larger")))
    with path.open("a") as stream:
        stream.write(json.dumps({"prompt": "q", "chosen": "a<new>", "rejected": "b"}) + "\n")
    dpo = module(model)
    with pytest.raises(DataError, match=r"pairs\.jsonl, row 2 \(from 0\): token id 97, but .*has 97 token ids"):
        trainer(tmp_path / "run").fit(dpo, data(path, tokenizer=str(tmp_path / "larger")))
    assert dpo.model is None


@pytest.mark.parametrize("cached", [False, True])
def test_a_reference_reads_every_pair_too(tmp_path, cached):
    model = tiny.directory(tmp_path / "model", "llama")
    reference = ModelReference(str(tiny.directory(tmp_path / "short", "gpt2")), quantization="none")
    reference = CachedReference(reference, str(tmp_path / "cache")) if cached else reference
    path = _pairs(tmp_path / "pairs.jsonl", 20, 65)
    with pytest.raises(DataError, match=r"pairs\.jsonl, row 1 .*the reference .*up to 64 tokens"):
        trainer(tmp_path / "run").fit(module(model, reference=reference), data(path))
