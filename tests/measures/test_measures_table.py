"""The table of pairs: closed forms, the numbers of `predict` and `validate`, and nothing moved by looking."""

from __future__ import annotations

import copy
import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lit_dpo import BaseReference, CachedReference, DPOModule, ModelReference
from lit_dpo.errors import DataError, PolicyError
from lit_dpo.losses import (
    AOTLoss,
    BCOLoss,
    BetaDPOLoss,
    DPOLoss,
    IPOLoss,
    LDDPOLoss,
    LiPOLoss,
    MixtureLoss,
    PlackettLuceLoss,
    SFTLoss,
    SimPOLoss,
    SoftDPOLoss,
    TDPOLoss,
)
from lit_dpo.references import AdapterReference, EMAReference
from lit_dpo.tools.measures.table import pair_table
from training import adapter, data, module, trainer

LOSSES = {
    "dpo": DPOLoss(beta=0.3),
    "ipo": IPOLoss(beta=0.5),
    "simpo": SimPOLoss(beta=2.0, gamma=0.5),
    "sft": SFTLoss(),
    "sft_token": SFTLoss(average_over="token"),
    "aot": AOTLoss(beta=0.3),
    "bco": BCOLoss(beta=0.3),
    "lddpo": LDDPOLoss(DPOLoss(beta=0.3)),
    "tdpo": TDPOLoss(),
    "mixed": MixtureLoss([LDDPOLoss(DPOLoss(beta=0.3)), SFTLoss(average_over="token")]),
}


def _rows(first, count):
    return [
        {
            "prompt": f"How many are {number // 2}?",
            "chosen": " Exactly " + "one, " * (number % 4) + f"{number}.",
            "rejected": " No" + " idea" * (number % 3) + f", {number}!",
        }
        for number in range(first, first + count)
    ]


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    return {
        "all": _write(folder / "all.jsonl", _rows(0, 21)),
        "first": _write(folder / "first.jsonl", _rows(0, 13)),
        "second": _write(folder / "second.jsonl", _rows(13, 8)),
    }


@pytest.fixture(scope="module")
def fitted(tiny_model, files, tmp_path_factory):
    """A policy that has moved, the data it was measured on, and what `validate` and `predict` say of it."""
    root = tmp_path_factory.mktemp("fitted")
    dpo, rows = module(tiny_model, loss=LOSSES["dpo"]), data(files["all"], val=files["all"])
    running = trainer(root)
    running.fit(dpo, rows)
    return dpo, rows, running.callback_metrics | {}, running


@pytest.fixture(scope="module")
def frame(fitted):
    dpo, rows, *_ = fitted
    return pair_table(dpo, rows, LOSSES).to_pandas()


def _margins(frame):
    chosen = frame.chosen_logps - frame.reference_chosen_logps
    return chosen - (frame.rejected_logps - frame.reference_rejected_logps)


def _sigma(z):
    return 1 / (1 + np.exp(-z))


def test_losses_and_weights_have_their_closed_forms(frame):
    """DPO −log σ(βΔ), β·σ(−βΔ); IPO by tokens; SimPO by the lengths; SFT −ℓ/n, 1/n."""
    margins, n = _margins(frame), frame.chosen_length
    assert margins.abs().min() > 1e-3
    close = {"rtol": 2e-4, "atol": 1e-6}
    np.testing.assert_allclose(frame["loss/dpo"], -np.log(_sigma(0.3 * margins)), **close)
    np.testing.assert_allclose(frame["weight/dpo"], 0.3 * _sigma(-0.3 * margins), **close)
    z = 2.0 * (frame.chosen_logps / n - frame.rejected_logps / frame.rejected_length - 0.25)
    np.testing.assert_allclose(frame["loss/simpo"], -np.log(_sigma(z)), **close)
    np.testing.assert_allclose(frame["weight/simpo"], 2.0 * _sigma(-z) / n, **close)
    np.testing.assert_allclose(frame["loss/sft"], -frame.chosen_logps / n, **close)
    np.testing.assert_allclose(frame["weight/sft"], 1 / n, **close)
    np.testing.assert_allclose(frame["loss/sft_token"], -frame.chosen_logps / n.mean(), **close)


