"""Laws of training: where it starts, what a step is, what does not move, and that every option has its effect."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

import ranks
import two_processes
from lit_dpo import AdapterReference, BaseReference, CDPOLoss, DPOLoss, DPOModule, IPOLoss, LoRAPolicy, NoReference
from lit_dpo.checkpoint import save_adapter
from lit_dpo.errors import PolicyError, TrainingError
from lit_dpo.logps.records import PairLogps, SequenceLogps
from lit_dpo.memory import PROBES
from lit_dpo.metrics.collections import preference_metrics
from lit_dpo.references import store
from training import Trace, adapter, data, trainer
from training import light as module


@pytest.fixture(scope="session")
def trained_adapter(tiny_model, pairs_file, tmp_path_factory) -> Path:
    """An adapter that has moved away from the base, as supervised training would have left it."""
    root = tmp_path_factory.mktemp("adapter")
    policy = module(tiny_model)
    trainer(root).fit(policy, data(pairs_file))
    save_adapter(policy.model, policy.policy.load_tokenizer(), root / "sft")
    return root / "sft"


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("start", ["fresh", "continued"])
def test_at_step_0_rewards_are_0_and_the_loss_is_its_value_at_margin_0(
    tiny_model, pairs_file, trained_adapter, start, quantization
):
    policy = {"quantization": quantization}
    policy |= {"adapter_path": str(trained_adapter)} if start == "continued" else {"dropout": 0.3}
    if start == "continued":
        policy |= {"r": 16}
    dpo = module(tiny_model, policy=policy)
    dpo.configure_model()
    dpo.model.eval()
    pairs = dpo.pair_logps(_batch(dpo, pairs_file))
    log_2 = 0.6931472
    for loss, at_zero in ((DPOLoss(), log_2), (CDPOLoss(), log_2), (IPOLoss(), 25), (IPOLoss(average="sum"), 25)):
        of_loss = module(tiny_model, policy=policy, loss=loss)
        assert of_loss.reference == dpo.reference == (AdapterReference() if start == "continued" else BaseReference())
        chosen, rejected = loss.rewards(pairs)
        assert chosen.abs().max() < 1e-5, loss
        assert rejected.abs().max() < 1e-5, loss
        expected = torch.full((8,), float(at_zero))
        torch.testing.assert_close(of_loss.compute_loss(pairs), expected, rtol=1e-4, atol=1e-5, msg=str(loss))


def test_a_policy_that_does_not_start_at_its_reference_is_stopped(tiny_model, pairs_file, trained_adapter, tmp_path):
    dpo = module(tiny_model, policy={"adapter_path": str(trained_adapter), "r": 16}, reference=BaseReference())
    with pytest.raises(TrainingError, match=r"same before the first step[\s\S]*adapter_path[\s\S]*BaseReference\(\)"):
        trainer(tmp_path).fit(dpo, data(pairs_file))


def test_a_module_that_has_trained_goes_on_in_another_fit(tiny_model, pairs_file, tmp_path):
    dpo = module(tiny_model)
    trainer(tmp_path, max_steps=2).fit(dpo, data(pairs_file))
    before = adapter(dpo)
    trainer(tmp_path, max_steps=2).fit(dpo, data(pairs_file))
    assert not all(torch.equal(p, before[name]) for name, p in adapter(dpo).items())


def test_a_loss_that_reads_the_reference_refuses_to_go_without(tiny_model):
    with pytest.raises(PolicyError, match=r"DPOLoss\(beta=0.1\) needs a reference but got NoReference"):
        module(tiny_model, reference=NoReference())


def test_measures_that_an_override_keeps_are_each_stage_s_own(tiny_model):
    kept = preference_metrics()

    class Keeps(DPOModule):
        def configure_metrics(self):
            return kept

    for dpo in (module(tiny_model, kind=Keeps), module(tiny_model)):
        stages = (dpo.train_metrics, dpo.val_metrics, dpo.test_metrics)
        own = [id(one) for measured in (kept, *stages) for one in measured.modules()]
        assert len(own) == len({*own})
        assert [measured.prefix for measured in (kept, *stages)] == [None, "train/", "val/", "test/"]


def test_a_step_is_the_mean_over_its_pairs_however_they_are_batched(tiny_model, pairs_file, tmp_path):
    """21 pairs in windows of 8: the last window has 5, which is no multiple of a batch."""
    whole = _train(tiny_model, pairs_file, tmp_path, batch_size=8, accumulate=1)
    for batch_size, accumulate in ((4, 2), (2, 4), (1, 8)):
        parts = _train(tiny_model, pairs_file, tmp_path, batch_size=batch_size, accumulate=accumulate)
        for name, expected in whole.items():
            torch.testing.assert_close(parts[name], expected, rtol=0, atol=2e-6, msg=f"{name} of {batch_size}")


def test_a_step_over_batches_of_a_token_budget_is_the_same_mean_over_pairs(tiny_model, pairs_file, tmp_path):
    """One window per epoch holds all 21 pairs: in one batch, or in batches of as many pairs as fit 150 tokens."""
    adapters, sizes = [], []
    for batches in ({"batch_size": 21}, {"batch_size": None, "max_tokens": 150}):
        dpo = module(tiny_model, optimizer=functools.partial(torch.optim.SGD, lr=1.0))
        trace = Trace()
        run = trainer(tmp_path, accumulate_grad_batches=100, max_epochs=2, callbacks=[trace])
        run.fit(dpo, data(pairs_file, **batches))
        assert run.global_step == 2
        adapters.append(adapter(dpo))
        sizes.append({len(rows) for rows in trace.rows})
    assert sizes[0] == {21}
    assert len(sizes[1]) > 1
    for name, expected in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], expected, rtol=0, atol=2e-6, msg=name)


def _train(model, pairs_file, root, *, batch_size, accumulate):
    # SGD: Adam's division would blow a rounding error of a tiny gradient up to the size of a step
    optimizer = functools.partial(torch.optim.SGD, lr=1.0)
    dpo = module(model, optimizer=optimizer)
    pairs = data(pairs_file, batch_size=batch_size)
    # the same order for every batch size: only what a step averages is asked here
    pairs._sampler = functools.partial(_in_order, pairs, batch_size)
    trainer(root, accumulate_grad_batches=accumulate).fit(dpo, pairs)
    return adapter(dpo)


def _in_order(pairs, batch_size, table, *_, **__):
    from lit_dpo.data.sampler import PromptSampler

    return PromptSampler(table.lengths, batch_size, shuffle=False, seed=0, rank=0, num_replicas=1)


def test_training_moves_the_adapter_and_nothing_else(tiny_model, pairs_file, tmp_path):
    dpo = module(tiny_model, policy={"quantization": "nf4"})
    dpo.configure_model()
    batch = _batch(dpo, pairs_file)
    frozen = {name: p.detach().clone() for name, p in dpo.model.named_parameters() if not p.requires_grad}
    trains = {name: p.requires_grad for name, p in dpo.model.named_parameters()}
    before, start = dpo.reference.logps(dpo.model, batch), adapter(dpo)
    trainer(tmp_path).fit(dpo, data(pairs_file))
    after = dpo.reference.logps(dpo.model, batch)
    assert torch.equal(before.total, after.total)
    assert {name: p.requires_grad for name, p in dpo.model.named_parameters()} == trains
    assert all(torch.equal(p, frozen[name]) for name, p in dpo.model.named_parameters() if name in frozen)
    assert all(not torch.equal(p, start[name]) for name, p in adapter(dpo).items() if "lora_B" in name)


def test_a_learning_rate_of_0_is_stopped_not_trained(tiny_model, pairs_file, tmp_path):
    with pytest.raises(TrainingError, match="learning rate > 0"):
        trainer(tmp_path, max_epochs=3).fit(module(tiny_model, lr=0.0), data(pairs_file))


def test_a_long_accumulation_with_a_warm_up_is_not_stuck(tiny_model, pairs_file, tmp_path):
    """The first step of a warm-up has a learning rate of 0, and here it is 12 batches away from the second."""
    run = trainer(tmp_path, accumulate_grad_batches=12, max_epochs=2)
    run.fit(module(tiny_model, warmup_ratio=0.5), data(pairs_file, batch_size=1))
    assert run.global_step == 4


def test_validating_first_changes_nothing(tiny_model, pairs_file, tmp_path):
    def train(first):
        dpo, pairs = module(tiny_model), data(pairs_file, val=str(pairs_file))
        if first:
            trainer(tmp_path).validate(dpo, pairs)
        trainer(tmp_path, max_steps=3).fit(dpo, pairs)
        return adapter(dpo)

    plain = train(first=False)
    for name, p in train(first=True).items():
        torch.testing.assert_close(p, plain[name], rtol=0, atol=0)


def test_an_interrupted_window_does_not_count_in_the_next_run(tiny_model, pairs_file, tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("stop")

    dpo = module(tiny_model)
    with pytest.raises(RuntimeError, match="stop"):
        trainer(tmp_path, accumulate_grad_batches=4, callbacks=[Stop()]).fit(dpo, data(pairs_file))
    dpo.fresh = True
    trainer(tmp_path, max_steps=1).fit(dpo, data(pairs_file))
    plain = module(tiny_model)
    trainer(tmp_path, max_steps=1).fit(plain, data(pairs_file))
    for name, p in adapter(dpo).items():
        torch.testing.assert_close(p, adapter(plain)[name], rtol=0, atol=1e-6)


def test_layers_checkpoint_in_fit_and_gradients_are_the_same(tiny_model, pairs_file, tmp_path, monkeypatch):
    """A loaded model is in eval mode, where transformers silently does not checkpoint; Lightning does not change it."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls, forward = [], LlamaMLP.forward

    def counted(self, x):
        calls.append(1)
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    trained, counts = [], []
    for checkpointing in (False, True):
        dpo = module(tiny_model, policy={"gradient_checkpointing": checkpointing})
        dpo.configure_model()
        calls.clear()
        trainer(tmp_path, estimate=True, max_steps=2).fit(dpo, data(pairs_file))
        counts.append(len(calls))
        trained.append(adapter(dpo))
    layers, steps = 2, 2 + len(PROBES)  # the memory estimate's probes run backward too
    assert counts[1] == counts[0] + layers * steps, "each layer of the policy runs again in each backward pass"
    for name, expected in trained[0].items():
        torch.testing.assert_close(trained[1][name], expected, rtol=0, atol=1e-5)


