"""What losses read besides log-ratios reaches them in training: columns, memory, whole distributions, parts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import instantiate_module

import lit_dpo.losses as losses
import tiny
from lit_dpo import BaseReference, CachedReference, DPOLoss, DPOModule, EMAReference, IPOLoss, ModelReference
from lit_dpo.checkpoint import configuration
from lit_dpo.data.formats import Triples
from lit_dpo.errors import DataError, PolicyError, ResumeError
from lit_dpo.losses import BCOLoss, LDDPOLoss, MixtureLoss, ODPOLoss, SFTLoss, SoftDPOLoss, TDPOLoss, WPOLoss
from lit_dpo.metrics import Mean
from training import Trace, adapter, data, trainer
from training import light as module


@pytest.fixture
def columns(pairs_file, tmp_path):
    """`columns(weight=[…], …)`: the pairs with more columns, in a file."""

    def write(**given):
        rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
        path = tmp_path / f"{'-'.join(given)}.jsonl"
        named = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
        path.write_text("".join(json.dumps(row | more) + "\n" for row, more in zip(rows, named, strict=True)))
        return path

    return write


def _fit(model, file, root, *, format=None, ckpt_path=None, callbacks=(), epochs=1, batch_size=4, keep=0, **kwargs):
    """A run that keeps a checkpoint of every so many steps, or none."""
    trace = Trace()
    kept = [ModelCheckpoint(root, filename="{step}", every_n_train_steps=keep, save_top_k=-1)] if keep else []
    given = {"enable_checkpointing": bool(kept), "max_epochs": epochs, "num_sanity_val_steps": 0}
    run = trainer(root, callbacks=[trace, *kept, *callbacks], **given)
    dpo = module(model, **kwargs)
    source = data(file, val=str(file), batch_size=batch_size, eval_batch_size=21, format=Triples(**(format or {})))
    run.fit(dpo, source, ckpt_path=ckpt_path)
    return dpo, trace


# ---- columns ----


def test_a_weight_multiplies_its_row_s_loss(tiny_model, columns, tmp_path):
    """The same losses and gradients as with the weights multiplied by hand, in the order in which the rows come."""
    file = columns(weight=[2.0 * (number % 2) for number in range(21)])
    weights: list[float] = []

    class ByHand(DPOLoss):
        def __call__(self, pairs):
            return super().__call__(pairs) * torch.tensor(weights)

    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.seen = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}

    def run(loss, format):
        gradients = Gradients()
        given = {"format": format, "loss": loss, "batch_size": 21, "callbacks": [gradients]}
        _, trace = _fit(tiny_model, file, tmp_path, **given)
        return gradients.seen, trace

    found, trace = run(DPOLoss(), {"weight": "weight"})
    weights += [2.0 * (row % 2) for row in trace.rows[0]]
    expected, other = run(ByHand(), {})
    assert trace.losses == pytest.approx(other.losses, rel=1e-6)
    tiny.assert_same_gradients(found, expected, tolerance=1e-6)


def test_large_weights_start_at_their_own_loss(tiny_model, columns, tmp_path):
    """The check before the first step weighs both sides of its comparison."""
    _, trace = _fit(tiny_model, columns(weight=[5.0] * 21), tmp_path, format={"weight": "weight"})
    assert trace.losses[0] == pytest.approx(5 * 0.6931472, rel=1e-4)  # the mean over the batch's four pairs


@pytest.mark.parametrize(
    ("loss", "column", "values"),
    [
        (SoftDPOLoss(), "probability", [number / 20 for number in range(21)]),
        (ODPOLoss(), "score_margin", [1.0 + number for number in range(21)]),
    ],
)
def test_a_column_reaches_the_loss_that_reads_it(tiny_model, columns, tmp_path, loss, column, values):
    file = columns(share=values)
    seen = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.update(zip(batch.indices.tolist(), pl_module.pair_logps(batch).column(column).tolist(), strict=True))

    _, trace = _fit(tiny_model, file, tmp_path, format={column: "share"}, loss=loss, callbacks=[Look()])
    assert all(torch.isfinite(torch.tensor(trace.losses)))
    assert [seen[row] for row in range(21)] == pytest.approx(values)


@pytest.mark.parametrize(("loss", "column"), [(SoftDPOLoss(), "probability"), (ODPOLoss(), "score_margin")])
def test_a_column_that_the_loss_lacks_is_named_before_weights_load(tiny_model, pairs_file, tmp_path, loss, column):
    dpo = module(tiny_model, loss=loss)
    with pytest.raises(DataError, match=rf"train: .*Loss reads the rows' {column} .*--data.format.{column} COLUMN"):
        trainer(tmp_path).fit(dpo, data(pairs_file))
    assert dpo.model is None


def test_a_column_in_some_files_alone_is_named(tiny_model, pairs_file, columns, tmp_path):
    from lit_dpo.data.formats import Preference

    @dataclass(frozen=True)
    class Some(Triples):
        def read(self, row):
            found = super().read(row)
            return found._replace(columns={"weight": 1.0}) if row["prompt"].endswith("1?") else found

    source = data(pairs_file, format=Some(), tokenizer=str(tiny_model))
    with pytest.raises(DataError, match=r"row \d+ .*: Expected the columns of numbers of the first row, \w+, in every"):
        source.setup("fit")
    assert Preference("a", "b", "c").columns == {}


@dataclass(frozen=True)
class _Easier(DPOLoss):
    """A loss that reads a column of one's own."""

    columns: ClassVar[frozenset[str]] = frozenset({"difficulty"})

    def __call__(self, pairs):
        return super().__call__(pairs) / (1 + pairs.column("difficulty"))


