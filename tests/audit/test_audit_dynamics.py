"""What `TrainingDynamics` writes: each comparison once an epoch, as the training pass saw it, and nothing changed."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lit_dpo import DPOLoss, PreferenceLoss
from lit_dpo.callbacks import LastCheckpoint, TrainingDynamics
from lit_dpo.callbacks.dynamics import Measured, gradient_sizes, measured, table
from lit_dpo.data.formats import Rankings
from lit_dpo.losses import PlackettLuceLoss, SFTLoss, SimPOLoss
from lit_dpo.window import MeasuredBatch
from training import Trace, adapter, data, trainer
from training import light as module

SAID = [" one", " two, two", " three!", " 4"]
COUNTS = ("epoch", "step", "index", "chosen", "rejected")


def fit(model, pairs, root, *, callbacks=(), ckpt_path=None, accumulate=1, epochs=2, rows=None, watched=True, **kwargs):
    """Train with dynamics; the module, and what was written."""
    dpo = module(model, **{"policy": {"dropout": 0.1}, **kwargs})
    noting = [TrainingDynamics()] if watched else []
    run = trainer(
        root, callbacks=[*callbacks, *noting], max_epochs=epochs, accumulate_grad_batches=accumulate, logger=False
    )
    with suppress(KeyboardInterrupt, SystemExit):
        run.fit(dpo, data(pairs, **(rows or {})), ckpt_path=ckpt_path)
    found = pq.read_table(root / "dynamics.parquet") if watched else None
    return dpo, found


class Stop(Callback):
    """As Ctrl-C does, before the backward pass of a batch."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1


@pytest.fixture(scope="module")
def straight(tiny_model, pairs_file, tmp_path_factory):
    root, trace = tmp_path_factory.mktemp("straight"), Trace()
    dpo, found = fit(tiny_model, pairs_file, root, callbacks=[trace], accumulate=2, loss=DPOLoss(beta=0.3))
    return dpo, found, trace


def test_each_pair_is_there_once_an_epoch_in_the_order_of_training(straight):
    _, found, trace = straight
    rows = found.to_pandas()
    assert len(rows) == 42
    for epoch in (0, 1):
        assert sorted(rows["index"][rows.epoch == epoch]) == list(range(21))
    steps = [[*one, *other] for one, other in (trace.rows[:2], trace.rows[2:4], trace.rows[4:6])]
    assert [sorted(rows["index"][rows.step == step]) for step in range(3)] == [sorted(one) for one in steps]
    assert (rows[["chosen", "rejected"]] == [0, 1]).all().all()


def test_numbers_are_those_of_the_loss_in_closed_form(straight):
    """DPO: the loss is −log σ(βΔ), and both sides have the gradient β·σ(−βΔ)."""
    _, found, trace = straight
    rows = found.to_pandas()
    assert np.allclose(rows.reward_margin, 0.3 * rows.margin, atol=1e-6)
    assert np.allclose(rows.confidence, 1 / (1 + np.exp(-rows.reward_margin)), atol=1e-6)
    assert np.allclose(rows.loss, -np.log(rows.confidence), atol=1e-5)
    slope = 1 - rows.confidence
    assert np.allclose(rows.gradient_share, slope / slope.groupby(rows.step).transform("sum"), atol=1e-5)
    assert rows.margin.abs().max() > 0.1
    first = rows[rows.step == 0]
    assert first.margin.abs().max() < 0.1 * rows.margin.abs().max()  # but for dropout
    assert np.isclose(first.loss.mean(), np.mean(trace.losses[:2]), atol=1e-5)
    # the reference stays, and the policy's own log-probs are what moves
    assert rows.groupby("index").reference_margin.agg(np.ptp).max() < 1e-4


def test_training_does_not_change_by_being_watched(straight, tiny_model, pairs_file, tmp_path):
    dpo, _, _ = straight
    other, _ = fit(tiny_model, pairs_file, tmp_path, accumulate=2, loss=DPOLoss(beta=0.3), watched=False)
    assert all(torch.equal(weights, adapter(other)[name]) for name, weights in adapter(dpo).items())