def test_metrics_under_bf16_true_equal_those_under_fp32(tiny_model, pairs_file, tmp_path):
    """The same numbers go in: sums and counts do not round, and adapters stay float32."""
    found = {}
    for precision in ("32-true", "bf16-true"):
        dpo = module(tiny_model, policy={"dtype": "float32"})
        run = trainer(tmp_path, precision=precision)
        run.fit(dpo, data(pairs_file, val=str(pairs_file)))
        assert all(p.dtype == torch.float32 for p in adapter(dpo).values())
        found[precision] = {name: float(value) for name, value in run.callback_metrics.items() if "val/" in name}
    assert found["32-true"].keys() == found["bf16-true"].keys()
    assert {"val/loss", "val/reward_accuracy", "val/kl", "val/chosen_logps"} <= found["32-true"].keys()
    for name, expected in found["32-true"].items():
        assert found["bf16-true"][name] == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_validation_does_not_depend_on_the_batch_size(tiny_model, pairs_file, tmp_path):
    dpo = module(tiny_model)
    dpo.configure_model()
    with torch.no_grad():
        for name, p in dpo.model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(1), std=0.05)
    (alone,) = trainer(tmp_path).validate(dpo, data(pairs_file, val=str(pairs_file), eval_batch_size=7))
    for size in (1, 4, 21):
        (result,) = trainer(tmp_path).validate(dpo, data(pairs_file, val=str(pairs_file), eval_batch_size=size))
        assert result["val/reward_accuracy"] == alone["val/reward_accuracy"], size
        for name, expected in alone.items():
            assert result[name] == pytest.approx(expected, rel=1e-5, abs=1e-7), (name, size)


