"""The monitor says what goes wrong in real runs, once, and nothing of healthy ones."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tiny
from lit_dpo import DPOLoss, DPOModule, LoRAPolicy, ModelReference, PreferenceDataModule
from lit_dpo.callbacks import HealthMonitor, LastCheckpoint, SampleCompletions, TrainingHealth
from lit_dpo.callbacks.findings import (
    RULES,
    Finding,
    FirstPairs,
    History,
    KLRunaway,
    LengthDrift,
    MarginOutliers,
    Overfitting,
    PairsSeen,
    Rule,
    Saturated,
)
from lit_dpo.callbacks.monitor import _KEPT
from lit_dpo.data.formats import Triples
from lit_dpo.errors import TrainingError
from lit_dpo.logps import PairLogps, SequenceLogps
from lit_dpo.losses import HingeLoss, MixtureLoss, SFTLoss, SimPOLoss
from lit_dpo.window import Window
from test_stories import _continuations, _conversations
from training import adapter, data, module, trainer

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def rows():
    return [
        {
            "prompt": f"How many are {n}?",
            "chosen": f" Exactly {WORDS[n % 8]}." + " It is so." * (n // 8 % 3),
            "rejected": f" No idea, {WORDS[n * 3 % 8]}." + " Who knows?" * (n // 3 % 3),
        }
        for n in range(64)
    ]


@pytest.fixture(scope="module")
def pairs(rows, tmp_path_factory):
    return _write(tmp_path_factory.mktemp("rows") / "pairs.jsonl", rows)


def _fit(dpo, pairs, root, *callbacks, steps=20, **kwargs):
    """A run; what the monitor said, and its lines."""
    given = {"max_steps": steps, "max_epochs": -1, **kwargs}
    with tiny.records("lit_dpo") as said:
        run = trainer(root, callbacks=callbacks, **given)
        run.fit(dpo, pairs)
    (monitor,) = [one for one in run.callbacks if isinstance(one, HealthMonitor)]
    lines = [one.getMessage() for one in said if " at step " in one.getMessage()]
    assert [line.split()[0] for line in lines] == list(monitor.findings)
    assert all("\n" not in line and "Try: " in line for line in lines)
    return monitor, lines


@pytest.fixture(scope="module")
def healthy(tiny_model, pairs, tmp_path_factory):
    """A run of three epochs, and the adapter that it trained."""
    root = tmp_path_factory.mktemp("healthy")
    held_out = data(pairs, val=str(pairs), batch_size=8)
    return root, _fit(module(tiny_model), held_out, root, steps=24)[0]


# ---- silence ----


def test_nothing_is_said_of_a_healthy_run(healthy):
    monitor = healthy[1]
    assert monitor.findings == {}
    # it has looked
    assert (monitor.seen.step, monitor.seen.first.pairs, len(monitor.seen.validations)) == (24, 64, 3)
    assert monitor.seen.now("reward_margin") > 1


@pytest.mark.parametrize(
    "loss",
    [SimPOLoss(), MixtureLoss(losses=(HingeLoss(), SFTLoss()))],
    ids=lambda loss: type(loss).__name__,
)
def test_nothing_is_said_whatever_the_loss(tiny_model, pairs, tmp_path, loss):
    assert _fit(module(tiny_model, loss=loss), data(pairs, batch_size=8), tmp_path, steps=8)[1] == []


def test_nothing_is_said_of_the_quickstart(quickstart, tmp_path):
    """A part of it; the whole run says nothing either."""
    mixed = MixtureLoss(losses=(DPOLoss(beta=1.0), SFTLoss()), weights=(1.0, 2.0))
    dpo = module("lit-dpo/quickstart", lr=3e-4, loss=mixed, policy={"r": 16, "alpha": 16})
    pairs = data("lit-dpo/quickstart", val="lit-dpo/quickstart", batch_size=8)
    monitor, lines = _fit(dpo, pairs, tmp_path, steps=12, val_check_interval=12, gradient_clip_val=1.0)
    assert lines == []
    assert monitor.seen.pairs is not None
    assert len(monitor.seen.pairs.margins) == 64


@pytest.mark.parametrize(
    ("model", "convert", "lr"), [("stories260K", _continuations, 4e-3), ("storybyte-nano-kd", _conversations, 2e-3)]
)
def test_nothing_is_said_of_real_models(shared, tmp_path, model, convert, lr):
    """With the settings under which they learn to write dialogue (`test_stories.py`), which are strong."""
    source = shared / "data" / "finetuning-lab-tinystories" / "preference_pairs.jsonl"
    pairs = _write(tmp_path / "pairs.jsonl", convert([json.loads(line) for line in source.read_text().splitlines()]))
    dpo = module(shared / "models" / model, lr=lr, loss=DPOLoss(beta=0.2), policy={"r": 16})
    cut = PreferenceDataModule(train=str(pairs), batch_size=8, max_length=64, truncation="truncate_completion")
    monitor, lines = _fit(dpo, cut, tmp_path, steps=6)
    assert lines == []
    assert monitor.seen.step == 6


# ---- seven faults ----


def test_a_learning_rate_a_hundred_times_too_large(quickstart, tmp_path):
    dpo = module("lit-dpo/quickstart", lr=3e-2, loss=DPOLoss(beta=0.1), policy={"r": 16, "alpha": 16})
    _, lines = _fit(dpo, data("lit-dpo/quickstart", batch_size=8), tmp_path, steps=20)
    assert any(line.startswith("Displacement") and "a lower learning rate (now 0.03)" in line for line in lines)
    assert any(line.startswith("KLRunaway") for line in lines)


def test_swapped_labels_against_an_adapter_that_learnt_the_right_ones(tiny_model, pairs, healthy, tmp_path):
    swapped = data(pairs, batch_size=8, format=Triples(chosen="rejected", rejected="chosen"))
    given = {"adapter_path": str(healthy[0] / "adapter")}
    # slowly enough that the first 32 pairs are seen before it has turned round
    _, lines = _fit(module(tiny_model, lr=1e-3, policy=given), swapped, tmp_path, steps=5)
    assert [line.split()[0] for line in lines] == ["Swapped"]
    assert "in 32 of the first 32 pairs" in lines[0]
    # the same adapter under the right labels
    assert _fit(module(tiny_model, lr=1e-3, policy=given), data(pairs, batch_size=8), tmp_path, steps=5)[1] == []


@dataclass(frozen=True)
class FrozenEnd(LoRAPolicy):
    """Of each adapter the matrix that begins at 0 stays there."""

    def load(self, *args, **kwargs):
        model = super().load(*args, **kwargs)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_A" in name)
        return model


def test_adapters_that_are_frozen(tiny_model, pairs, tmp_path):
    dpo = module(tiny_model)
    dpo.policy = FrozenEnd(str(tiny_model), quantization="none", r=4)
    _, lines = _fit(dpo, data(pairs, batch_size=8), tmp_path, steps=2)
    assert [line.split()[0] for line in lines] == ["DeadAdapters"]
    assert "14 adapters get no gradient or are frozen at 0, first " in lines[0]


class _Thaw(TrainingHealth):
    """Freezes one adapter in the middle of a run."""

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        next(p for p in pl_module.parameters() if p.requires_grad or p.grad is not None).requires_grad_(
            False
        ).grad = None


def test_an_adapter_that_loses_its_gradient_in_the_middle(tiny_model, pairs, tmp_path):
    (line,) = _fit(module(tiny_model), data(pairs, batch_size=8), tmp_path, _Thaw(), HealthMonitor(patience=2))[1]
    assert line.startswith("DeadAdapters at step ")


def test_a_batch_that_is_not_finite(tiny_model, pairs, rows, tmp_path):
    weighed = _write(tmp_path / "weighed.jsonl", [{**row, "w": 1.0} for row in rows])
    spoilt = data(weighed, batch_size=8, format=Triples(weight="w"))

    def fit(root, health):
        dpo = module(tiny_model, kind=_Spoilt)
        return _fit(dpo, spoilt, root, health, steps=8)

    with pytest.raises(TrainingError, match=r"The loss of step 3 is not finite, from .*weighed\.jsonl"):
        fit(tmp_path / "stop", TrainingHealth())
    monitor, lines = fit(tmp_path / "skip", TrainingHealth(nonfinite="skip"))
    assert [line.split()[0] for line in lines] == ["NotFinite"]
    assert "NotFinite at step 5: 3 steps of 5 were left out" in lines[0]
    assert monitor.seen.skipped == 6


class _Spoilt(DPOModule):
    """Every loss is NaN from the third step on."""

    couples_pairs = False

    def compute_loss(self, pairs):
        return super().compute_loss(pairs) * (float("nan") if self.trainer.global_step >= 2 else 1.0)


def test_a_beta_that_lets_everything_count_the_same(tiny_model, pairs, tmp_path):
    _, lines = _fit(module(tiny_model, loss=DPOLoss(beta=0.001)), data(pairs, batch_size=8), tmp_path, steps=34)
    assert [line.split()[0] for line in lines] == ["FlatWeights"]
    assert "a larger `beta` (now 0.001; 0.1 is usual)" in lines[0]


@pytest.mark.parametrize("loss", [DPOLoss(), MixtureLoss(losses=(DPOLoss(), SFTLoss()))], ids=["dpo", "mixture"])
def test_chosen_and_rejected_are_the_same(tiny_model, rows, tmp_path, loss):
    same = _write(tmp_path / "same.jsonl", [{**row, "rejected": row["chosen"]} for row in rows])
    _, lines = _fit(module(tiny_model, loss=loss), data(same, batch_size=8), tmp_path, steps=8)
    assert [line.split()[0] for line in lines] == ["SameCompletions"]
    assert "in 32 of the first 32 pairs" in lines[0]


def test_a_reference_that_is_another_model(tiny_model, pairs, tmp_path):
    other = tmp_path / "other"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tiny_model).config).save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(other)
    reference = ModelReference(str(other), quantization="none")
    _, lines = _fit(module(tiny_model, reference=reference), data(pairs, batch_size=8), tmp_path / "run", steps=2)
    assert lines[0].startswith(
        f"Mismatch at step 1: the reference (ModelReference {other}) differs from the policy by "
    )
    itself = ModelReference(str(tiny_model), quantization="none")
    assert _fit(module(tiny_model, reference=itself), data(pairs, batch_size=8), tmp_path / "it", steps=2)[1] == []


# ---- what is said, and to whom ----


@dataclass(frozen=True)
class Early(Rule):
    """One of one's own."""

    steps: int = 3

    def __call__(self, seen):
        return Finding("a", "b", "c?") if seen.step >= self.steps else None


