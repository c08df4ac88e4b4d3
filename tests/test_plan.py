"""What is planned without weights is what is found with them."""

from __future__ import annotations

import copy
import functools
import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import tiny
from lit_dpo import CachedReference, EMAReference, LoRAPolicy, ModelReference
from lit_dpo.cli import main
from lit_dpo.errors import TrainingError
from lit_dpo.logps.choice import choose_layout
from lit_dpo.losses import SFTLoss
from lit_dpo.memory import Lengths, StepEstimate, estimate_step, optimizer_bytes, step_features, stored_bytes
from lit_dpo.plan import plan
from lit_dpo.plan.arithmetic import Arithmetic, _summed, count, measured_rate
from lit_dpo.plan.cards import CARDS, card, device_of
from lit_dpo.plan.mesh import Mesh, Traffic
from lit_dpo.plan.plan import MeanStep, Search, arithmetic_of, planned_steps
from lit_dpo.plan.skeleton import Repeats, skeleton
from lit_dpo.plan.text import means, on_mesh, text_of
from training import data, module, trainer

LONG = {"max_position_embeddings": 512, "vocab_size": 1500}
ONE_LAYER = {**LONG, "num_hidden_layers": 1}  # where layers are alike
PARTS = [(70, (50, 90)), (30, (80, 20)), (9, (60, 66))]
LENGTHS = Lengths.of(PARTS)
CPU = torch.device("cpu")


def _both(folder, name="llama", with_kl=False, changes=ONE_LAYER, **fields):
    """The estimate of a loaded policy, and of one without weights."""
    policy = LoRAPolicy(str(tiny.directory(folder, name, **changes)), **{"r": 4, **fields})
    model = policy.load()
    choose_layout(model, policy.attention)
    made = skeleton(policy, torch.float32)
    kept = optimizer_bytes(torch.optim.AdamW, CPU)
    planned = StepEstimate(made.model, kept, with_kl=with_kl, context=lambda: made.fake).of([LENGTHS])
    return estimate_step(model, [LENGTHS], with_kl=with_kl), planned, model, made


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("llama", "none"),
        ("llama-tied", "int8"),
        *((name, "nf4") for name in ("llama", "qwen2-window", "gemma2", "opt-projected")),
    ],
)
def test_a_step_needs_what_it_needs_with_weights(tmp_path, name, quantization):
    changes = LONG if name in ("qwen2-window", "gemma2") else ONE_LAYER
    found, planned, model, made = _both(tmp_path, name, changes=changes, quantization=quantization)
    assert planned.adapters == found.adapters
    assert planned.weights == pytest.approx(found.weights, rel=0.01, abs=40 * 1024)  # small tables of bitsandbytes
    assert planned.activations == pytest.approx(found.activations, rel=0.02)
    assert planned.total == pytest.approx(found.total, rel=0.02, abs=40 * 1024)
    assert made.trained == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient_checkpointing": True},
        {"target_modules": ["q_proj", "v_proj"], "r": 64},
        {"attention": "sdpa"},
    ],
    ids=repr,
)
def test_so_it_does_whatever_the_policy_says(tmp_path, fields):
    changes = LONG if "gradient_checkpointing" in fields else ONE_LAYER  # which holds one layer of several
    found, planned, *_ = _both(tmp_path, changes=changes, **fields)
    tolerance = 0.06 if fields.get("attention") else 0.02  # transformers makes its masks in another way
    assert planned.total == pytest.approx(found.total, rel=tolerance, abs=40 * 1024)


def test_scales_that_are_not_quantised_weigh_what_they_do(tmp_path):
    folder = str(tiny.directory(tmp_path, **{**ONE_LAYER, "hidden_size": 256, "intermediate_size": 1024}))
    policies = [LoRAPolicy(folder, r=4, double_quantization=double) for double in (True, False)]
    packed, whole = (stored_bytes(policy.load())[0] for policy in policies)
    planned = [stored_bytes(skeleton(policy, torch.float32).model)[0] for policy in policies]
    assert planned == pytest.approx([packed, whole], rel=0.01)
    assert planned[1] - planned[0] == pytest.approx(whole - packed, rel=0.2)