class _Difficulty(Mean):
    """A measure that reads it."""

    def update(self, pairs):
        self.add(pairs.column("difficulty"))


class _Measured(DPOModule):
    def configure_metrics(self):
        measured = super().configure_metrics()
        measured.add_metrics({"difficulty": _Difficulty()})
        return measured


def test_a_column_of_ones_own_reaches_losses_metrics_and_predictions(tiny_model, columns, tmp_path):
    values = [number / 7 for number in range(21)]
    file = columns(hard=values)
    format = Triples(numeric_columns={"difficulty": "hard"})
    source = data(file, format=format, val=str(file), predict=str(file))
    dpo = module(tiny_model, kind=_Measured, loss=_Easier())
    run = trainer(tmp_path, max_steps=1, callbacks=[trace := Trace()])
    run.fit(dpo, source)
    expected = sum(math.log(2) / (1 + values[row]) for row in trace.rows[0]) / len(trace.rows[0])
    assert trace.losses[0] == pytest.approx(expected, rel=1e-5)
    measured = run.validate(dpo, source, verbose=False)[0]
    assert measured["val/difficulty"] == pytest.approx(sum(values) / 21)
    predicted = [number for batch in run.predict(dpo, source) for number in batch["difficulty"].tolist()]
    assert predicted == pytest.approx(values)


def test_a_column_of_ones_own_that_is_not_there_is_refused_before_weights_load(tiny_model, pairs_file, tmp_path):
    dpo = module(tiny_model, loss=_Easier())
    with pytest.raises(
        DataError, match=r"_Easier reads the rows' difficulty .*--data.format.numeric_columns \[difficulty\]"
    ):
        trainer(tmp_path).fit(dpo, data(pairs_file))
    assert dpo.model is None


@pytest.mark.parametrize("loss", [DPOLoss(), TDPOLoss()], ids=str)
def test_forward_is_never_bypassed(tiny_model, pairs_file, tmp_path, loss):
    """What an override of it returns is what losses read, whether or not they read whole distributions."""

    returned, read = [], []

    class Noted(DPOModule):
        couples_pairs = False

        def forward(self, batch):
            returned.append(super().forward(batch))
            return returned[-1]

        def compute_loss(self, pairs):
            read.append(pairs)
            return super().compute_loss(pairs)

    _fit(tiny_model, pairs_file, tmp_path, kind=Noted, loss=loss)
    assert len(read) > 5
    kept = {id(logps) for logps in returned}
    trained = [pairs for pairs in read if pairs.policy_chosen.total.requires_grad]
    assert trained
    assert all(id(pairs.completions.policy) in kept for pairs in trained)
    assert all((side.kl is None) is (loss == DPOLoss()) for pairs in trained for side in pairs[:2])
    for pairs in trained:
        assert torch.equal(pairs.policy_chosen.total, pairs.completions.policy.total[::2])


def test_predicting_needs_no_column_that_only_the_loss_reads(tiny_model, pairs_file, tmp_path):
    dpo = module(tiny_model, loss=ODPOLoss())
    source = data(pairs_file, predict=str(pairs_file))
    predicted = trainer(tmp_path).predict(dpo, source)
    assert sum(len(batch["index"]) for batch in predicted) == 21