def test_the_run_can_be_monitored_under_public_names(tiny_model, pairs_file, tmp_path):
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    best = ModelCheckpoint(tmp_path, monitor="val/reward_accuracy", mode="max", filename="best")
    stop = EarlyStopping("train/loss", patience=5)
    run = trainer(tmp_path, callbacks=[best, stop], enable_checkpointing=True)
    run.fit(module(tiny_model), data(pairs_file, val=str(pairs_file)))
    assert Path(best.best_model_path).name == "best.ckpt"
    assert 0 <= float(best.best_model_score) <= 1


def test_predict_gives_rewards_and_margins_of_every_row(tiny_model, pairs_file, tmp_path):
    dpo = module(tiny_model)
    trainer(tmp_path).fit(dpo, data(pairs_file))
    trainer(tmp_path).predict(dpo, data(pairs_file, predict=str(pairs_file)), return_predictions=False)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(21))
    for row in rows:
        assert row["margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-6)
        assert row["chosen_length"] >= 1


def test_every_argument_of_the_module_has_an_effect(tiny_model, pairs_file, tmp_path):
    def train(**kwargs):
        dpo = module(tiny_model, **kwargs)
        trainer(tmp_path, max_steps=3).fit(dpo, data(pairs_file))
        return torch.cat([p.flatten() for p in adapter(dpo).values()])

    plain = train()
    assert torch.equal(plain, train()), "training is deterministic"
    for change in ({"loss": IPOLoss()}, {"warmup_ratio": 0.5}, {"lr": 1e-3}):
        assert not torch.equal(plain, train(**change)), change
    cosine, linear = train(lr_scheduler="cosine"), train(lr_scheduler="linear")
    assert not torch.equal(plain, linear)
    assert not torch.equal(cosine, linear)


def test_without_a_reference_one_forward_runs(tiny_model, pairs_file, tmp_path, monkeypatch):
    from dataclasses import dataclass
    from typing import ClassVar

    import lit_dpo.logps.score as score
    import lit_dpo.module as module_file
    from lit_dpo import Field, PreferenceLoss

    @dataclass(frozen=True)
    class PolicyOnly(PreferenceLoss):
        requires: ClassVar[frozenset[Field]] = frozenset()

        def __call__(self, pairs: PairLogps) -> torch.Tensor:
            return torch.relu(1 - self.beta * (pairs.policy_chosen.mean - pairs.policy_rejected.mean))

    calls = []

    def counted(*args, **options):
        calls.append(1)
        return score.completion_logps(*args, **options)

    with pytest.raises(PolicyError, match="reads no reference but got BaseReference"):
        module(tiny_model, loss=PolicyOnly(), reference=BaseReference())
    dpo = module(tiny_model, loss=PolicyOnly())
    assert dpo.reference == NoReference()
    assert "kl" not in dpo.train_metrics
    monkeypatch.setattr(module_file, "completion_logps", counted)
    trainer(tmp_path, max_steps=2).fit(dpo, data(pairs_file))
    assert len(calls) == 3, "two steps and the check before them"


def test_a_subclass_sees_the_record(tiny_model, pairs_file, tmp_path):
    seen = []

    class Mine(DPOModule):
        def compute_loss(self, pairs):
            assert isinstance(pairs.policy_chosen, SequenceLogps)
            seen.append(pairs.policy_chosen.total.shape[0])
            return super().compute_loss(pairs)

    torch.manual_seed(0)
    dpo = Mine(LoRAPolicy(str(tiny_model), quantization="none"))
    trainer(tmp_path, max_steps=1).fit(dpo, data(pairs_file))
    assert seen


CASES = {
    "each batch": {"accumulate": 1},
    "accumulated, NF4, checkpointing": {
        "accumulate": 3,
        "policy": {"quantization": "nf4", "gradient_checkpointing": True},
    },
    "BetaDPOLoss": {"loss": "BetaDPOLoss"},
    "comparisons": {"ranked": True, "accumulate": 3},
    "prompts": {"ranked": True, "accumulate": 3, "average_over": "prompt"},
    "coupled": {"ranked": True, "loss": "AOTLoss", "accumulate": 3},
    "tokens": {"max_tokens": 200},
    "compressed": {"compressed": 1.2e5, "accumulate": 3},
}
CACHED = ("BetaDPOLoss",)


@pytest.fixture(scope="module")
def on_two(tiny_model, pairs_file, once):
    """What each case came to on two ranks, one case after the other; and the sizes of the caches that they left."""
    folder = once("two-processes", lambda folder: _on_two(folder, tiny_model, pairs_file))
    cases = json.loads((folder / "cases.json").read_text())
    found = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in cases}
    return {name: (cases[name], one, _index_sizes(folder / name)) for name, one in found.items()}