def test_a_loss_of_single_tokens_is_weighed_by_its_mean_pull(frame):
    """LD-DPO damps the tokens beyond the shorter length: the mean of 1 for those within and α for the others."""
    n, shorter = frame.chosen_length, np.minimum(frame.chosen_length, frame.rejected_length)
    alpha = LOSSES["lddpo"].surplus_weight
    outer = 0.3 * (1 - np.exp(-frame["loss/lddpo"]))
    np.testing.assert_allclose(frame["weight/lddpo"], outer * (shorter + alpha * (n - shorter)) / n, rtol=1e-3)
    # in a mixture with one that couples pairs, which sees all of them at once
    np.testing.assert_allclose(frame["loss/mixed"], frame["loss/lddpo"] + frame["loss/sft_token"], rtol=1e-5)
    np.testing.assert_allclose(frame["weight/mixed"], frame["weight/lddpo"] + frame["weight/sft_token"], rtol=1e-4)


def test_numbers_are_those_of_validate_and_predict(fitted, frame):
    dpo, rows, logged, running = fitted
    margins = _margins(frame)
    accuracy = (margins > 0).mean() + 0.5 * (margins == 0).mean()
    assert accuracy == pytest.approx(float(logged["val/reward_accuracy"]), abs=1e-12)
    assert 0.3 * margins.mean() == pytest.approx(float(logged["val/reward_margin"]), rel=1e-4)
    assert frame["loss/dpo"].mean() == pytest.approx(float(logged["val/loss"]), rel=1e-5)
    kl = (frame.chosen_kl + frame.rejected_kl).sum() / (frame.chosen_length + frame.rejected_length).sum()
    assert kl == pytest.approx(float(logged["val/kl"]), rel=1e-6)
    batches = running.predict(dpo, rows)
    for name in ("index", "chosen_logps", "rejected_logps", "chosen_length", "rejected_length"):
        assert frame[name].tolist() == torch.cat([batch[name] for batch in batches]).tolist(), name


def test_batches_and_sets_do_not_matter(fitted, frame, files):
    dpo, *_ = fitted
    sets = {"one": files["first"], "two": files["second"]}
    for options in (
        {"val": files["all"], "eval_batch_size": 5},
        {"val": files["all"], "batch_size": None, "max_tokens": 90},
        {"val": sets, "eval_batch_size": 3},
    ):
        other = data(files["all"], tokenizer=dpo.policy.model, **options)
        found = pair_table(dpo, other, LOSSES).to_pandas()
        numbers = [name for name in frame if name not in ("set", "source", "index")]
        assert found["prompt"].tolist() == frame["prompt"].tolist()
        np.testing.assert_allclose(found[numbers], frame[numbers], rtol=3e-3, atol=2e-5)
    assert found["set"].tolist() == ["one"] * 13 + ["two"] * 8
    assert found["source"].tolist() == found["set"].tolist()
    assert frame["source"].unique().tolist() == ["all.jsonl"]
    assert found["index"].tolist() == [*range(13), *range(8)]