def test_a_column_that_no_loss_reads_is_said(tiny_model, columns, tmp_path):
    file = columns(share=[0.5] * 21)
    with tiny.records("lightning.pytorch.utilities.rank_zero") as lines:
        _fit(tiny_model, file, tmp_path, format={"probability": "share"})
    said = [line.getMessage() for line in lines if "does not read" in line.getMessage()]
    assert said == ["train: DPOLoss does not read the rows' probability",
                    "val: DPOLoss does not read the rows' probability"]  # fmt: skip


# ---- a memory ----


class _States(Callback):
    def __init__(self):
        self.seen, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(pl_module.loss_state.clone())

    def on_validation_end(self, trainer, pl_module):
        self.validated.append(pl_module.loss_state.clone())


def test_a_running_mean_is_that_of_all_pairs_in_training_and_evaluation_leaves_it(tiny_model, pairs_file, tmp_path):
    rewards, states = [], _States()

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sides = BCOLoss().rewards(pl_module.pair_logps(batch).detach())
            rewards.extend(torch.stack(sides).mean(0).tolist())

    _fit(tiny_model, pairs_file, tmp_path, loss=BCOLoss(), callbacks=[Look(), states], epochs=2)
    total, count = states.seen[-1]
    assert float(total / count) == pytest.approx(sum(rewards) / len(rewards), rel=1e-5)
    assert len(rewards) == 42
    assert torch.equal(states.validated[0], states.seen[5])
    assert torch.equal(states.validated[-1], states.seen[-1])


def test_a_batch_is_remembered_before_its_own_losses(tiny_model, pairs_file, tmp_path):
    """As the authors and TRL 0.24 have it: a batch's losses read a mean that it is part of."""
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pairs = pl_module.pair_logps(batch).detach()
            state = BCOLoss().next_state(pl_module.loss_state, BCOLoss().sums(pairs))
            seen.append(float(BCOLoss()(pairs._replace(state=state)).mean()))

    _, trace = _fit(tiny_model, pairs_file, tmp_path, loss=BCOLoss(), callbacks=[Look()])
    assert trace.losses == pytest.approx(seen, rel=1e-5)


def test_another_loss_or_reference_may_evaluate_a_checkpoint(tiny_model, pairs_file, tmp_path):
    """A memory, and a reference that moved, belong to training."""
    trained = {"loss": BCOLoss(), "reference": EMAReference(0.5, 1)}
    dpo, _ = _fit(tiny_model, pairs_file, tmp_path / "a", keep=6, **trained)
    plain, _ = _fit(tiny_model, pairs_file, tmp_path / "b", keep=6)
    source = data(pairs_file, val=str(pairs_file), eval_batch_size=21)
    for given, checkpoint, weights in (({}, "a", dpo), ({"loss": BCOLoss()}, "b", plain)):
        other = module(tiny_model, **given)
        trainer(tmp_path).validate(other, source, ckpt_path=tmp_path / checkpoint / "step=6.ckpt", verbose=False)
        assert all(torch.equal(p, adapter(weights)[name]) for name, p in adapter(other).items())
    with pytest.raises(ResumeError, match="another run"):
        _fit(tiny_model, pairs_file, tmp_path / "c", ckpt_path=tmp_path / "a" / "step=6.ckpt", epochs=2)


def test_a_memory_is_in_the_checkpoint_and_resuming_is_exact(tiny_model, pairs_file, tmp_path):
    policy = {"quantization": "nf4", "dropout": 0.1}
    loss = MixtureLoss(losses=(BCOLoss(), DPOLoss()))
    dpo, whole = _fit(tiny_model, pairs_file, tmp_path / "a", loss=loss, policy=policy, epochs=2, keep=3)
    saved = torch.load(tmp_path / "a" / "step=6.ckpt", weights_only=True)
    assert saved["state_dict"]["loss_state"].abs().sum() > 0
    for step in (6, 9):  # at the end of an epoch, and within one
        torch.manual_seed(step)
        other, again = _fit(
            tiny_model,
            pairs_file,
            tmp_path / "b",
            loss=loss,
            policy=policy,
            epochs=2,
            ckpt_path=tmp_path / "a" / f"step={step}.ckpt",
        )
        assert again.losses == whole.losses[step:]
        assert torch.equal(other.loss_state, dpo.loss_state)
        assert all(torch.equal(p, adapter(dpo)[name]) for name, p in adapter(other).items())