class Broken(Rule):
    when = "once"

    def __call__(self, seen):
        raise ZeroDivisionError


def test_rules_of_ones_own_patience_and_a_stop(tiny_model, pairs, tmp_path):
    given = data(pairs, batch_size=8)
    own = HealthMonitor([Early(), KLRunaway(1e-9)], patience=2)
    sampled = SampleCompletions(prompts=2, max_new_tokens=2, every_n_steps=2)
    monitor, lines = _fit(module(tiny_model), given, tmp_path, own, sampled, steps=5)
    assert list(monitor.seen.lengths) == [0, 2, 4, 5]
    assert lines[-1] == "Early at step 4: a: b. Try: c?"
    assert monitor.rules["KLRunaway"].limit == 1e-9
    assert set(monitor.findings) == {"Early", "KLRunaway"}
    stop = HealthMonitor([Early()], on_finding="stop", patience=1)
    with pytest.raises(TrainingError, match="Early at step 3: a: b"):
        _fit(module(tiny_model), given, tmp_path, stop)
    assert "Early" not in HealthMonitor([Early()], ignore=["Early"]).rules


def test_a_rule_that_fails_fails_alone(tiny_model, pairs, tmp_path):
    monitor, lines = _fit(module(tiny_model), data(pairs, batch_size=8), tmp_path, HealthMonitor([Broken()]), steps=2)
    assert (monitor.seen.step, lines) == (2, [])