def test_a_loss_that_reads_whole_distributions_needs_more(tmp_path):
    found, planned, *_ = _both(tmp_path, with_kl=True, changes={**ONE_LAYER, "vocab_size": 40_000})
    assert planned.head == pytest.approx(found.head, rel=0.02)


@pytest.mark.parametrize(
    ("name", "changes", "repeats"),
    [
        ("llama", {"num_hidden_layers": 4}, Repeats(0, 1, 4)),
        ("llama", {"num_hidden_layers": 3}, None),
        ("gemma2", {"num_hidden_layers": 8}, Repeats(0, 2, 8)),  # window, full, window, full, …
        ("qwen2-window", {"num_hidden_layers": 5}, Repeats(1, 1, 5)),  # the first sees all
        ("gpt2", {"n_layer": 5, "n_positions": 512, "max_position_embeddings": 512}, Repeats(0, 1, 5)),
    ],
)
def test_layers_that_repeat_are_counted_and_not_run(tmp_path, name, changes, repeats):
    targets = "all-linear" if name == "gpt2" else ["q_proj", "down_proj"]  # in each layer, in both of its parts
    folder = str(tiny.directory(tmp_path, name, **{**LONG, **changes}))
    policy = LoRAPolicy(folder, quantization="none", r=4, target_modules=targets)
    whole = skeleton(policy, torch.float32)
    assert whole.repeats == repeats
    if name not in ("llama", "qwen2-window") or repeats is None:
        return
    shallow, deep = (skeleton(policy, torch.float32, layers=n) for n in (repeats.shallow, repeats.deep))

    def estimate(made):
        return StepEstimate(made.model, 2.0, context=lambda: made.fake)

    model = policy.load()  # all layers are run with weights, which is quicker
    choose_layout(model)
    if name == "qwen2-window":  # of two kinds of layers
        expected = StepEstimate(model, 2.0)
        few, more = map(estimate, (shallow, deep))
        summed = few.with_layers(more, repeats.times, expected.frozen, expected.trained)
        assert summed.of([LENGTHS]).total == pytest.approx(expected.of([LENGTHS]).total, rel=1e-3)
        return
    real = whole._replace(model=model, fake=nullcontext())
    one, two, three = (count(made, torch.enable_grad, LENGTHS) for made in (real, shallow, deep))
    assert two.with_layers(three, repeats.times) == pytest.approx(one, rel=1e-6)


def test_autocast_keeps_its_copies_of_weights_for_one_step_alone(tmp_path):
    """Adapters are cast once in each step; an estimate from probes in one context would take that for a slope."""
    policy = LoRAPolicy(str(tiny.directory(tmp_path, **LONG)), quantization="none", r=64)
    model = policy.load(dtype=torch.bfloat16)
    choose_layout(model)
    bfloat16 = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    small, large = (estimate_step(model, [Lengths.of(PARTS[:n])], context=bfloat16).activations for n in (1, 3))
    first = Lengths.of(PARTS[:1]).tokens
    assert (large - small) / (LENGTHS.tokens - first) == pytest.approx(small / first, rel=0.7)
    assert large < 3 * estimate_step(model, [LENGTHS]).activations


def test_the_arithmetic_is_that_of_the_formula(tmp_path):
    """Each token passes each layer's weights forward, and back but for what no gradient needs."""
    folder = str(tiny.directory(tmp_path, hidden_size=64, **LONG))
    weights, found = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 64), []
    for quantization, many in (("nf4", 50), ("none", 100)):
        lengths = Lengths.of([(2, (60, 60))] * many)
        policy = LoRAPolicy(folder, quantization=quantization, r=1, target_modules=["q_proj", "v_proj"])
        one = count(skeleton(policy, torch.float32), torch.enable_grad, lengths)
        assert one.forward == pytest.approx(2 * weights * lengths.tokens, rel=0.25)
        assert 0.5 * one.forward < one.backward < 2.2 * one.forward
        assert one.head == 2 * 64 * 1500 * lengths.completion.sum()
        found.append(one.training)
    assert found[1] == pytest.approx(2 * found[0], rel=0.01), "twice the tokens, packed or not"


