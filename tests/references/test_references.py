"""References: what the policy is compared with, frozen and out of its way."""

from __future__ import annotations

import copy
import pickle
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from lit_dpo.errors import PolicyError, ResumeError
from lit_dpo.logps import CompletionLogps
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.score import completion_logps
from lit_dpo.losses import DPOLoss
from lit_dpo.policy import LoRAPolicy
from lit_dpo.references import AdapterReference, BaseReference, ModelReference, NoReference, Reference

BATCH = tiny.batch()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.directory(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def adapter(folder):
    """A trained adapter in a PEFT directory."""
    model = tiny.lora(AutoModelForCausalLM.from_pretrained(folder), seed=3, lora_dropout=0.5)
    model.save_pretrained(folder.parent / "adapter")
    return folder.parent / "adapter"


def _policy(folder, adapter=None, **options):
    options = {"r": 2, "alpha": 4} | options if adapter is None else options
    return LoRAPolicy(str(folder), quantization="none", adapter_path=adapter and str(adapter), **options)


def _attached(reference, policy):
    model = policy.load()
    reference.attach(model, policy)
    choose_layout(model)
    return model


def _totals(logps):
    return logps.total


def _requires_grad(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.fixture(params=["base", "adapter"])
def case(request, folder, adapter):
    """A reference, its model in training mode with an adapter that has moved, and whether adapters drop out."""
    if request.param == "base":
        reference, policy = BaseReference(), _policy(folder, dropout=0.5)
    else:
        reference, policy = AdapterReference(), _policy(folder, adapter)
    model = _attached(reference, policy)
    tiny.randomize(model, seed=9)
    return reference, model.train()


# ---- the numbers ----


def test_base_reference_is_the_base_model_loaded_alone(folder):
    model = _attached(BaseReference(), _policy(folder))
    tiny.randomize(model)
    alone = AutoModelForCausalLM.from_pretrained(folder)
    choose_layout(alone)
    found = _totals(BaseReference().logps(model, BATCH))
    assert torch.equal(found, _totals(completion_logps(alone, BATCH)).detach())
    assert not torch.allclose(found, _totals(completion_logps(model, BATCH)))


def test_adapter_reference_is_the_policy_before_the_first_step(folder, adapter):
    model = _attached(AdapterReference(), _policy(folder, adapter)).eval()
    assert torch.equal(
        _totals(AdapterReference().logps(model, BATCH)), _totals(completion_logps(model, BATCH)).detach()
    )


def test_adapter_reference_is_its_adapter_on_the_base_loaded_alone(folder, adapter):
    from peft import PeftModel

    model = _attached(AdapterReference(), _policy(folder, adapter))
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
    choose_layout(alone)
    torch.testing.assert_close(
        _totals(AdapterReference().logps(model, BATCH)),
        _totals(completion_logps(alone, BATCH)).detach(),
        rtol=0,
        atol=1e-5,
    )


def test_adapter_reference_takes_another_adapter_than_the_policys(folder, adapter):
    """A fresh policy of another rank, compared with a trained adapter."""
    reference = AdapterReference(path=str(adapter))
    other = _attached(AdapterReference(), _policy(folder, adapter))
    model = _attached(reference, _policy(folder, r=4, alpha=4, target_modules=["q_proj"]))
    assert torch.equal(_totals(reference.logps(model, BATCH)), _totals(AdapterReference().logps(other, BATCH)))


@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_a_reference_does_not_move_with_the_policy(kind, folder, adapter):
    reference = BaseReference() if kind == "base" else AdapterReference()
    model = _attached(reference, _policy(folder, adapter))
    before, policy = _totals(reference.logps(model, BATCH)), _totals(completion_logps(model.eval(), BATCH)).detach()
    tiny.randomize(model, seed=11)
    assert torch.equal(_totals(reference.logps(model, BATCH)), before)
    assert not torch.allclose(_totals(completion_logps(model, BATCH)), policy)


def test_training_steps_do_not_move_a_reference(case):
    reference, model = case
    before = _totals(reference.logps(model, BATCH))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        logps = reference.logps(model, BATCH)
        pairs = CompletionLogps.of(BATCH, completion_logps(model, BATCH), logps).pairs()
        DPOLoss()(pairs).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(_totals(reference.logps(model, BATCH)), before)


# ---- out of the policy's way ----


def test_a_reference_pass_leaves_requires_grad_as_it_was(case):
    reference, model = case
    before = _requires_grad(model)
    assert any(before.values())
    reference.logps(model, BATCH)
    assert _requires_grad(model) == before


def test_a_reference_pass_does_not_thaw_what_a_subclass_froze(case):
    """LoRA-FA trains B alone; PEFT's own `disable_adapter` turns gradients of the whole adapter back on."""
    reference, model = case
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = _requires_grad(model)
    reference.logps(model, BATCH)
    assert _requires_grad(model) == before


def test_only_the_policys_adapter_requires_gradients(case):
    _, model = case
    assert all(".default." in name and "lora_" in name for name, on in _requires_grad(model).items() if on)
    assert any(_requires_grad(model).values())


def test_a_reference_pass_leaves_the_policys_log_probs_and_mode_as_they_were(case):
    reference, model = case
    model.eval()
    before = _totals(completion_logps(model, BATCH)).detach()
    model.train()
    reference.logps(model, BATCH)
    assert model.training
    assert torch.equal(_totals(completion_logps(model.eval(), BATCH)).detach(), before)


def test_a_reference_pass_between_forward_and_backward_changes_no_gradient(case):
    reference, model = case
    model.eval()
    found = []
    for between in (False, True):
        totals = _totals(completion_logps(model, BATCH))
        if between:
            reference.logps(model, BATCH)
        tiny.weighted(totals).backward()
        found.append(tiny.gradients(model))
    tiny.assert_same_gradients(*found, tolerance=0)


def test_reference_log_probs_have_no_graph(case):
    reference, model = case
    logps = reference.logps(model, BATCH)
    assert not logps.total.requires_grad
    assert not logps.per_token.requires_grad


def test_an_error_in_a_reference_pass_leaves_the_policys_adapter_on(case, monkeypatch):
    reference, model = case
    model.eval()
    before = _totals(completion_logps(model, BATCH)).detach()

    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("lit_dpo.references.base.completion_logps", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            reference.logps(model, BATCH)
    assert torch.equal(_totals(completion_logps(model, BATCH)).detach(), before)


def test_adapter_dropout_in_training_does_not_touch_the_reference(case):
    reference, model = case
    with torch.no_grad():
        assert not torch.equal(
            _totals(completion_logps(model, BATCH)), _totals(completion_logps(model, BATCH))
        )  # it is on
    first, second = _totals(reference.logps(model, BATCH)), _totals(reference.logps(model, BATCH))
    assert torch.equal(first, second)
    assert torch.equal(first, _totals(reference.logps(model.eval(), BATCH)))


@pytest.mark.parametrize("reference", [BaseReference(), AdapterReference(), NoReference()], ids=repr)
def test_attaching_leaves_the_policy_in_training_mode_with_its_parameters_trainable(reference, folder, adapter):
    """In eval mode gradient checkpointing and adapter dropout would be off, and nobody would say so."""
    policy = _policy(folder, adapter)
    model = policy.load()
    before = {name for name, on in _requires_grad(model).items() if on}
    reference.attach(model, policy)
    assert model.training
    assert all(module.training for name, module in model.named_modules() if ".reference" not in name)
    assert {name for name, on in _requires_grad(model).items() if on} == before


# ---- adapters that would not be what they seem ----


def test_an_adapter_that_changes_its_base_as_it_loads_is_refused(folder, tmp_path):
    """PiSSA moves weights of the base into the adapter: a second one would move them again, under the policy."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="pissa", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(tmp_path / "pissa")
    with pytest.raises(PolicyError, match=r"init_lora_weights='pissa'"):
        _policy(folder, tmp_path / "pissa").load()
    with pytest.raises(PolicyError, match=r"init_lora_weights='pissa'"):
        AdapterReference(str(tmp_path / "pissa")).check(_policy(folder))


def test_half_an_adapter_is_refused(folder, adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, tmp_path / "half")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[::2]), tmp_path / "half" / "adapter_model.safetensors")
    policy = _policy(folder)
    with pytest.raises(PolicyError, match="does not fit the model"):
        AdapterReference(str(tmp_path / "half")).attach(policy.load(), policy)


def test_resuming_stops_if_the_reference_is_another_and_not_if_it_moved(tiny_model, pairs_file, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    from training import data, trainer
    from training import light as module

    def fit(root, reference, **options):
        keep = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        run = trainer(root, callbacks=[keep], enable_checkpointing=True, limit_train_batches=2)
        run.fit(module(tiny_model, reference=reference), data(pairs_file), **options)

    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    tiny.lora(other, seed=1).save_pretrained(tmp_path / "first")
    shutil.copytree(tiny_model, tmp_path / "model")
    for name, make in (
        ("first", lambda at: AdapterReference(str(at))),
        ("model", lambda at: ModelReference(str(at), quantization="none")),
    ):
        root, moved = tmp_path / f"run-{name}", tmp_path / f"moved-{name}"
        fit(root, make(tmp_path / name))
        shutil.copytree(tmp_path / name, moved)
        fit(tmp_path / "again", make(moved), ckpt_path=root / "step=1.ckpt")
        (weights,) = moved.glob("*.safetensors")
        content = bytearray(weights.read_bytes())
        content[-100] ^= 0x01
        weights.write_bytes(content)
        with pytest.raises(ResumeError, match=r"reference.content.(adapter|model): '"):
            fit(tmp_path / "again", make(moved), ckpt_path=root / "step=1.ckpt")


# ---- configuration ----


def test_what_a_cache_is_of_is_all_that_its_numbers_come_from(folder, adapter, tmp_path):
    """Two references with other numbers are known by other contents; the same one again is known by the same."""
    tiny.lora(AutoModelForCausalLM.from_pretrained(folder), seed=4).save_pretrained(tmp_path / "other")
    base = tiny.directory(tmp_path / "base", seed=1)

    def copied(of, seed):
        model = AutoModelForCausalLM.from_pretrained(of)
        return AdapterReference(), LoRAPolicy.from_model(tiny.lora(model, seed=seed), tiny.tokenizer())

    def contents():
        both = [adapter, tmp_path / "other"]
        adapted = [(AdapterReference(), _policy(folder, one)) for one in both]
        named = [(AdapterReference(str(tmp_path / "other")), _policy(folder, adapter))]
        plain = [(BaseReference(), _policy(of)) for of in (folder, base)]
        models = [
            ModelReference(str(of), quantization="none", dtype=dtype, adapter_path=with_adapter and str(with_adapter))
            for of, dtype, with_adapter in [
                (folder, "float32", None),
                (folder, "bfloat16", None),
                (base, "float32", None),
                (folder, "float32", adapter),
                (folder, "float32", tmp_path / "other"),
            ]
        ]
        others = [(one, _policy(folder)) for one in models]
        given = [copied(folder, 5), copied(folder, 6), copied(base, 5)]
        every = [*adapted, *named, *plain, *others, *given]
        of_run = [one.checkpoint_identity(policy) for one, policy in [*adapted, *others[2:], *given[:2]]]
        return [one.cache_identity(policy) for one, policy in every], of_run

    (first, of_run), again = contents(), contents()
    assert (first, of_run) == again
    assert len(set(map(str, of_run))) == len(of_run), "and a checkpoint is of"
    (named,) = [place for place, one in enumerate(first) if one == first[1] and place != 1]
    assert named == 2, "the same adapter, named twice"
    left = [str(one) for place, one in enumerate(first) if place != named]
    assert len(set(left)) == len(left)


def test_whether_policy_and_reference_start_the_same():
    same = {BaseReference(): True, AdapterReference(): True, AdapterReference("x"): False, ModelReference("m"): False}
    assert {one: one.starts_at_policy for one in same} == same


def test_no_reference_gives_nothing_and_losses_that_need_one_say_so(folder):
    model = _attached(NoReference(), _policy(folder))
    assert NoReference().logps(model, BATCH) is None
    with pytest.raises(ValueError, match="NoReference"):
        DPOLoss()(CompletionLogps.of(BATCH, completion_logps(model, BATCH), None).pairs())


def test_adapter_reference_without_any_adapter_is_a_policy_error(folder):
    policy = _policy(folder)
    with pytest.raises(PolicyError, match=r"`reference.path` or `policy.adapter_path`"):
        AdapterReference().attach(policy.load(), policy)


def test_adapter_reference_to_a_missing_directory_is_a_policy_error_that_names_it(folder):
    policy = _policy(folder)
    with pytest.raises(PolicyError, match="no-such-adapter"):
        AdapterReference(path=str(folder / "no-such-adapter")).attach(policy.load(), policy)


@pytest.mark.parametrize("reference", [BaseReference(), AdapterReference("x"), NoReference()], ids=repr)
def test_references_are_frozen_values(reference):
    assert pickle.loads(pickle.dumps(reference)) == reference == copy.copy(reference)
    assert hash(reference) == hash(copy.copy(reference))
    with pytest.raises(AttributeError):
        reference.anything = 1


def test_the_interface_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Reference()