# ---- whole distributions ----


@pytest.mark.parametrize("loss", [WPOLoss(loss=TDPOLoss()), MixtureLoss((TDPOLoss(), WPOLoss()))], ids=str)
def test_both_statistics_reach_a_loss_of_losses(tiny_model, pairs_file, tmp_path, loss):
    _, trace = _fit(tiny_model, pairs_file, tmp_path, loss=loss)
    assert torch.tensor(trace.losses).isfinite().all()


@pytest.mark.parametrize("loss", [TDPOLoss(), WPOLoss()], ids=lambda loss: type(loss).__name__)
def test_losses_of_whole_distributions_train_in_four_bits(tiny_model, pairs_file, tmp_path, loss):
    policy = {"quantization": "nf4", "gradient_checkpointing": True}
    dpo, trace = _fit(tiny_model, pairs_file, tmp_path, loss=loss, policy=policy, lr=2e-2, epochs=2)
    assert sum(trace.losses[-6:]) < sum(trace.losses[:6])
    assert float(dpo.trainer.callback_metrics["val/reward_accuracy"]) > 0.9


def test_a_divergence_from_another_model_can_be_trained_too(tiny_model, pairs_file, tmp_path):
    reference = ModelReference(str(tiny_model), quantization="nf4")
    _, trace = _fit(tiny_model, pairs_file, tmp_path, loss=TDPOLoss(), reference=reference)
    assert torch.tensor(trace.losses).isfinite().all()


def test_a_loss_that_reads_distributions_refuses_a_cache_and_one_that_reads_tokens_sums(tiny_model, tmp_path):
    cached = CachedReference(directory=str(tmp_path), per_token=False)
    with pytest.raises(PolicyError, match=r"reads the reference's whole distribution, .* Use BaseReference\(\) itself"):
        module(tiny_model, loss=TDPOLoss(), reference=cached)
    with pytest.raises(
        PolicyError, match=r"reads the reference's log-probs per token, .* Use BaseReference\(\) itself"
    ):
        module(tiny_model, loss=LDDPOLoss(), reference=cached)
    for policy_only in (LDDPOLoss(reference="plain"), WPOLoss()):
        assert module(tiny_model, loss=policy_only, reference=cached).reference.unwrapped == BaseReference()


# ---- configuration ----


@pytest.mark.parametrize(
    "given",
    [
        {"loss": MixtureLoss([LDDPOLoss(loss=IPOLoss(beta=0.3), surplus_weight=0.2), SFTLoss(), BCOLoss()], [1, 2, 3])},
        {"loss": WPOLoss(loss=DPOLoss(beta=0.7), clamp=False)},
        {"loss": SFTLoss(average_over="token")},
        {"reference": CachedReference(BaseReference(), "somewhere", per_token=False)},
        {"reference": CachedReference(ModelReference("x", quantization="none"))},
        {"reference": EMAReference(0.3, 7)},
        *({"loss": getattr(losses, name)()} for name in losses.__all__ if name != "PreferenceLoss"),
    ],
    ids=lambda given: str(*given.values()),
)  # fmt: skip
def test_every_loss_and_reference_reloads_from_a_checkpoint_as_what_it_was(given, tiny_model, tmp_path):
    dpo = module(tiny_model, **given)
    torch.save({"hyper_parameters": configuration(dpo)}, tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)["hyper_parameters"]
    assert saved.pop("_instantiator") == "lightning.pytorch.cli.instantiate_module"
    again = instantiate_module(DPOModule, saved)
    assert again.loss == dpo.loss
    assert again.reference == dpo.reference
    assert again.policy == dpo.policy


# ---- parts ----


def test_a_mixture_logs_its_parts(tiny_model, pairs_file, tmp_path):
    loss = MixtureLoss(losses=(DPOLoss(), SFTLoss()), weights=(1.0, 0.5))
    dpo, _ = _fit(tiny_model, pairs_file, tmp_path, loss=loss)
    for stage in ("train", "val"):
        measured = {name: float(dpo.trainer.callback_metrics[f"{stage}/loss{name}"]) for name in ("", "_dpo", "_sft")}
        assert measured[""] == pytest.approx(measured["_dpo"] + 0.5 * measured["_sft"], rel=1e-5)
    accuracy = dpo.trainer.callback_metrics["val/reward_accuracy"]
    assert 0 <= float(accuracy) <= 1
