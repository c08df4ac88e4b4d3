"""The kernel of GPUs by its rule: what `attention.py` tells it is one sequence at a time, in value and gradient."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

import kernel
import tiny
from lit_dpo.data.batch import collate
from lit_dpo.logps import attention
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.score import completion_logps

FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # float32, so that one token shows in any digit
# Answers of one token, the longest in the middle, rejected longer and shorter than chosen, prompts beyond any window.
PAIRS = tiny.pairs((9, 14, 6), (1, 1, 1), (20, 1, 11, 4), (3, 5, 5))
ARCHITECTURES = [name for name in tiny.FLAT if name != "gemma2"]  # whose soft-cap the kernel does not have
WINDOWED = {"mistral-window": 2, "qwen2-window": 1, "gemma3": 2, "olmo3": 2, "afmoe": 2, "modernbert-decoder": 1}


def _apart(model, reference):
    """How far values, nats per token, and gradients, of the largest, are from one sequence at a time."""
    scored = completion_logps(model, collate(PAIRS))
    truth = tiny.one_at_a_time(reference, PAIRS)
    tiny.weighted(scored.total).backward()
    tiny.weighted(torch.stack([part.sum() for part in truth])).backward()
    found, expected = tiny.gradients(model), tiny.gradients(reference)
    assert expected.keys() == found.keys()
    largest = max(float(one.abs().max()) for one in expected.values())
    values = float((scored.per_token - torch.cat(truth)).detach().abs().max())
    return values, max(float((found[name] - expected[name]).abs().max()) for name in found) / largest


def _models(name, **changes):
    model = tiny.lora(tiny.model(name, **changes))
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("release", kernel.RELEASES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_kernel_is_told_what_one_sequence_at_a_time_is(name, release, monkeypatch):
    """Full causal, windows shorter than the rows, grouped heads, answers of other lengths than their keys."""
    model, reference = _models(name)
    assert choose_layout(model) == "flat"
    calls = kernel.emulate(monkeypatch, kernel.RELEASES[release], FLOATS)
    values, gradients = _apart(model, reference)
    without = WINDOWED.get(name, 0) if release == "2.10" else 0  # which has no windows
    tokens = sum(len(one.prompt) + sum(map(len, one.completions)) for one in PAIRS)
    assert calls == [tokens] * (2 - without)
    assert values < 1e-4
    assert gradients < 1e-4


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"head_dim": 16}])
def test_any_grouping_of_heads(changes, monkeypatch):
    model, reference = _models("llama", **changes)
    choose_layout(model)
    assert len(kernel.emulate(monkeypatch, types=FLOATS)) == 0
    assert max(_apart(model, reference)) < 1e-4


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_the_probe_takes_the_kernel_by_its_numbers(name, monkeypatch):
    """`choose_layout` itself runs through it."""
    calls = kernel.emulate(monkeypatch, types=FLOATS)
    assert choose_layout(tiny.model(name)) == "flat"
    assert calls


def test_a_soft_cap_and_other_types_do_not_reach_the_kernel(monkeypatch):
    calls = kernel.emulate(monkeypatch)
    for model in (tiny.model("gemma2").bfloat16(), tiny.model("llama"), tiny.model("llama", head_dim=12).bfloat16()):
        assert choose_layout(model) == "flat"
    assert not calls


def _one_more(layout, place):
    """The layout's indices, one of them moved by a token."""
    index, cu_q, cu_k, *_ = layout.varlen()
    if place == "gather":
        index = (index + 1).clamp(max=int(index.max()))
    if place == "one key":
        index = index.clone()
        index[3] += 1
    if place == "queries":
        cu_q = cu_q.clone()
        cu_q[2] += 1
    if place == "keys":
        cu_k = cu_k.clone()
        cu_k[2] -= 1  # so that every query still sees a key
    return index, cu_q, cu_k, int(cu_q.diff().max()), int(cu_k.diff().max())


@pytest.mark.parametrize("place", ["gather", "one key", "queries", "keys"])
def test_an_index_that_is_off_by_a_token_shows(place, monkeypatch):
    """The law above sees it, and by far more than its tolerance."""
    model, reference = _models("llama")
    choose_layout(model)
    kernel.emulate(monkeypatch, types=FLOATS)
    varlen = attention.PairLayout.varlen

    class Moved(attention.PairLayout):
        def varlen(self):
            self.varlen = lambda: varlen(self)
            return _one_more(self, place)

    monkeypatch.setattr("lit_dpo.logps.score.PairLayout", Moved)
    assert min(_apart(model, reference)) > 1e-2


@pytest.mark.parametrize("rule", ["window + 1", "window - 1", "top left", "not causal"])
def test_a_kernel_with_another_rule_shows(rule, monkeypatch):
    model, reference = _models("mistral-window")
    choose_layout(model)

    def other(*given, window_size, **named):
        left, right = window_size
        moved = {"window + 1": (left + 1, right), "window - 1": (left - 1, right), "not causal": (left, -1)}
        return kernel.varlen_2_13(*given, window_size=moved.get(rule, window_size), **named)

    other.__signature__ = inspect.signature(kernel.varlen_2_13)
    kernel.emulate(monkeypatch, other, FLOATS)
    if rule == "top left":
        attend = kernel._attend
        monkeypatch.setattr(
            kernel, "_attend", lambda q, k, v, *rest: attend(q, k[:, : q.shape[1]], v[:, : q.shape[1]], *rest)
        )
    assert min(_apart(model, reference)) > 1e-2


def test_the_emulated_arguments_are_those_of_this_torch():
    """Names, order and defaults, so that a call that is right here is right there."""
    release = ".".join(torch.__version__.split(".")[:2])
    ours = {"2.10": "2.10", "2.11": "2.11"}.get(release, "2.13")
    theirs = inspect.signature(varlen_attn).parameters
    mine = inspect.signature(kernel.RELEASES[ours]).parameters
    if ours == "2.13":
        assert mine.keys() <= theirs.keys()
    else:
        assert list(mine) == list(theirs)
    for name, one in mine.items():
        assert (one.kind, one.default) == (theirs[name].kind, theirs[name].default), name
