"""What the start-up probe would see: windows, lengths, implementations that leave something out, training mode."""

from __future__ import annotations

import copy
import re
from contextlib import contextmanager

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

import tiny
from lit_dpo.data.batch import collate
from lit_dpo.errors import PolicyError
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.layouts import segments
from lit_dpo.logps.probe import probe_batch
from lit_dpo.logps.score import completion_logps
from lit_dpo.policy.kernels import Kernels, kernels_of
from lit_dpo.policy.limits import limits
from lit_dpo.policy.settings import rope_limit

LONG = {"max_position_embeddings": 512}


def _said(model, *attention):
    with tiny.records("lit_dpo.logps.choice") as lines:
        layout = choose_layout(model, *attention)
    return layout, [line.getMessage() for line in lines]


def _tokens(model, pairs):
    with torch.no_grad():
        return completion_logps(model, collate(pairs)).per_token


# ---- windows and lengths ----


@pytest.mark.parametrize(
    ("name", "changes", "longest"),
    [
        ("llama", {}, 16),
        ("mistral-window", {"sliding_window": 100, **LONG}, 107),
        ("mistral-window", {"sliding_window": 256, **LONG}, 263),
        ("mistral-window", {"sliding_window": 257, **LONG}, 16),
        ("mistral-window", {"sliding_window": 60}, 64),  # the model reads no more
        ("modernbert-decoder", {"local_attention": 40, **LONG}, 47),
        ("gpt-oss", {"sliding_window": 128, **LONG}, 135),
        ("llama4", {"attention_chunk_size": 50, **LONG}, 57),
    ],
)
def test_a_probe_is_longer_than_what_bounds_a_layer_where_that_is_short(name, changes, longest):
    first, second = segments(probe_batch(tiny.model(name, **changes)))
    assert first.prompt + max(first.completions) == longest
    assert second.prompt + max(second.completions) == 12


@pytest.mark.parametrize("window", [20, 100, 250])
def test_a_window_that_is_off_by_a_token_is_seen_at_start_up(window):
    """A layer that tells its attention another window than its mask: the flat row reads the one, `eager` the other."""
    model = tiny.model("qwen2-window", sliding_window=window, **LONG)
    model.model.layers[1].self_attn.sliding_window = window + 1
    layout, lines = _said(model)
    assert layout == "padded"
    assert "its log-probs are off by" in lines[0]
    assert choose_layout(tiny.model("qwen2-window", sliding_window=window, **LONG)) == "flat"


class _ByLength(nn.Module):
    """Positions of a model's own code: beyond the original length they depend on the longest row."""

    def __init__(self, rotary, limit):
        super().__init__()
        self.rotary, self.limit = rotary, limit

    def forward(self, x, position_ids):
        cos, sin = self.rotary(x, position_ids)
        return (cos, sin) if position_ids.max() < self.limit else (cos * 0.9, sin * 0.9)


def test_positions_that_depend_on_the_batch_are_seen_at_start_up():
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 40}
    model = tiny.model(rope_parameters=rope, **LONG)
    assert choose_layout(copy.deepcopy(model)) == "flat"
    model.model.rotary_emb = _ByLength(model.model.rotary_emb, 40)
    with pytest.raises(PolicyError, match="cannot be trusted in batches"):
        choose_layout(model)


_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 24,
    "factor": 4.0,
}
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("name", "rope", "limit"),
    [
        ("llama", _DYNAMIC, 32),
        ("llama", _LONG_ROPE, 24),
        ("gemma3", {"sliding_attention": _PLAIN, "full_attention": _DYNAMIC}, 32),
        ("gemma3", {"sliding_attention": _PLAIN, "full_attention": _LONG_ROPE}, 24),
        ("gemma3", {"sliding_attention": _LONG_ROPE, "full_attention": _DYNAMIC}, 24),
        ("olmo3", {"sliding_attention": _PLAIN, "full_attention": _LONG_ROPE}, 24),
        ("modernbert-decoder", {"sliding_attention": _PLAIN, "full_attention": _DYNAMIC}, 32),
    ],
)
def test_the_last_length_at_which_positions_are_a_pairs_own_is_scored_and_the_next_is_refused(name, rope, limit):
    """At the limit a batch mate moves nothing."""
    model = tiny.model(name, rope_parameters=copy.deepcopy(rope), max_position_embeddings=32)
    assert rope_limit(model.config.get_text_config()).tokens == limit
    reference = copy.deepcopy(model)
    choose_layout(model)
    short, at, beyond = (tiny.pairs(lengths) for lengths in ((3, 5, 7), (10, limit - 10, 8), (10, limit - 9, 8)))
    truth = torch.cat(tiny.one_at_a_time(reference, short + at)).detach()
    torch.testing.assert_close(_tokens(model, short + at), truth, rtol=0, atol=1e-4)
    with pytest.raises(
        PolicyError, match=rf"up to {limit} tokens but one has {limit + 1}.*data.max_length` to {limit}"
    ):
        completion_logps(model, collate(short + beyond))
    assert limits(model).context == limit, "longer pairs are refused with file and row before weights load"


