"""Each option of fresh adapters has an effect; the reference stays the base, and what is saved is what was trained."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

import tiny
from lit_dpo import AdapterReference, DPOModule, EMAReference, LoRAPolicy, ModelReference
from lit_dpo.errors import PolicyError
from lit_dpo.logps.attention import plain_attention
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.score import completion_logps
from lit_dpo.memory import Lengths, StepEstimate, estimate_step, optimizer_bytes, stored_bytes
from lit_dpo.plan.skeleton import skeleton
from lit_dpo.policy.checks import keep_trainable
from lit_dpo.references import BaseReference
from training import adapter, data, trainer

BATCH = tiny.batch()
FEW = {"target_modules": ["q_proj", "v_proj"]}
PARAMETERS = ("target_parameters", "target_parameters alone")
OPTIONS = {
    "rslora": ("llama", {"use_rslora": True, **FEW}),
    "dora": ("llama", {"use_dora": True, **FEW}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian", **FEW}),
    "rank_pattern": ("llama", {"rank_pattern": {"q_proj": 5}, **FEW}),
    "alpha_pattern": ("llama", {"alpha_pattern": {"layers.1.self_attn.q_proj": 99}, **FEW}),
    "exclude_modules": ("llama", {"exclude_modules": ["q_proj"]}),
    "exclude_modules as a pattern": ("llama", {"exclude_modules": r".*\.(q|k)_proj"}),
    "layers_to_transform": ("llama", {"layers_to_transform": [1], **FEW}),
    "layers_pattern": ("llama", {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    "target_parameters": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
    "target_parameters alone": ("mixtral", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "trainable_token_indices": ("llama", {"trainable_token_indices": [50, 60, 72], **FEW}),
    "trainable_token_indices, tied": ("llama-tied", {"trainable_token_indices": [50, 60, 72], **FEW}),
}
# What scales and starts adapters goes together, and of two spellings one is enough where layers are left out.
SCALES = ("rslora", "gaussian", "rank_pattern", "alpha_pattern")
TOGETHER = {"scales": ("llama", {name: value for case in SCALES for name, value in OPTIONS[case][1].items()})}
CASES = [
    *((name, "nf4") for name in [*TOGETHER, *OPTIONS] if name not in (*SCALES, "exclude_modules", *PARAMETERS)),
    *((name, "none") for name in OPTIONS if name in PARAMETERS or "tied" in name),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return lambda name: root / name if (root / name).is_dir() else tiny.directory(root / name, name)


def _totals(logps):
    return logps.total.detach()


def _policy(folder, case, quantization, **changes):
    name, options = (OPTIONS | TOGETHER)[case]
    return LoRAPolicy(str(folder(name)), quantization=quantization, r=4, **{**options, **changes})


def _fit(policy, pairs_file, root, *, ckpt_path=None, steps=2, keep=None, **kwargs):
    torch.manual_seed(0)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    dpo = DPOModule(policy, optimizer=optimizer, lr_scheduler="constant", **kwargs)
    run = trainer(root, callbacks=[keep] if keep else [], enable_checkpointing=bool(keep), max_steps=steps)
    run.fit(dpo, data(pairs_file), ckpt_path=ckpt_path)
    return dpo


def _base(policy):
    """The base loaded alone."""
    return _base_of(policy.model, policy.quantization)


@functools.cache
@functools.cache
def _base_of(model, quantization):
    base = LoRAPolicy(model, quantization=quantization).load_base(torch.device("cpu"), torch.float32).eval()
    choose_layout(base)
    return _totals(completion_logps(base, BATCH))


@pytest.mark.parametrize(("case", "quantization"), CASES)
def test_an_option_trains_beside_an_exact_base_and_is_saved_whole(case, quantization, folder, pairs_file, tmp_path):
    from peft import AutoPeftModelForCausalLM

    policy = _policy(folder, case, quantization)
    fresh = policy.load().eval()
    choose_layout(fresh)
    assert torch.equal(_totals(completion_logps(fresh, BATCH)), _base(policy)), "a fresh adapter does nothing"
    assert {p.dtype for p in fresh.parameters() if p.requires_grad} == {torch.float32}
    keep = ModelCheckpoint(tmp_path / "a", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    dpo = _fit(policy, pairs_file, tmp_path / "a", keep=keep)
    model = dpo.model.eval()
    scores = _totals(completion_logps(model, BATCH))
    # the reference is the base, and the policy no longer
    assert torch.equal(_totals(BaseReference().logps(model, BATCH)), _base(policy))
    assert not torch.allclose(scores, _base(policy))
    # what is exported is what was trained
    loaded = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "a" / "adapter", quantization_config=policy.quantization_config(torch.float32), dtype=torch.float32
    ).eval()
    keep_trainable(loaded)
    ids = torch.arange(40, 75)[None]
    with torch.no_grad(), plain_attention(model):
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=2e-4)
    # a run that stopped goes on to the bit, and a checkpoint loads
    resumed = _fit(policy, pairs_file, tmp_path / "b", ckpt_path=tmp_path / "a" / "step=1.ckpt")
    for other in (resumed, DPOModule.load_from_checkpoint(tmp_path / "a" / "step=2.ckpt")):
        assert adapter(other).keys() == adapter(dpo).keys()
        assert all(torch.equal(p, adapter(dpo)[name]) for name, p in adapter(other).items())
    saved = torch.load(tmp_path / "a" / "step=2.ckpt", weights_only=True)["state_dict"]
    assert {name.removeprefix("model.") for name in saved} == adapter(dpo).keys()


@pytest.fixture(scope="module")
def two_steps(folder, pairs_file, tmp_path_factory):
    """Log-probs after two steps of a model with these options."""

    def scored(name, **options):
        policy = LoRAPolicy(str(folder(name)), quantization="none", r=4, **options)
        model = _fit(policy, pairs_file, tmp_path_factory.mktemp("two")).model.eval()
        return _totals(completion_logps(model, BATCH))

    @functools.cache
    def without(name, targets):
        return scored(name, target_modules=json.loads(targets))

    return scored, lambda name, targets: without(name, json.dumps(targets))


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_has_an_effect(case, two_steps):
    """After the same steps the policy is another one than without it."""
    (name, options), (scored, without) = OPTIONS[case], two_steps
    plain = without(name, options.get("target_modules") or "all-linear")
    assert not torch.allclose(scored(name, **options), plain, atol=1e-4)


MOVING = ["dora", "rank_pattern", "target_parameters", "trainable_token_indices", "trainable_token_indices, tied"]


@pytest.mark.parametrize("case", MOVING)
def test_a_reference_that_follows_is_the_policy_at_each_hard_update(case, folder, pairs_file, tmp_path):
    policy = _policy(folder, case, "none")
    reference = EMAReference(alpha=1.0, every=1)
    model = _fit(policy, pairs_file, tmp_path, reference=reference).model.eval()
    assert torch.equal(_totals(reference.logps(model, BATCH)), _totals(completion_logps(model, BATCH)))
    assert not torch.allclose(_totals(reference.logps(model, BATCH)), _base(policy))


@pytest.mark.parametrize("case", MOVING)
def test_an_adapter_that_is_continued_is_a_reference_that_stays(case, folder, pairs_file, tmp_path):
    first = _fit(_policy(folder, case, "none"), pairs_file, tmp_path / "a").model.eval()
    start = _totals(completion_logps(first, BATCH))
    model, path = OPTIONS[case][0], str(tmp_path / "a" / "adapter")
    policy = LoRAPolicy(str(folder(model)), quantization="none", adapter_path=path)
    dpo = _fit(policy, pairs_file, tmp_path / "b")
    assert dpo.reference == AdapterReference()
    torch.testing.assert_close(_totals(dpo.reference.logps(dpo.model, BATCH)), start, rtol=0, atol=1e-5)
    assert torch.equal(_totals(BaseReference().logps(dpo.model, BATCH)), _base(policy))
    assert not torch.allclose(_totals(completion_logps(dpo.model.eval(), BATCH)), start)


def test_trained_tokens_on_one_side_alone_are_refused_with_the_way_out(folder, pairs_file, tmp_path):
    """PEFT fails to load the one, and lets the other's tokens into the policy where the head shares them."""
    kinds = {"tokens": {"trainable_token_indices": [50, 60]}, "plain": {"target_modules": ["q_proj"]}}
    policies = {n: LoRAPolicy(str(folder("llama-tied")), quantization="none", r=4, **kinds[n]) for n in kinds}
    trained = {name: _fit(policy, pairs_file, tmp_path / name, steps=1) for name, policy in policies.items()}
    for mine, theirs in (("tokens", "plain"), ("plain", "tokens")):
        path = str(tmp_path / theirs / "adapter")
        for refuse in (
            AdapterReference(path).check,
            lambda policy, path=path: AdapterReference(path).attach(None, policy),
        ):
            with pytest.raises(PolicyError, match="both to have `trainable_token_indices`, or neither"):
                refuse(policies[mine])
        reference = ModelReference(str(folder("llama-tied")), quantization="none", adapter_path=path)
        model = policies[mine].load()
        reference.attach(model, policies[mine])
        expected = _totals(completion_logps(trained[theirs].model.eval(), BATCH))
        torch.testing.assert_close(_totals(reference.logps(model, BATCH)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_lora_weights": False}, "`init_lora_weights` to be true or gaussian but got False"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` to be true or gaussian but got 'pissa'"),
        ({"rank_pattern": {"q_proj": 0}}, "`rank_pattern` to give numbers > 0"),
        ({"rank_pattern": {"q_prj": 3}}, "`rank_pattern`: 'q_prj' chooses nothing"),
        ({"alpha_pattern": {"lm_head": 3}}, "`alpha_pattern`: 'lm_head' chooses nothing"),
        ({"exclude_modules": ["q_prj"]}, "`exclude_modules`: 'q_prj' chooses nothing"),
        ({"layers_to_transform": [1]}, "`target_modules` to be a list of names"),
        ({"layers_to_transform": [7], "target_modules": ["q_proj"]}, "(?s)layers|Target modules"),
        ({"layers_to_transform": [1, 7], "target_modules": ["q_proj"]}, "`layers_to_transform`: 7 chooses nothing"),
        ({"layers_pattern": "h"}, "`layers_pattern` has no effect"),
        ({"target_parameters": ["mlp.gate"]}, "parameters|`target_parameters`"),
        ({"target_parameters": ["x"], "dropout": 0.1}, "`target_parameters` does not go with `dropout`"),
        ({"target_parameters": ["x"], "use_dora": True}, "`target_parameters` does not go with `use_dora`"),
        ({"target_parameters": ["x"], "quantization": "nf4"}, "quantization=none with `target_parameters`"),
        ({"trainable_token_indices": [97]}, "`trainable_token_indices` from 0 to 96 but got 97"),
        ({"trainable_token_indices": [-1]}, "`trainable_token_indices` from 0 to 96 but got -1"),
        ({"trainable_token_indices": [3, 3]}, "each token once"),
        ({"trainable_token_indices": [3], "target_modules": ["embed_tokens"]}, "Cannot load adapters as the options"),
    ],
)
def test_what_has_no_effect_or_no_exact_reference_is_refused_before_weights_load(options, said, folder, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(PolicyError, match=said):
        LoRAPolicy(str(folder("llama")), **{"quantization": "none", "r": 2, **options}).check()


def test_an_option_of_a_fresh_adapter_is_refused_beside_a_trained_one(folder, pairs_file, tmp_path):
    _fit(_policy(folder, "rslora", "none"), pairs_file, tmp_path, steps=1)
    given = {"quantization": "none", "adapter_path": str(tmp_path / "adapter")}
    LoRAPolicy(str(folder("llama")), **given, use_rslora=True).check()
    with pytest.raises(PolicyError, match=r"`policy.use_dora` to be left out with `adapter_path`"):
        LoRAPolicy(str(folder("llama")), **given, use_dora=True).check()


@pytest.mark.parametrize("case", ["dora", "rank_pattern", "trainable_token_indices, tied"])
def test_a_step_is_estimated_and_planned_with_it(case, folder):
    """By the same model without weights: what trains, and what a changed table costs, is counted."""
    lengths = Lengths.of([(20, (9, 12)), (8, (15, 7))])

    def loaded(options):
        policy = LoRAPolicy(str(folder(OPTIONS[case][0])), quantization="none", r=4, **{**FEW, **options})
        return policy, policy.load()

    policy, model = loaded(OPTIONS[case][1])
    choose_layout(model)
    estimated = estimate_step(model, [lengths])
    made = skeleton(policy, torch.float32)
    kept = optimizer_bytes(torch.optim.AdamW, torch.device("cpu"))
    planned = StepEstimate(made.model, kept, context=lambda: made.fake).of([lengths])
    assert made.trained == model.get_nb_trainable_parameters()[0]
    assert planned.adapters == estimated.adapters
    assert planned.total == pytest.approx(estimated.total, rel=0.02, abs=40 * 1024)
    _, plain = loaded({})  # its plan is that of `test_plan.py`
    assert estimated.adapters == (2 + kept) * stored_bytes(model)[1] > (2 + kept) * stored_bytes(plain)[1]


def test_what_a_plan_cannot_count_it_refuses(folder):
    with pytest.raises(PolicyError, match="`use_dora` on quantised weights is not counted"):
        skeleton(LoRAPolicy(str(folder("llama")), use_dora=True), torch.float32)