def test_equal_prompts_have_equal_numbers(frame):
    numbers = frame["prompt"].tolist()
    assert [numbers.index(number) // 2 for number in numbers] == [place // 2 for place in range(21)]
    assert frame["prompt"].dtype == np.int64
    assert frame["prompt"].nunique() == 11


def test_looking_moves_nothing(fitted, frame, tmp_path):
    dpo, rows, *_ = fitted
    dpo.train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    weights, metrics, state = adapter(dpo), copy.deepcopy(dpo.val_metrics.state_dict()), copy.deepcopy(dpo.state_dict())
    kept, loss, reference = dict(dpo.model.__dict__), dpo.loss, dpo.reference
    grads = {name: p.grad for name, p in dpo.named_parameters()}
    computed = {name: metric.total.clone() for name, metric in dpo.val_metrics.items()}
    with torch.inference_mode():  # as in a callback of `validate`
        found = pair_table(dpo, rows, LOSSES, CachedReference(directory=str(tmp_path), reference=BaseReference()))
    np.testing.assert_array_equal(found.column("weight/dpo"), frame["weight/dpo"])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(part.training for part in dpo.model.modules() if "lora" in type(part).__name__.lower())
    assert dpo.model.training
    assert dpo.loss is loss
    assert dpo.reference is reference
    assert {*dpo.model.__dict__} == {*kept}
    assert all(torch.equal(now, weights[name]) for name, now in adapter(dpo).items())
    assert all(p.grad is grads[name] for name, p in dpo.named_parameters())
    assert all(torch.equal(metric.total, computed[name]) for name, metric in dpo.val_metrics.items())
    assert {*dpo.val_metrics.state_dict()} == {*metrics}
    assert all(torch.equal(dpo.state_dict()[name], value) for name, value in state.items() if torch.is_tensor(value))


@pytest.fixture(scope="module")
def without_reference(tiny_model, files, tmp_path_factory):
    """A policy that was trained without a reference, its data."""
    simpo, rows = module(tiny_model, loss=LOSSES["simpo"]), data(files["all"], val=files["all"])
    trainer(tmp_path_factory.mktemp("simpo"), max_steps=2, limit_val_batches=0).fit(simpo, rows)
    return simpo, rows


def test_a_policy_without_a_reference_is_compared_with_its_base(without_reference, fitted, frame, tmp_path, caplog):
    simpo, rows = without_reference
    found = pair_table(simpo, rows, LOSSES).to_pandas()
    names = ["reference_chosen_logps", "reference_rejected_logps"]
    np.testing.assert_allclose(found[names], frame[names], rtol=1e-5)  # of the same base
    assert (found["beta"] == 2.0).all()
    assert found["loss/tdpo"].notna().all()
    cached = CachedReference(directory=str(tmp_path))
    again = pair_table(simpo, rows, LOSSES, cached).to_pandas()
    said = [record.message for record in caplog.records if "tdpo" in record.message]
    assert len(said) == 1
    assert "kl" in said[0]
    assert again.filter(like="/tdpo").isna().all().all()
    others = [name for name in found.select_dtypes(float) if "tdpo" not in name]
    np.testing.assert_allclose(again[others], found[others], rtol=1e-6)
    sums = CachedReference(directory=str(tmp_path), per_token=False)
    assert pair_table(simpo, rows, {}, sums).to_pandas()[["chosen_kl", "rejected_kl"]].isna().all().all()


def test_other_references_come_and_go(without_reference, tiny_model):
    simpo, rows = without_reference
    same = ModelReference(str(tiny_model), quantization="none")
    found = pair_table(simpo, rows, {}, same).to_pandas()
    own = pair_table(simpo, rows, {}).to_pandas()
    np.testing.assert_allclose(found.reference_chosen_logps, own.reference_chosen_logps, rtol=1e-5)
    assert "lit_dpo_reference" not in simpo.model.__dict__
    with pytest.raises(PolicyError, match="stays as it is"):
        pair_table(simpo, rows, {}, EMAReference())


def test_an_adapter_is_a_reference_and_leaves_again(fitted, without_reference, tmp_path):
    dpo, rows, *_ = fitted
    dpo.model.save_pretrained(tmp_path)
    simpo, _ = without_reference
    before = adapter(simpo)
    found = pair_table(simpo, rows, {}, AdapterReference(str(tmp_path))).to_pandas()
    policy = pair_table(dpo, rows, {}).to_pandas()
    np.testing.assert_allclose(found.reference_chosen_logps, policy.chosen_logps, rtol=1e-4)
    assert {*simpo.model.peft_config} == {"default"}
    assert all(torch.equal(now, before[name]) for name, now in adapter(simpo).items())
    assert all(p.requires_grad for name, p in simpo.model.named_parameters() if "lora" in name)


def test_a_memory_is_that_of_training_or_that_of_the_pairs(tiny_model, files, tmp_path):
    losses = {"bco": BCOLoss(beta=0.3), "other": BCOLoss(beta=0.2), "beta": BetaDPOLoss(beta=0.3)}
    bco, rows = module(tiny_model, loss=losses["bco"]), data(files["first"], val=files["second"])
    running = trainer(tmp_path)
    running.fit(bco, rows)
    frame = pair_table(bco, rows, losses).to_pandas()
    assert float(bco.loss_state[1]) > 0
    assert frame["loss/bco"].mean() == pytest.approx(float(running.callback_metrics["val/loss"]), rel=1e-5)
    chosen = 0.2 * (frame.chosen_logps - frame.reference_chosen_logps)
    rejected = 0.2 * (frame.rejected_logps - frame.reference_rejected_logps)
    delta = (chosen + rejected).mean() / 2
    expected = -np.log(_sigma(chosen - delta)) - np.log(_sigma(-(rejected - delta)))
    np.testing.assert_allclose(frame["loss/other"], expected, rtol=1e-4)
    assert frame["loss/beta"].notna().all()


def test_a_policy_that_was_loaded_has_the_same_table(fitted, frame, tmp_path):
    """Of a checkpoint, on another module, before anything else ran: to the last bit."""
    dpo, rows, _, running = fitted
    running.save_checkpoint(tmp_path / "last.ckpt")
    loaded = DPOModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    other = data(rows.sources["train"], val=rows.sources["val"], tokenizer=dpo.policy.model)
    assert pair_table(loaded, other, LOSSES).to_pandas().equals(frame)


def test_comparisons_of_one_prompt_are_weighed_one_by_one(tiny_model, tmp_path, caplog):
    """Rankings: a chosen completion is in several comparisons, and a loss over lists gives its prompt's value."""
    rows = [
        {"prompt": f"Rank {number}:", "completions": [" a", f" bb{number}", " ccc"], "scores": [3, 2, 1]}
        for number in range(5)
    ]
    val = _write(tmp_path / "ranked.jsonl", rows)
    losses = {"dpo": DPOLoss(beta=0.3), "list": PlackettLuceLoss(beta=0.3), "lipo": LiPOLoss(), "soft": SoftDPOLoss()}
    ranked, pairs = module(tiny_model, loss=losses["dpo"]), data(val, val=val)
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(ranked, pairs)
    frame = pair_table(ranked, pairs, losses).to_pandas()
    assert len(frame) == 15
    margins = _margins(frame)
    np.testing.assert_allclose(frame["loss/dpo"], -np.log(_sigma(0.3 * margins)), rtol=1e-4)
    np.testing.assert_allclose(frame["weight/dpo"], 0.3 * _sigma(-0.3 * margins), rtol=1e-4)
    assert (frame.groupby("index")["loss/list"].nunique() == 1).all()
    assert frame["weight/lipo"].gt(0).all()
    assert frame["loss/soft"].isna().all()
    assert any("probability" in record.message for record in caplog.records)


def test_data_of_another_kind_are_refused(without_reference):
    with pytest.raises(DataError, match="Expected a PreferenceDataModule, whose held-out pairs are known"):
        pair_table(without_reference[0], pl.LightningDataModule(), {})


def test_data_without_held_out_pairs_are_refused(without_reference, files):
    simpo, _ = without_reference
    with pytest.raises(DataError, match="val_split"):
        pair_table(simpo, data(files["all"], tokenizer=simpo.policy.model), {})
    held = data(files["all"], tokenizer=simpo.policy.model, val_split=0.3)
    assert 1 < pair_table(simpo, held, {}).num_rows < 21


class Tilted(DPOModule):
    """A forward of one's own."""

    couples_pairs = False

    def forward(self, batch):
        scored = super().forward(batch)
        return scored._replace(total=scored.total + 1, per_token=None)


def test_a_forward_of_ones_own_is_what_is_measured(fitted, tiny_model, files, frame):
    tilted = module(tiny_model, kind=Tilted, reference=BaseReference())
    tilted.configure_model()
    rows = data(files["all"], val=files["all"], tokenizer=str(tiny_model))
    found = pair_table(tilted, rows, {}).to_pandas()
    np.testing.assert_allclose(found.chosen_logps - found.reference_chosen_logps, 1, atol=1e-4)
    assert found.chosen_kl.isna().all()