def test_old_spellings_of_such_positions_are_seen_too():
    for rope in ({"type": "su", "short_factor": [1.0]}, {"type": "dynamic", "factor": 2.0}):
        for config in ({"rope_scaling": rope}, {"layers": [{"rope_scaling": rope}]}):
            assert rope_limit({**config, "max_position_embeddings": 99}) == (99, rope["type"])
    for config in ({"rope_scaling": None}, {"rope_parameters": _PLAIN}, {"quantizer": {"type": "dynamic"}}):
        assert rope_limit({**config, "max_position_embeddings": 99}) is None
    assert limits(tiny.model("llama")).context is None


# ---- implementations that leave something out ----


def _without_soft_cap(module, query, key, value, attention_mask, softcap=None, **others):
    """What `sdpa` did in transformers 5.17: the soft-cap is taken and not read."""
    return transformers.integrations.sdpa_attention.sdpa_attention_forward(
        module, query, key, value, attention_mask, **others
    )


@pytest.fixture
def supported(monkeypatch):
    """Gemma 2 may be under `sdpa`, as in transformers 5.17; later releases refuse it."""
    monkeypatch.setattr(transformers.Gemma2PreTrainedModel, "_supports_sdpa", True)


@contextmanager
def _forgetful(model, name):
    """The model under an implementation of that name which ignores the soft-cap."""
    before = AttentionInterface()[name] if name in AttentionInterface().valid_keys() else None
    AttentionInterface.register(name, _without_soft_cap)
    AttentionMaskInterface.register(name, AttentionMaskInterface()["sdpa"])
    try:
        model.config._attn_implementation = name
        yield model
    finally:
        if before is not None:
            AttentionInterface.register(name, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_truth_of_a_model_with_a_soft_cap_is_eagers(dtype, supported):
    """The flat row, and plain rows for whoever generates, have the cap."""
    model, reference = (tiny.model("gemma2").to(dtype) for _ in range(2))
    reference.set_attn_implementation("eager")
    with _forgetful(model, "sdpa"):
        layout, lines = _said(model)
        assert layout == "flat"
        assert lines == ["Gemma2ForCausalLM: `eager` instead of `sdpa`, which has no soft-cap."]
        assert model.lit_dpo_plain_attention == "eager"
        truth = torch.cat(tiny.one_at_a_time(reference, tiny.pairs())).detach()
        torch.testing.assert_close(
            _tokens(model, tiny.pairs()), truth, rtol=0, atol=1e-4 if dtype.itemsize > 2 else 0.3
        )


def test_padded_rows_under_an_implementation_that_leaves_something_out_are_eagers():
    """A cap that only `eager` has, in a model whose flat row is not exact: it says why, and which rows it gets."""
    model = tiny.model("gemma2")
    model.model.layers[0].self_attn.sliding_window = 3
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    with _forgetful(model, "forgetful"):
        layout, lines = _said(model)
        assert layout == "padded"
        assert "padded rows instead of the flat row" in lines[0]
        assert "`eager` instead of `forgetful`, which is off by" in lines[1]
        truth = torch.cat(tiny.one_at_a_time(reference, tiny.pairs())).detach()
        torch.testing.assert_close(_tokens(model, tiny.pairs()), truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "why"), [("sdpa", "has no soft-cap"), ("forgetful", "is off by .* from `eager`")])
