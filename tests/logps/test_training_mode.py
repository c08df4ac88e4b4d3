"""Training mode computes what evaluation mode does: dropouts are off, or the model is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from lit_dpo.data.batch import collate
from lit_dpo.errors import PolicyError
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.score import completion_logps
from lit_dpo.policy import LoRAPolicy
from lit_dpo.policy.checks import turn_off_dropout, turn_off_dropout_layers
from lit_dpo.policy.settings import settings


def _tokens(model, pairs):
    with torch.no_grad():
        return completion_logps(model, collate(pairs)).per_token


class _Noisy(nn.Module):
    """A part with a dropout that no configuration names."""

    def __init__(self, part, dropout):
        super().__init__()
        self.part, self.dropout = part, dropout

    def forward(self, x):
        return self.dropout(self.part(x))


class _Functional(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.1, self.training)


class _Halved(nn.Module):
    def forward(self, x):
        return x * 0.5 if self.training else x


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize(
    ("part", "match"),
    [
        (_Functional(), "two passes in training mode differ by"),
        (nn.Dropout(0.1), "two passes in training mode differ by"),
        (_Halved(), "computes something else in training mode"),
    ],
)
def test_what_trains_otherwise_than_it_evaluates_is_refused(part, match, attention):
    model = tiny.model()
    model.model.layers[0].mlp = _Noisy(model.model.layers[0].mlp, part)
    with pytest.raises(PolicyError, match=rf"LlamaForCausalLM:? {match}"):
        choose_layout(model, attention)


def test_dropout_layers_that_the_models_code_makes_by_itself_are_off_and_said_to_be():
    model = tiny.model()
    model.model.layers[0].mlp = _Noisy(model.model.layers[0].mlp, nn.Dropout(0.1))
    with tiny.records("lit_dpo.policy.checks") as lines:
        turn_off_dropout_layers(model)
        turn_off_dropout_layers(tiny.model())
    assert [line.getMessage() for line in lines] == [
        "dropout that is not in the base's configuration is off: dropout 0.1"
    ]
    assert choose_layout(model) == "flat"


def test_random_numbers_that_the_probe_draws_are_given_back():
    """PhiMoE's router draws in training mode, also where there is but one expert to draw."""
    model = tiny.from_config(
        transformers.PhimoeConfig(**{**tiny.SIZES, "num_local_experts": 4, "router_jitter_noise": 0.0})
    )
    before = torch.get_rng_state()
    choose_layout(model)
    assert torch.equal(torch.get_rng_state(), before)


_DBRX = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "vocab_size": tiny.VOCABULARY,
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
}
_MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": tiny.VOCABULARY}


@pytest.mark.parametrize(
    ("config", "dropouts"),
    [
        (
            transformers.DbrxConfig(
                **_DBRX, attn_config={"attn_pdrop": 0.5, "kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
            ),
            ["attn_config.attn_pdrop 0.5"],
        ),
        (transformers.MptConfig(**_MPT, attn_config={"attn_pdrop": 1}, emb_pdrop=0.5), ["attn_config.attn_pdrop 1"]),
        (
            transformers.PhimoeConfig(**{**tiny.SIZES, "num_local_experts": 4, "router_jitter_noise": 0.5}),
            ["router_jitter_noise 0.5"],
        ),
    ],
    ids=["dbrx", "mpt", "phimoe"],
)
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_dropouts_of_nested_configurations_are_off_and_said_to_be(config, dropouts, attention, tmp_path):
    config = copy.deepcopy(config)
    tiny.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    attention = "auto" if type(config).__name__ == "MptConfig" else attention
    policy = LoRAPolicy(str(tmp_path), quantization="none", r=2, attention=attention, target_modules=r".*(Wqkv|q_proj)")
    with tiny.records("lit_dpo.policy.checks") as lines:
        model = policy.load()
    (line,) = [line.getMessage() for line in lines]
    assert all(one in line for one in dropouts)
    choose_layout(model, attention)
    passes = [_tokens(model.train(mode), tiny.pairs()) for mode in (True, True, False)]
    assert torch.equal(passes[0], passes[1])
    torch.testing.assert_close(passes[0], passes[2], rtol=0, atol=1e-6)


def test_dropouts_are_found_at_any_depth():
    config = {
        "dropout": 0.1,
        "use_dropout": True,
        "text_config": {"layers": [{"attn_pdrop": 0.2}, {"attn_pdrop": 0}], "router_jitter_noise": 1},
        "id2label": {0: "no"},
    }

    class Outer:
        def __init__(self):
            self.inner, self.embd_pdrop, self._cache = config, 0.3, {"dropout": 0.1}

    turn_off_dropout(outer := Outer())
    assert [one.path for one in settings(outer) if one.is_number and one.value] == []
    assert outer.inner["use_dropout"] is True
    assert outer._cache == {"dropout": 0.1}


_OWN_CODE = """
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

class OwnForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.norm = nn.Sequential(self.model.norm, nn.Dropout(0.2))
"""


def test_a_models_own_code_with_a_dropout_trains_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tiny.directory(tmp_path / "model")
    (folder / "own_code.py").write_text(_OWN_CODE)
    path = folder / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModelForCausalLM": "own_code.OwnForCausalLM"}})
    )
    weights = {
        name.replace("model.norm.", "model.norm.0."): w for name, w in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    policy = LoRAPolicy(str(folder), quantization="none", r=2, trust_remote_code=True)
    with tiny.records("lit_dpo.policy.checks") as lines:
        model = policy.load()
    assert type(model.get_base_model()).__name__ == "OwnForCausalLM"
    assert "dropout that is not in the base's configuration is off" in lines[0].getMessage()
    choose_layout(model)
    assert torch.equal(_tokens(model.train(), tiny.pairs()), _tokens(model.eval(), tiny.pairs()))