def test_a_run_that_goes_on_has_each_row_once(straight, tiny_model, pairs_file, tmp_path):
    """Stopped inside its second epoch, with one batch of a step accumulated: it comes again."""
    _, expected, _ = straight
    after = 9
    stopping = [LastCheckpoint(directory=str(tmp_path / "first")), Stop(after)]
    options = {"accumulate": 2, "loss": DPOLoss(beta=0.3)}
    _, stopped = fit(tiny_model, pairs_file, tmp_path, callbacks=stopping, **options)
    made = expected.slice(0, sum(step < after // 2 for step in expected["step"].to_pylist()))
    assert stopped.equals(made)
    _, found = fit(tiny_model, pairs_file, tmp_path, ckpt_path=tmp_path / "first" / "last.ckpt", **options)
    assert found.equals(expected)
    assert json.loads(found.schema.metadata[b"lit_dpo"]) == json.loads(expected.schema.metadata[b"lit_dpo"])


def test_a_checkpoint_written_before_the_callback_hears_of_the_step_has_its_rows(tiny_model, pairs_file, tmp_path):
    early = LastCheckpoint(every_n_steps=1, directory=str(tmp_path))
    fit(tiny_model, pairs_file, tmp_path, callbacks=[early, Stop(2)], epochs=1)
    there = torch.load(tmp_path / "last.ckpt", weights_only=True)["lit_dpo_dynamics"]
    assert there["counts"][:, 1].tolist() == [0] * 4 + [1] * 4


def test_micro_batches_and_coupling_losses_say_the_same(tiny_model, pairs_file, tmp_path):
    options = {"policy": {}, "epochs": 1}
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    _, whole = fit(tiny_model, pairs_file, tmp_path / "whole", **options)
    _, cut = fit(tiny_model, pairs_file, tmp_path / "cut", microbatch_tokens=100, **options)
    assert [whole[name].to_pylist() for name in COUNTS] == [cut[name].to_pylist() for name in COUNTS]
    for name in set(whole.column_names) - set(COUNTS):
        assert np.allclose(whole[name], cut[name], atol=1e-4), name


def _scored(tiny_model, pairs, loss, **kwargs):
    rows = data(pairs, tokenizer=str(tiny_model), **kwargs)
    rows.setup("fit")
    batch = rows.tables["train"].batch([0, 1, 2])
    dpo = module(tiny_model, loss=loss)
    dpo.configure_model()
    record = dpo.batch_logps(batch)
    dpo.measured_batch = MeasuredBatch(record, dpo.losses_of(record), *loss.rewards(record))
    return dpo, batch, record


@dataclass(frozen=True)
class ByToken(PreferenceLoss):
    """DPO from the log-probs of tokens."""

    def __call__(self, pairs):
        sides = [(pairs.policy_chosen, pairs.reference_chosen), (pairs.policy_rejected, pairs.reference_rejected)]
        chosen, rejected = (policy.sums(policy.per_token) - reference.total for policy, reference in sides)
        return -torch.nn.functional.logsigmoid(self.beta * (chosen - rejected))


@pytest.mark.parametrize("loss", [ByToken(beta=0.5), DPOLoss(beta=0.5)])
def test_a_loss_that_reads_tokens_has_the_gradient_of_one_that_reads_sums(tiny_model, pairs_file, loss):
    dpo, _, record = _scored(tiny_model, pairs_file, loss)
    assert torch.allclose(gradient_sizes(dpo, record), torch.full((3,), 2 * 0.5 * 0.5), atol=1e-5)


def test_a_loss_of_one_side_has_a_gradient_of_one_side(tiny_model, pairs_file):
    dpo, batch, record = _scored(tiny_model, pairs_file, SFTLoss())
    assert torch.allclose(gradient_sizes(dpo, record), 1 / batch.chosen_lengths.float())


def test_without_a_reference_margins_are_the_policys(tiny_model, pairs_file):
    dpo, batch, record = _scored(tiny_model, pairs_file, SimPOLoss(beta=2.0))
    found = measured(dpo, batch, 0, 0).numbers
    policy = record.policy_chosen.total - record.policy_rejected.total
    assert torch.allclose(found[:, 0], policy)
    assert torch.allclose(found[:, 1], 2 * policy)
    assert found[:, 2].isnan().all()


@pytest.mark.parametrize("loss", [DPOLoss(), PlackettLuceLoss()])
def test_each_comparison_of_a_ranking_has_a_row_and_shares_sum_to_one(tiny_model, tmp_path, loss):
    rows = [
        {
            "prompt": f"Count {n}?",
            "completions": [" one", " two, two", " three!", " 4"][: 2 + n % 3],
            "scores": [3, 2, 1, 0][: 2 + n % 3],
        }
        for n in range(3)
    ]
    file = tmp_path / "ranked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dpo, batch, record = _scored(tiny_model, file, loss, format=Rankings())
    found = table(measured(dpo, batch, 0, 0), {}).to_pandas()
    assert sorted(map(tuple, found[["index", "chosen", "rejected"]].values.tolist())) == [
        (n, *pair)
        for n in range(3)
        for pair in [(one, other) for one in range(n + 2) for other in range(one + 1, n + 2)]
    ]
    assert np.isclose(found.gradient_share.sum(), 1)
    if loss.per_prompt:
        assert found.loss.groupby(found["index"]).nunique().max() == 1
    assert gradient_sizes(dpo, record).gt(0).all()


def test_the_table_of_no_rows_is_a_table(tmp_path):
    assert table(Measured.none(), {}).num_rows == 0
    assert not list(Path(tmp_path).iterdir())