def _on_two(folder, tiny_model, pairs_file):
    pairs, ranked = folder / "pairs.jsonl", folder / "ranked.jsonl"
    for file, lines in (
        (pairs, pairs_file.read_text().splitlines(keepends=True)),
        (ranked, [json.dumps(_ranking(n)) + "\n" for n in range(21)]),
    ):
        file.write_text("".join(lines))
        (folder / f"few-{file.name}").write_text("".join(lines[:9]))  # a batch of six, and three for two ranks
    cases = {
        name: {
            "model": str(tiny_model),
            "pairs": str(ranked if "ranked" in case else pairs),
            **case,
            **({"cache": str(folder / name)} if name in CACHED else {}),
        }
        for name, case in CASES.items()
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    ranks.run(two_processes.of_rank, 2, folder, folder=folder, seconds=300)


def _ranking(number):
    count = 2 + number % 4
    completions = [f" answer {(number * k) % 7}" + "!" * k for k in range(count)]
    return {"prompt": f"question {number}", "completions": completions, "scores": [*range(count)]}


def _index_sizes(cache):
    return {file: file.stat().st_size for file in cache.glob("*/*.index")}


def _assert_equal(one, two):
    for name, expected in one["adapter"].items():
        torch.testing.assert_close(two["adapter"][name], expected, rtol=0, atol=1e-5, msg=name)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-6)
    # each comparison once, of whichever rank: the share of a step is that of all ranks
    for name, expected in one["noted"].items():
        assert two["noted"][name] == pytest.approx(expected, rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("name", [name for name in CASES if name not in (*CACHED, "compressed")])
def test_two_processes_measure_and_train_like_one(on_two, tmp_path, name):
    """An odd number of prompts on two ranks, each in several micro-batches: the same metrics and the same adapter."""
    case, two, _ = on_two[name]
    one = two_processes.train(root=tmp_path, **case)
    _assert_equal(one, two)
    assert {"train/loss", "val/loss", "val/one/loss", "val/two/kl"} <= one["metrics"].keys()


@pytest.mark.parametrize("loss", CACHED)
def test_two_processes_fill_one_cache_and_share_a_loss_s_memory(on_two, tmp_path, loss):
    """Every pair is computed once by one of them; a later run on one process finds them all, and trains the same."""
    case, two, sizes = on_two[loss]
    assert len(sizes) == 2
    assert sum(sizes.values()) == 42 * store._ENTRY.itemsize
    _assert_equal(one := two_processes.train(root=tmp_path, **case), two)
    assert one["state"].abs().min() > 0
    torch.testing.assert_close(two["state"], one["state"], rtol=1e-4, atol=0)
    assert _index_sizes(Path(case["cache"])) == sizes


def test_ranks_exchange_means_of_gradients(on_two, tmp_path):
    """In half precision, in which the sums that a rank makes of its micro-batches would be infinite."""
    case, two, _ = on_two["compressed"]
    one = two_processes.train(root=tmp_path, **case)
    assert max(two["largest"]) < 65504 < 3 * max(two["largest"])
    for name, expected in one["adapter"].items():
        torch.testing.assert_close(two["adapter"][name], expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def _batch(dpo, pairs_file, size=8):
    pairs = data(pairs_file, tokenizer=dpo.policy.model, batch_size=size)
    pairs.setup("fit")
    return next(iter(pairs.train_dataloader()))