def test_what_was_said_is_not_said_again_by_a_run_that_goes_on(tiny_model, pairs, tmp_path):
    kept = LastCheckpoint(directory=str(tmp_path / "kept"))
    given = data(pairs, batch_size=8)
    first, _ = _fit(module(tiny_model), given, tmp_path, HealthMonitor([Early()], patience=1), kept, steps=4)
    with tiny.records("lit_dpo") as said:
        again = HealthMonitor([Early()], patience=1)
        run = trainer(tmp_path, callbacks=[again], max_steps=5, max_epochs=-1)
        run.fit(module(tiny_model), given, ckpt_path=str(tmp_path / "kept" / "last.ckpt"), weights_only=False)
    assert not [one for one in said if "Early" in one.getMessage()]
    assert again.seen.start == first.seen.start
    assert again.seen.first.pairs >= 32


def test_it_changes_nothing(tiny_model, pairs, tmp_path):
    """Not a bit of what is trained: with it, and with one that looks at nothing."""
    trained = []
    for callbacks in ((), (_Blind(),)):
        dpo = module(tiny_model, policy={"dropout": 0.1})
        _fit(dpo, data(pairs, val=str(pairs), batch_size=8), tmp_path, *callbacks, steps=3, val_check_interval=2)
        trained.append(adapter(dpo))
    torch.testing.assert_close(*trained, rtol=0, atol=0)