def test_such_an_implementation_is_refused_where_it_was_asked_for(name, why, supported):
    with _forgetful(tiny.model("gemma2"), name) as model:
        with pytest.raises(PolicyError, match=rf"attention={name} {why}.*Gemma2ForCausalLM.*Use `eager` or `auto`"):
            choose_layout(model, name)
        assert _said(model, "eager") == ("padded", [])


# ---- layers that hand nothing on, numbers that are never the same twice ----


class _Deaf(nn.Module):
    """A layer that does not hand on what it is told."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, position_embeddings=None, attention_mask=None, **_):
        return self.layer(hidden, position_embeddings=position_embeddings, attention_mask=attention_mask)


def test_layers_that_hand_nothing_on_get_padded_rows():
    model, plain = tiny.model(), tiny.model()
    model.model.layers[1] = _Deaf(model.model.layers[1])
    expected = "padded rows instead of the flat row: its layers do not hand what they are told on to their attention."
    assert _said(model) == ("padded", [f"LlamaForCausalLM: {expected}"])
    assert _said(plain) == _said(plain) == ("flat", []), "chosen again, it begins where it began"
    torch.testing.assert_close(_tokens(model, tiny.pairs()), _tokens(plain, tiny.pairs()), rtol=0, atol=1e-4)


def test_numbers_that_differ_a_little_each_time_are_no_dropout():
    """As of kernels that add in any order: in evaluation mode they differ as much as in training mode."""
    model, calls = tiny.model(), []

    def waver(module, inputs, output):
        calls.append(output)
        return output + (-1) ** len(calls) * 3e-4 * torch.linspace(-1, 1, output.shape[-1])

    model.model.norm.register_forward_hook(waver)
    one, other = (_tokens(model, tiny.pairs()) for _ in range(2))
    assert 1e-4 < float((one - other).abs().max()) < 1e-3
    assert choose_layout(model, "eager") == "padded"


# ---- kernels ----


def _off(by, gradient=0.0):
    """A norm's forward that is off by so much, and its gradient."""

    def make(norm):
        def forward(hidden):
            found = type(norm).forward(norm, hidden)
            return found * (1 + by) + gradient * (found - found.detach())

        return forward

    return make


def _broken(norm):
    def forward(hidden):
        raise RuntimeError("no such instruction.\nOn line 7.")

    return forward


@pytest.mark.parametrize(
    ("make", "dtype", "said"),
    [
        (_off(0.0), torch.float32, "Liger's kernels in LlamaRMSNorm"),
        (_off(0.1), torch.float32, r"no kernels of Liger: log-probs are off by .* nats per token \(tolerance 0.001\)"),
        (_off(0.0, 0.1), torch.float32, r"no kernels of Liger: gradients are off by .* \(tolerance 0.01\)"),
        (_off(0.0, 0.1), torch.bfloat16, "Liger's kernels in LlamaRMSNorm"),
        (_off(0.0, 1.0), torch.bfloat16, r"no kernels of Liger: gradients are off by .* \(tolerance 0.2\)"),
        (_off(float("nan")), torch.float32, "no kernels of Liger: log-probs are off by nan"),
        (_broken, torch.float32, "no kernels of Liger: no such instruction"),
    ],
)
def test_kernels_stay_on_where_numbers_and_gradients_are_the_models_own(make, dtype, said):
    """Stand-ins for kernels, on the last norm, whose code is another one; measured by the probe as real ones are."""
    model = tiny.lora(tiny.model(num_hidden_layers=1).to(dtype), targets=["q_proj"])
    base = model.get_base_model()
    base.lit_dpo_kernels = Kernels([(base.model.norm, {"forward": make(base.model.norm)})])
    _, (line,) = _said(model)
    assert re.fullmatch(rf"LlamaForCausalLM: {said}.*\.", line)
    assert kernels_of(base).on == (not said.startswith("no"))
    assert ("forward" in vars(base.model.norm)) == kernels_of(base).on
    assert all(p.grad is None for p in model.parameters())


def test_kernels_of_a_model_that_trains_nothing_are_held_to_its_numbers():
    model = tiny.model(num_hidden_layers=1).requires_grad_(False)
    model.lit_dpo_kernels = Kernels([(model.model.norm, {"forward": _off(0.0)(model.model.norm)})])
    assert _said(model) == ("flat", ["LlamaForCausalLM: Liger's kernels in LlamaRMSNorm."])
