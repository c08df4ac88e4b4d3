"""TR-DPO's moving reference: the average is the one that is said, and it survives a stop."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from lit_dpo import EMAReference
from lit_dpo.errors import PolicyError, TrainingError
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.score import completion_logps
from lit_dpo.policy import LoRAPolicy
from lit_dpo.policy.adapters import adapter_parameters
from training import Trace, adapter, data, trainer
from training import light as module

BATCH = tiny.batch()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.directory(tmp_path_factory.mktemp("model") / "base")


def _totals(logps):
    return logps.total.detach()


@pytest.mark.parametrize(("alpha", "every"), [(0.6, 1), (0.3, 2), (1.0, 3)])
def test_after_k_updates_it_is_the_model_built_by_hand(folder, alpha, every):
    """Both factors are averaged: ref ← α·policy + (1 − α)·ref every `every` steps."""
    reference, policy = EMAReference(alpha, every), LoRAPolicy(str(folder), quantization="none", r=2, dropout=0.5)
    model = policy.load()
    reference.attach(model, policy)
    choose_layout(model)
    by_hand = {name: p.detach().clone().double() for name, p in adapter_parameters(model).items()}
    for step in range(1, 8):
        tiny.randomize(model, seed=step)
        reference.update(model, step)
        if step % every == 0:
            for name, p in adapter_parameters(model).items():
                by_hand[name] = alpha * p.detach().double() + (1 - alpha) * by_hand[name]
    alone = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=2, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, p in adapter_parameters(alone).items():
            p.copy_(by_hand[name])
    choose_layout(alone)
    found = _totals(reference.logps(model, BATCH))
    torch.testing.assert_close(found, _totals(completion_logps(alone.eval(), BATCH)), rtol=0, atol=1e-4)
    assert not torch.allclose(found, _totals(completion_logps(model.eval(), BATCH)), atol=1e-2) or alpha == 1


def test_it_starts_at_the_policy_and_a_hard_update_puts_the_policy_in_its_place(folder):
    reference, policy = EMAReference(1.0, 2), LoRAPolicy(str(folder), quantization="none", r=2)
    model = policy.load()
    reference.attach(model, policy)
    choose_layout(model)
    start = _totals(completion_logps(model, BATCH))
    assert torch.equal(_totals(reference.logps(model, BATCH)), start)
    tiny.randomize(model)
    reference.update(model, 1)
    assert torch.equal(_totals(reference.logps(model, BATCH)), start)
    reference.update(model, 2)
    assert torch.equal(_totals(reference.logps(model, BATCH)), _totals(completion_logps(model, BATCH)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(model))
    assert model.training


class _Reference(Callback):
    """What the reference says of one batch after each of training's."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(_totals(pl_module.reference.logps(pl_module.model, BATCH)))


def _fit(tiny_model, pairs_file, root, *, ckpt_path=None, accumulate=1):
    trace, said = Trace(), _Reference()
    keep = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(
        root,
        callbacks=[trace, said, *([] if ckpt_path else [keep])],
        enable_checkpointing=True,
        max_epochs=2,
        num_sanity_val_steps=0,
        accumulate_grad_batches=accumulate,
    )
    dpo = module(tiny_model, policy={"quantization": "nf4", "dropout": 0.1}, reference=EMAReference(0.5, 2))
    run.fit(dpo, data(pairs_file), ckpt_path=ckpt_path)
    return trace, said, dpo


@pytest.fixture(scope="module")
def whole(tiny_model, pairs_file, tmp_path_factory):
    """Runs that nothing stops, made once, and their folders: `whole(accumulate)`."""

    @functools.cache
    def made(accumulate):
        root = tmp_path_factory.mktemp("whole")
        return (*_fit(tiny_model, pairs_file, root, accumulate=accumulate), root)

    return made


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_in_the_middle_is_exact(tiny_model, pairs_file, tmp_path, whole, accumulate):
    """Also right after an update, which a checkpoint of that step already holds."""
    trace, said, dpo, root = whole(accumulate)
    for step in (2, 5) if accumulate == 1 else (2,):
        torch.manual_seed(step)
        checkpoint = root / f"step={step}.ckpt"
        again, heard, other = _fit(
            tiny_model, pairs_file, tmp_path / f"b{step}", ckpt_path=checkpoint, accumulate=accumulate
        )
        assert again.losses == trace.losses[-len(again.losses) :]
        assert len(again.losses) == 12 - step * accumulate
        for mine, theirs in zip(heard.seen, said.seen[-len(heard.seen) :], strict=True):
            assert torch.equal(mine, theirs)
        assert all(torch.equal(p, adapter(dpo)[name]) for name, p in adapter(other).items())
    saved = torch.load(root / "step=2.ckpt", weights_only=True)["state_dict"]
    assert len(saved) == 2 * len(adapter(dpo)), "both adapters"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_moves_with_optimizer_steps_not_with_batches(whole, accumulate):
    """At every second step, be that the second batch or the fourth."""
    _, said, _, _ = whole(accumulate)
    moved = [
        number + 2 for number, pair in enumerate(zip(said.seen, said.seen[1:], strict=False)) if not torch.equal(*pair)
    ]
    assert moved == list(range(2 * accumulate, 13, 2 * accumulate))


def test_the_policy_is_exported_alone(whole):
    from safetensors.torch import load_file

    _, _, dpo, root = whole(1)
    exported = load_file(root / "adapter" / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in adapter(dpo)} == set(exported)
    assert all(torch.equal(exported[name.replace(".default", "")], p) for name, p in adapter(dpo).items())


def test_one_that_would_never_move_is_stopped(tiny_model, pairs_file, tmp_path):
    with pytest.raises(TrainingError, match=r"moves every 13 steps but the run has 12"):
        trainer(tmp_path, max_epochs=2).fit(module(tiny_model, reference=EMAReference(1.0, 13)), data(pairs_file))


@pytest.mark.parametrize("arguments", [{"alpha": 0.0}, {"alpha": 1.5}, {"every": 0}])
def test_a_bad_argument_is_named(arguments):
    with pytest.raises(PolicyError, match=f"`reference.{next(iter(arguments))}`"):
        EMAReference(**arguments)


def test_it_is_a_frozen_value():
    assert EMAReference(0.5) == copy.copy(EMAReference(0.5)) != EMAReference(0.6)
    assert hash(EMAReference()) == hash(EMAReference())
