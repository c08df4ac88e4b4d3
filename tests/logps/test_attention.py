"""The pair attention by itself: its mathematics, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

import tiny
from lit_dpo.errors import PolicyError, UnsupportedAttentionError
from lit_dpo.logps.attention import (
    PAIR_ATTENTION,
    PairLayout,
    pair_attention_forward,
    plain_attention,
    use_pair_attention,
)
from lit_dpo.logps.layouts import Segment

PAIRS = [Segment(0, 4, (3, 5)), Segment(12, 1, (2, 4, 1)), Segment(20, 5, (1,)), Segment(26, 1, (1,))]
TOKENS = 28
LAYOUT = PairLayout(PAIRS, torch.device("cpu"))


def _visible(window=None):
    """`(T, T)`, by the definition: same prompt, not in another completion, not later, within the window."""
    pair, part, position = [], [], []
    for number, s in enumerate(PAIRS):
        pair += [number] * (s.prompt + sum(s.completions))
        part += [0] * s.prompt
        position += range(s.prompt)
        for place, length in enumerate(s.completions, 1):
            part += [place] * length
            position += range(s.prompt, s.prompt + length)
    pair, part, position = (torch.tensor(values) for values in (pair, part, position))
    distance = position[:, None] - position
    same = (pair[:, None] == pair) & ((part[:, None] == part) | (part == 0))
    return same & (distance >= 0) & (distance < (window or TOKENS))


def _inputs(heads=4, key_heads=2, width=8, value_width=8):
    random = torch.Generator().manual_seed(0)
    shapes = ((heads, width), (key_heads, width), (key_heads, value_width))
    return [torch.randn(1, n, TOKENS, d, generator=random, requires_grad=True) for n, d in shapes]


def _by_definition(query, key, value, scale, window=None, softcap=None):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~_visible(window), -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 9, 100])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_it_is_masked_attention_in_value_and_gradient(window, softcap, scaling):
    inputs = _inputs()
    found, weights = pair_attention_forward(
        nn.Identity(), *inputs, None, pair_layout=LAYOUT, scaling=scaling, sliding_window=window, softcap=softcap
    )
    expected = _by_definition(*inputs, 8**-0.5 if scaling is None else scaling, window, softcap)
    assert weights is None
    assert found.shape == (1, TOKENS, 4, 8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_in_the_last_layer_a_prompt_asks_with_its_last_token_alone(window, softcap):
    """What is read is the same, in value and gradient; the rest is zero. Other layers are whole."""
    inputs, layer = _inputs(), nn.Identity()
    given = {"pair_layout": PairLayout(PAIRS, torch.device("cpu"), 1), "sliding_window": window, "softcap": softcap}
    read = torch.zeros(TOKENS, dtype=torch.bool)
    for s in PAIRS:
        read[s.start + s.prompt - 1 : s.start + s.prompt + sum(s.completions)] = True
    layer.layer_idx = 0
    whole, _ = pair_attention_forward(layer, *inputs, None, **given)
    layer.layer_idx = 1
    found, _ = pair_attention_forward(layer, *inputs, None, **given)
    assert whole[:, ~read].abs().min() > 0
    assert found.shape == whole.shape
    assert found[:, ~read].abs().max() == 0
    torch.testing.assert_close(found[:, read], whole[:, read], rtol=0, atol=1e-6)
    direction = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1)) * read[:, None, None]
    for one, other in zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(whole, inputs, direction), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("heads", "key_heads", "value_width"), [(4, 4, 8), (4, 1, 8), (4, 2, 5)])
def test_head_groups_and_narrow_values(heads, key_heads, value_width):
    inputs = _inputs(heads, key_heads, 8, value_width)
    found, _ = pair_attention_forward(nn.Identity(), *inputs, None, pair_layout=LAYOUT)
    torch.testing.assert_close(found, _by_definition(*inputs, 8**-0.5), rtol=0, atol=1e-5)


def test_varlen_indices_are_the_two_causal_attentions_of_each_pair():
    """What the GPU kernel is told, run by hand: bottom-right causal blocks of gathered keys."""
    index, cu_q, cu_k, max_q, max_k = LAYOUT.varlen()
    query, key, value = _inputs(2, 2)
    keys, values = key[:, :, index], value[:, :, index]
    parts = []
    for number in range(len(cu_q) - 1):
        q = query[:, :, cu_q[number] : cu_q[number + 1]]
        k, v = (given[:, :, cu_k[number] : cu_k[number + 1]] for given in (keys, values))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        parts.append(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    torch.testing.assert_close(
        torch.cat(parts, 2).transpose(1, 2), _by_definition(query, key, value, 8**-0.5), rtol=0, atol=1e-5
    )
    assert (cu_q.dtype, cu_k.dtype) == (torch.int32, torch.int32)
    assert max_q == int(cu_q.diff().max())
    assert max_k == int(cu_k.diff().max()) == LAYOUT.longest
    assert int(cu_q[-1]) == TOKENS


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("s_aux", torch.zeros(4)),
        ("alibi", torch.zeros(4)),
        ("head_mask", torch.ones(4)),
        ("position_bias", torch.ones(4)),
        ("is_causal", False),
        ("attention_mask", torch.zeros(1, 1, TOKENS, TOKENS)),
        ("dropout", 0.1),
        ("some_future_argument", 1),
    ],
)
def test_an_argument_that_it_does_not_implement_is_refused_by_name(name, given):
    arguments = {"attention_mask": None, "pair_layout": LAYOUT, name: given}
    with pytest.raises(UnsupportedAttentionError, match=name):
        pair_attention_forward(nn.Identity(), *_inputs(), **arguments)


@pytest.mark.parametrize(("name", "given"), [("s_aux", None), ("is_causal", True), ("output_attentions", False)])
def test_an_argument_that_changes_nothing_is_accepted(name, given):
    pair_attention_forward(nn.Identity(), *_inputs(), None, pair_layout=LAYOUT, **{name: given})


def test_a_call_without_a_layout_says_where_plain_rows_belong():
    with pytest.raises(UnsupportedAttentionError, match="plain_attention"):
        pair_attention_forward(nn.Identity(), *_inputs(), None)


def test_it_is_registered_under_its_name():
    use_pair_attention(tiny.model())
    assert AttentionInterface()[PAIR_ATTENTION] is pair_attention_forward


def test_a_model_without_the_attention_interface_is_refused_by_name():
    with pytest.raises(UnsupportedAttentionError, match="BloomForCausalLM"):
        use_pair_attention(tiny.model("bloom"))


def test_plain_attention_without_the_pair_attention_does_nothing():
    model = tiny.model()
    before = model.config._attn_implementation
    with plain_attention(model):
        assert model.config._attn_implementation == before
    assert model.config._attn_implementation == before


def test_a_dropout_in_training_mode_is_refused_and_not_ignored():
    """The base's dropouts are off by the policy; one that is not must not pass in silence, at start-up or later."""
    from lit_dpo.logps.choice import choose_layout
    from lit_dpo.logps.score import completion_logps

    model = tiny.model(attention_dropout=0.3)
    with pytest.raises(PolicyError, match=r"LlamaForCausalLM: in training mode.*'dropout'.*config\.json"):
        choose_layout(model)
    use_pair_attention(model)
    completion_logps(model, tiny.batch())
    with pytest.raises(UnsupportedAttentionError, match="dropout"):
        completion_logps(model.train(), tiny.batch())
