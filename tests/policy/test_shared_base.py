"""A base that one run gives back is, to the next, what a freshly loaded one is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lit_dpo import LoRAPolicy
from lit_dpo.logps.attention import plain_attention
from lit_dpo.logps.choice import choose_layout
from lit_dpo.policy import shared
from lit_dpo.policy.kernels import Kernels, kernels_of

CPU = torch.device("cpu")


def _trained(policy: LoRAPolicy) -> Any:
    """A policy after some run: its layout is chosen, and its adapter has moved."""
    torch.manual_seed(1)
    model = policy.load()
    choose_layout(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    return model


def _numbers(model: Any) -> torch.Tensor:
    with torch.no_grad(), plain_attention(model):
        found: torch.Tensor = model(torch.arange(2, 40)[None]).logits
    return found


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("options", [{"use_dora": True}, {"trainable_token_indices": [3, 5]}], ids=str)
def test_a_base_that_was_given_back_is_as_it_was_loaded(tiny_model, quantization, options):
    policy = LoRAPolicy(str(tiny_model), quantization=quantization, r=4, **options)
    fresh = policy.load_base(CPU, torch.float32)
    with shared.keeping():
        used = _trained(policy)
        base = used.get_base_model()
        shared.give_back(used)
        kept = policy.load_base(CPU, torch.float32)
    assert kept is base
    assert [(name, type(module)) for name, module in kept.named_modules()] == [
        (name, type(module)) for name, module in fresh.named_modules()
    ]
    ours, theirs = kept.state_dict(), fresh.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if isinstance(theirs[name], torch.Tensor))
    torch.manual_seed(2)
    again = policy.put_adapters(kept)
    torch.manual_seed(2)
    anew = policy.put_adapters(fresh)
    choose_layout(again)
    choose_layout(anew)
    assert torch.equal(_numbers(again), _numbers(anew))


def test_only_the_same_base_is_shared_and_none_without_being_asked(tiny_model):
    policy = LoRAPolicy(str(tiny_model), quantization="none", r=4)
    with shared.keeping():
        first = _trained(policy)
        assert policy.load_base(CPU, torch.float32) is not first.get_base_model()  # it is in use
        base = first.get_base_model()
        shared.give_back(first)
        assert policy.load_base(CPU, torch.bfloat16) is not base
    shared.give_back(_trained(policy))  # nothing is kept


def test_a_base_that_its_adapters_have_changed_is_not_kept(tiny_model):
    """As those of an adapter file that was trained with PEFT alone may: it starts from a part of the weights."""
    policy = LoRAPolicy(str(tiny_model), quantization="none", r=4)
    with shared.keeping():
        base = policy.load_base(CPU, torch.float32)
        shared.give_back(get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora")))
        assert policy.load_base(CPU, torch.float32) is not base


def test_kernels_do_not_stay_on_a_base_that_is_given_back(tiny_model):
    policy = LoRAPolicy(str(tiny_model), quantization="none")
    with shared.keeping():
        model = policy.load()
        base = model.get_base_model()
        norm = base.model.norm
        base.lit_dpo_kernels = Kernels([(norm, {"forward": type(norm).forward.__get__(norm)})])
        base.lit_dpo_kernels.use(True)
        shared.give_back(model)
        assert "forward" not in vars(norm)
        assert kernels_of(base) is None
        assert policy.load().get_base_model() is base