class _Blind(HealthMonitor):
    def _safely(self, look, *given):
        """Look at nothing."""


@pytest.mark.parametrize(
    ("given", "said"),
    [({"on_finding": "x"}, "warn or stop"), ({"patience": 0}, "`patience` >= 1"), ({"ignore": ["x"]}, "KLRunaway")],
)
def test_what_makes_no_sense_is_refused(given, said):
    with pytest.raises(TrainingError, match=said):
        HealthMonitor(**given)


# ---- rules on what no short run shows ----


def _seen(**given):
    found = History(beta=0.1)
    found.start = {"reward_margin": 0.0, "loss": 0.69}
    found.recent = deque([{"reward_margin": 2.0, "loss": 0.69, "reward_accuracy": 0.5}])
    for name, value in given.items():
        setattr(found, name, value)
    return found


def test_nothing_is_found_in_nothing():
    for rule in RULES:
        assert rule(History()) is None


def test_overfitting_is_a_fall_by_more_than_chance():
    def values(*accuracies, pairs=400):
        return _seen(validations=[{"reward_accuracy": one} for one in accuracies], validated=pairs)

    rule = Overfitting()
    assert "fell from 0.800 to 0.700" in rule(values(0.7, 0.8, 0.71, 0.7)).seen
    assert rule(values(0.7, 0.8, 0.79, 0.7)) is None  # once is chance
    assert rule(values(0.7, 0.8, 0.71, 0.7, pairs=20)) is None  # as is anything of few pairs
    assert rule(values(0.8, 0.7)) is None


def test_an_outlier_and_length_are_seen_in_pairs():
    rng = np.random.default_rng(0)
    margins, longer = rng.normal(size=64), rng.normal(size=64)
    plain = _seen(pairs=PairsSeen(margins, longer))
    assert MarginOutliers()(plain) is LengthDrift()(plain) is None
    assert "one margin of 64 is 60" in MarginOutliers()(_seen(pairs=PairsSeen(np.r_[margins[1:], 60.0], longer))).seen
    along = LengthDrift()(_seen(pairs=PairsSeen(-longer + 0.1 * margins, longer)))
    assert "correlation -0.9" in along.seen or "correlation -1.0" in along.seen
    assert "have 50 characters on average and had 10" in LengthDrift()(_seen(lengths={0: 10.0, 5: 50.0})).seen


def test_a_loss_that_stays_where_it_was():
    rule = next(one for one in RULES if type(one).__name__ == "StuckLoss")
    assert "began at 0.6900" in rule(_seen(effort=100.0)).seen
    assert rule(_seen(effort=99.0)) is None
    assert rule(_seen(effort=500.0, start={"loss": 0.72})) is None


def test_first_pairs_are_enough_or_say_nothing():
    swapped = next(one for one in RULES if type(one).__name__ == "Swapped")
    assert swapped(_seen(first=FirstPairs(32, 31, 0))) is not None
    assert swapped(_seen(first=FirstPairs(31, 31, 0))) is None
    assert swapped(_seen(first=FirstPairs(64, 40, 0))) is None


# ---- what a callback does with what is not there, each by itself ----


def _measured(size, reward=0.0):
    side = SequenceLogps(torch.zeros(size), torch.ones(size))
    return SimpleNamespace(pairs=PairLogps(side, side), chosen_rewards=torch.full((size,), reward),
                           rejected_rewards=torch.zeros(size))  # fmt: skip