# ---- of a run ----


FEW = {"target_modules": ["q_proj"]}  # these laws are about what comes together, not about what a layer needs


def _plan(model, pairs, tmp_path, device="H100", run=None):
    return plan(module(model, policy=FEW), data(pairs), trainer(tmp_path, **(run or {})), device)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One layer."""
    sizes = {**LONG, "vocab_size": 300, "num_hidden_layers": 1}
    return tiny.directory(tmp_path_factory.mktemp("small") / "model", **sizes)


@pytest.fixture(scope="module")
def plain(small, pairs_file, tmp_path_factory):
    """Four epochs with the base as the reference."""
    return _plan(small, pairs_file, tmp_path_factory.mktemp("plain"), run={"max_epochs": 4})


@pytest.fixture(scope="module")
def searched(small, pairs_file, tmp_path_factory):
    """Steps of any size of batches of 16, on an H100."""
    return _search(small, pairs_file, tmp_path_factory.mktemp("searched"))


def _search(model, pairs, tmp_path, **fields):
    dpo, rows, run = module(model, policy=FEW, **fields), data(pairs, batch_size=16, tokenizer=None), trainer(tmp_path)
    run.strategy.connect(dpo)
    dpo.trainer = rows.trainer = run
    rows.setup("fit")
    return Search(dpo, rows.train_dataloader(), device_of("H100", run), Mesh())


@pytest.mark.parametrize(
    "run",
    [
        {"max_epochs": 3},
        {"max_epochs": 2, "accumulate_grad_batches": 4},
        {"max_epochs": 2, "limit_train_batches": 3},
        {"max_epochs": 2, "limit_train_batches": 0.5},
        {"max_epochs": -1, "max_steps": 7},
        {"max_epochs": 1, "max_steps": 100},
    ],
    ids=repr,
)
def test_the_steps_are_those_that_the_run_makes(small, pairs_file, tmp_path, run):
    trained = trainer(tmp_path, **run)
    steps, epochs = planned_steps(trained, 6)
    trained.fit(module(small, policy=FEW), data(pairs_file))
    assert steps == trained.global_step
    if run["max_epochs"] > 0 and "max_steps" not in run:
        assert epochs == run["max_epochs"]


def test_the_numbers_are_in_its_text(small, pairs_file, tmp_path):
    planned = _plan(small, pairs_file, tmp_path, device="here", run={"max_epochs": 3})
    text = str(planned)
    assert "21 training pairs of" in text
    assert f"{planned.steps} steps, 3 epochs" in text
    assert f"{planned.parameters:,} parameters" in text
    assert "fits    this CPU" in text
    assert "GiB: yes" in text
    assert re.search(r"time .* at 60% to 100% of the .*FLOP/s that one layer reaches here now", text)
    assert planned.longest == max(planned.tokens[0] + planned.tokens[1] + planned.tokens[2], planned.longest)
    assert 0 < planned.seconds[0] < planned.seconds[1]


def test_a_run_without_an_end_has_no_plan(tiny_model, pairs_file, tmp_path):
    with pytest.raises(TrainingError, match="how long shall it train"):
        _plan(tiny_model, pairs_file, tmp_path, run={"max_epochs": -1})


def test_a_reference_that_is_remembered_passes_once_and_none_never(small, tmp_path):
    once = Arithmetic(forward=100.0, backward=70.0, head=9.0)
    given = {"reference": CachedReference(directory=str(tmp_path / "cache"))}, {"loss": SFTLoss()}
    plain, cached, none = (arithmetic_of(module(small, **fields), once, 4) for fields in ({}, *given))
    other = module(small, reference=ModelReference(str(small), quantization="none"))
    assert arithmetic_of(other, once, 4) == plain, "counted as if it were as large as the policy"
    assert none == 4 * (100 + 70 + 2 * 9)
    assert plain == none + 4 * (100 + 9)
    assert cached == none + 100 + 9


def test_a_reference_of_its_own_is_in_memory(small, pairs_file, tmp_path, searched):
    weights, parts = searched.step(searched.wanted).weights, searched.parts
    other = _search(small, pairs_file, tmp_path, reference=ModelReference(str(small), quantization="none"))
    frozen = 2 * other.skeleton.parameters  # in bfloat16
    assert other.step(other.wanted).weights - weights == pytest.approx(frozen, rel=0.01)
    moving = _search(small, pairs_file, tmp_path, reference=EMAReference())
    assert moving.step(moving.wanted).weights - weights == parts.trained


def test_an_adapter_that_is_continued_says_its_own_size(tiny_model, tmp_path):
    policy = LoRAPolicy(str(tiny_model), quantization="none", r=3, target_modules=["q_proj"])
    policy.load().save_pretrained(tmp_path / "adapter")
    continued = LoRAPolicy(str(tiny_model), quantization="none", adapter_path=str(tmp_path / "adapter"), r=16)
    assert skeleton(continued, torch.float32).trained == 2 * 3 * (64 + 64)


def test_what_does_not_fit_says_what_would(searched, plain):
    rows, wanted = searched.step(searched.wanted).total / 2**30, searched.wanted

    def within(gibibytes):
        searched.device = searched.device._replace(memory=(0.5 + gibibytes) * 2**30)
        fitting, checkpointing = searched.fitting()
        made = plain._replace(fitting=fitting, checkpointing=checkpointing, device=searched.device)
        return fitting, text_of(made, searched.module.policy, wanted, "", {})

    assert wanted == 16384
    fitting, said = within(21.5)
    assert fitting == 16384
    assert "H100, 22.0 GiB: yes\n" in said
    fitting, said = within(rows * 0.7)
    assert fitting < 16384
    assert f"yes, with `--model.microbatch_tokens {fitting}`" in said
    assert "no, not even with gradient checkpointing" in within(0)[1]


def test_cards_are_known_by_name():
    assert card("rtx 4090") == card("NVIDIA RTX-4090") == CARDS["RTX-4090"]
    assert all(one.source and one.memory > 0 and one.teraflops > 0 for one in CARDS.values())
    with pytest.raises(TrainingError, match=r"one of B200, H200.* but got 'H1000'"):
        card("H1000")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_rate_of_this_machine_is_a_rate(quantization):
    rate = measured_rate((256, 256), 64, quantization, CPU, torch.float32, seconds=0.1)
    assert 1e8 < rate < 1e14


def test_a_batch_that_is_not_cut_is_one_microbatch(searched):
    found = copy.copy(searched)
    found.wanted = 300
    cut = found.microbatches()
    found.whole = True
    assert cut > found.microbatches() == 1.0


def test_a_network_without_a_bandwidth_is_refused(small, pairs_file, tmp_path):
    with pytest.raises(TrainingError, match="`network` > 0"):
        plan(module(small), data(pairs_file), trainer(tmp_path), "H100", network=0.0)


def test_the_arithmetic_of_padded_prompts_is_that_of_each_prompt_by_itself():
    apart = sum(_summed(Lengths.of([part]), flat=False) for part in PARTS)
    assert (_summed(LENGTHS, flat=False) == apart).all()
    assert all((_summed(one, False) == step_features(one, False)).all() for one in map(Lengths.of, zip(PARTS)))


def test_devices_that_share_nothing_have_no_gather_and_unknown_links_are_not_named(plain):
    """A plan for several of this machine's devices, of which nobody knows how fast they talk."""
    mean, rates = MeanStep(microbatches=4.0, passes=(10.0, 20.0)), (10.0, 20.0)
    unknown = plain.device._replace(card=None)
    traffic = Traffic(reduced=2e6, gathered=(1.0, 1.0))
    copies = plain._replace(mesh=Mesh(1, 2), device=unknown, traffic=traffic)
    found = on_mesh(copies, mean, rates, 400)
    assert [*found] == ["devices", "reduce"]
    assert found["devices"].startswith("2, 1 node of 2, ")
    assert found["reduce"].startswith("2.00 MB of adapters' gradients a step and device, after")
    shared = on_mesh(copies._replace(mesh=Mesh(1, 2, "node")), mean, rates, 400)
    assert [*shared] == ["devices", "reduce", "gather"]
    assert shared["gather"].endswith("4 a step"), "whether it hides is not known"