def test_margins_are_kept_of_so_many_pairs_the_latest_ones():
    monitor = HealthMonitor()
    for reward in range(1, 7):
        monitor._keep("train", SimpleNamespace(measured_batch=_measured(_KEPT // 4, reward)))
    monitor._take_pairs("train")
    assert sorted(set(monitor.seen.pairs.margins.tolist())) == [3.0, 4.0, 5.0, 6.0]
    assert len(monitor.seen.pairs.margins) == _KEPT // 4 * 4


def test_a_monitor_that_cannot_see_says_so_once_and_looks_no_more():
    monitor, broken, looked = HealthMonitor(), SimpleNamespace(measured_batch=SimpleNamespace()), []
    monitor._count_first(SimpleNamespace(measured_batch=None))  # a step of one's own measures nothing
    with tiny.records("lit_dpo.callbacks.alone") as lines:
        monitor._safely(monitor._keep, "train", broken)
        monitor._safely(monitor._keep, "train", broken)
        monitor._safely(looked.append, 1)
    said = [line.getMessage() for line in lines if line.levelname == "WARNING"]
    assert len(said) == 1
    assert said[0].startswith("HealthMonitor failed, and the run goes on without it: AttributeError")
    assert looked == []


@pytest.mark.parametrize(
    ("margin", "compared", "found"), [(10.0, True, False), (10.5, True, True), (99.0, False, False)]
)
def test_pairs_that_are_told_apart_too_far_are_a_finding(margin, compared, found):
    seen = History()
    seen.compared, seen.step = compared, 7
    seen.recent.append({"reward_margin": margin})
    finding = Saturated()(seen)
    assert (finding is not None) == found
    if found:
        assert "the margin is 10.5 after 7 steps" in finding[0]
        assert "is 3e-05" in finding[0]


def _adapters(*, ends=2, dtype=torch.float32, trains=True):
    model = torch.nn.Module()
    for number in range(ends):
        model.register_module(f"layer_{number}", part := torch.nn.Module())
        part.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 2, bias=False, dtype=dtype)})
    return model.requires_grad_(trains)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (None, "Expected `configure_model` to load the policy"),
        (_adapters(trains=False), "no parameter of the policy requires gradients"),
        (_adapters(dtype=torch.bfloat16), r"Expected float32 adapters but layer_0.*is torch.bfloat16"),
    ],
    ids=["no model", "nothing trains", "16 bits"],
)
def test_what_trains_is_seen_before_the_first_step(model, said):
    with pytest.raises(TrainingError, match=said):
        TrainingHealth().on_train_start(None, SimpleNamespace(model=model))


def _stuck(moves):
    """A run whose first adapter moves, or none does."""
    model = _adapters()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    health, run = TrainingHealth(), SimpleNamespace(optimizers=[optimizer], global_step=1, accumulate_grad_batches=1)
    dpo = SimpleNamespace(model=model)
    health._before = {name: p.detach().clone() for name, p in model.named_parameters()}
    health._start, health._seen = None, 0
    for step in range(1, 12):
        health._steps = step
        if moves:
            with torch.no_grad():
                next(model.parameters()).add_(1.0)
        health.on_train_batch_end(run, dpo, {"loss": 0.5}, None, step)
    return health


def test_adapters_that_do_not_move_stop_the_run():
    with pytest.raises(TrainingError, match=r"1 of 2 adapters did not move in the first steps: layer_1.lora_B"):
        _stuck(moves=True)
    with pytest.raises(TrainingError, match=r"No adapter moved in 10 steps: learning rate \[0.1\], loss .*0.5"):
        _stuck(moves=False)


@pytest.mark.parametrize(
    ("losses", "ranks", "place", "said"),
    [
        ([0.5, 0.5], 1, True, r"The gradient of step 4 is not finite, from data:3; data:9\. Look"),
        ([0.5, 0.5], 2, False, r"The gradient of step 4 .* from row 3; row 9, or from rows of another rank"),
        ([0.5, float("nan")], 2, False, r"The loss of step 4 is not finite, from row 9\. Look"),
        (None, 1, False, r"from a batch of a `training_step` of one's own\. Look"),
    ],
)
def test_a_step_that_is_not_finite_names_its_rows(losses, ranks, place, said):
    window, weight = Window(), torch.nn.Parameter(torch.ones(1))
    if losses is not None:
        window.note(0, torch.tensor([3, 9]), torch.tensor(losses))
    weight.grad = torch.tensor([float("inf")])
    source = SimpleNamespace(place=lambda stage, row: f"data:{row}") if place else None
    dpo = SimpleNamespace(window=window, fetched=None, asked={}, unlogged=False, train_metrics=None)
    run = SimpleNamespace(precision_plugin=SimpleNamespace(), world_size=ranks, global_step=3, datamodule=source)
    optimizer = torch.optim.SGD([weight])
    with pytest.raises(TrainingError, match=said):
        TrainingHealth()._check_finite(run, dpo, optimizer)
    # float16: what the scaler is there for is left to it, and what no scale helps is not
    run.precision_plugin.scaler = object()
    if losses and all(loss == loss for loss in losses):
        TrainingHealth()._check_finite(run, dpo, optimizer)
    else:
        with contextlib.nullcontext() if losses is None else pytest.raises(TrainingError, match=said):
            TrainingHealth()._check_finite(run, dpo, optimizer)