def test_a_plan_says_days_and_counts_rankings_by_their_comparisons(plain, searched):
    lengths = Lengths.of([(10, (5, 6, 7)), (20, (8, 9))])
    assert means(lengths) == (15.0, (5 + 6 + 7 + 8 + 9) / 2)
    ranked = plain._replace(tokens=means(lengths), prompts=2, completions=5, pairs=4, seconds=(86400.0, 3 * 86400.0))
    said = text_of(ranked, searched.module.policy, searched.wanted, "", {})
    assert "2 training prompts, with 5 completions in 4 comparisons, of 32 tokens (prompt 15, completions 18)" in said
    assert "1 to 3 days: " in said


def test_a_step_waits_for_what_its_arithmetic_does_not_hide_and_for_its_gradients():
    traffic = Traffic(reduced=1.0, gathered=(1.0, 1.0), reducing=0.5, gathering=(3.0, 3.0))
    assert MeanStep(microbatches=4.0, passes=(10.0, 20.0)).waiting(traffic, rate=10.0) == 4 * (2 + 1) + 0.5


# ---- the command ----


def _big(folder):
    """A model of 8 billion parameters: a configuration and a tokenizer."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_eight_billion_parameters_on_a_cluster_are_planned_from_a_configuration(
    tiny_model, pairs_file, tmp_path, capsys
):
    """On a machine without a GPU, outside of SLURM, and without weights."""
    big = tmp_path / "big"
    big.mkdir()
    for file in tiny_model.glob("tokenizer*"):
        (big / file.name).write_bytes(file.read_bytes())
    _big(big)
    configs = Path(__file__).parents[1] / "configs"
    given = ["fit", "--trainer", str(configs / "trainers" / "slurm.yaml"), "--model.policy.model", str(big)]
    given += [
        "--model.policy.target_modules",
        "[q_proj,v_proj]",
        "--model.policy.shard",
        "node",
        "--data.train",
        str(pairs_file),
        "--trainer.max_epochs",
        "1",
    ]
    given += [
        "--trainer.logger.init_args.save_dir",
        str(tmp_path / "runs"),
        "--trainer.default_root_dir",
        str(tmp_path),
    ]
    given += ["--trainer.devices", "4", "--data.batch_size", "1"]
    main([*given, "--plan", "RTX-4090", "--plan_network", "12.5"])
    said = capsys.readouterr().out
    assert "An estimate; no weights were read or downloaded." in said
    assert "2 steps, 1 epoch" in said  # 21 pairs on 16 devices
    assert "8,030,261,248 parameters, nf4, computing in bfloat16; 6,815,744 train" in said
    assert "weights 3.4" in said
    assert "RTX-4090, 23.5 GiB: yes" in said
    assert "devices 16, 4 nodes of 4, `policy.shard` node." in said
    assert "a share of the base over 4 1.06, " in said
    assert "26 GB/s in a node, 5 from node to node (12.5 Gbit/s a device)" in said
    assert re.search(r"reduce  0\.05 GB .* 10 ms", said)
    assert re.search(r"gather  .* in 3 passes; 1 a step; of a forward pass 0\.13 s", said)
    assert "not measured" in said
    assert not (tmp_path / "runs").exists()
