"""Lightning's contract: what its documentation tells people to write works here, or stops before the first step."""

from __future__ import annotations

import csv
import functools
import inspect
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.core import hooks
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import grad_norm
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file

import tiny
from lit_dpo import (
    BaseReference,
    DPOLoss,
    DPOModule,
    EMAReference,
    LoRAPolicy,
    PreferenceDataModule,
    PreferenceLoss,
)
from lit_dpo.callbacks import (
    AdapterExport,
    ExactResume,
    HealthMonitor,
    OptimizerSteps,
    PredictionWriter,
    RewardHistograms,
    Throughput,
    TrainingDynamics,
    TrainingHealth,
)
from lit_dpo.data.sampler import PromptSampler
from lit_dpo.errors import DataError, ResumeError, TrainingError
from lit_dpo.losses import BCOLoss
from lit_dpo.requirements import check_strategy
from training import TARGETS, adapter, data, trainer
from training import light as module

# What a hook of LightningModule does when nobody overrides it: overriding it with `pass` asks for something else.
JOBS = {
    "backward",
    "configure_gradient_clipping",
    "configure_model",
    "configure_optimizers",
    "forward",
    "lr_scheduler_step",
    "on_after_batch_transfer",
    "on_before_batch_transfer",
    "optimizer_step",
    "optimizer_zero_grad",
    "predict_step",
    "test_step",
    "training_step",
    "transfer_batch_to_device",
    "validation_step",
}
GROUPS = (hooks.ModelHooks, hooks.DataHooks, hooks.CheckpointHooks)
HOOKS = {name for group in GROUPS for name in vars(group) if not name.startswith("_")} | JOBS | {"configure_callbacks"}
HOOKS -= {"configure_sharded_model"}  # deprecated: Lightning itself refuses it next to `configure_model`


def _pass(*args: Any, **kwargs: Any) -> None:
    pass


def _through(name: str) -> Any:
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(type(self), self), name)(*args, **kwargs)

    parent = getattr(DPOModule, name)
    hook.__signature__ = inspect.signature(parent)
    return hook


def _module(
    model: Path, kind: type[DPOModule] = DPOModule, quantization: Literal["none", "nf4"] = "none", **kwargs: Any
) -> DPOModule:
    torch.manual_seed(0)
    policy = LoRAPolicy(str(model), quantization=quantization, r=4, target_modules=TARGETS, dropout=0.1)
    return kind(policy, **{"optimizer": functools.partial(torch.optim.AdamW, lr=1e-2), "warmup_ratio": 0.2, **kwargs})


def _fit(dpo: DPOModule, pairs_file: Path, root: Path, *, ckpt_path: Path | None = None, **kwargs: Any) -> Any:
    keep = ModelCheckpoint(root, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    given = {
        "accumulate_grad_batches": 2,
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
        "val_check_interval": 2,
        "limit_val_batches": 1,
        **kwargs,
    }
    given["callbacks"] = [keep, *kwargs.get("callbacks", [])]
    run = trainer(root, enable_checkpointing=True, **given)
    run.fit(dpo, data(pairs_file, val=str(pairs_file)), ckpt_path=ckpt_path)
    return run


def _exported(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def _assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, expected in one.items():
        assert torch.equal(other[name], expected), name


# ---- hooks are the user's ----

LOSS = BCOLoss()  # its memory is part of what a checkpoint holds
REFERENCE = EMAReference(0.5, 1)  # and so is a reference that moves


@pytest.fixture(scope="module")
def plain(tiny_model, pairs_file, tmp_path_factory):
    """Two epochs of three steps."""
    root = tmp_path_factory.mktemp("plain")
    _fit(_module(tiny_model, loss=LOSS, reference=REFERENCE), pairs_file, root)
    return root


def _trains_saves_resumes_and_exports(kind, plain, tiny_model, pairs_file, root):
    run = _fit(_module(tiny_model, kind, loss=LOSS, reference=REFERENCE), pairs_file, root / "a")
    assert run.global_step == 6
    again = _module(tiny_model, kind, loss=LOSS, reference=REFERENCE)
    _fit(again, pairs_file, root / "b", ckpt_path=root / "a" / "step=3.ckpt")
    expected = _exported(plain / "adapter")
    for found in (root / "a" / "adapter", root / "a" / "step=6", root / "b" / "adapter", root / "b" / "step=6"):
        _assert_equal(expected, _exported(found))
    states = [torch.load(folder / "step=6.ckpt", weights_only=True) for folder in (plain, root / "a", root / "b")]
    for state in states[1:]:
        _assert_equal(states[0]["state_dict"], state["state_dict"])
        described = [
            {name: part for name, part in one["lit_dpo"].items() if name != "module"} for one in (state, states[0])
        ]
        assert described[0] == described[1], "but for the name of the class"
    loaded = kind.load_from_checkpoint(root / "a" / "step=6.ckpt")
    _assert_equal({name: p for name, p in states[0]["state_dict"].items() if "default" in name},
                  {f"model.{name}": p for name, p in adapter(loaded).items()})  # fmt: skip


def _subclass(name: str, **methods: Any) -> type[DPOModule]:
    made = type(name, (DPOModule,), {"__module__": __name__, "__qualname__": name, **methods})
    globals()[name] = made
    return made


# A run each; neighbours in the alphabet, as start and end of one thing, are in two of them. Those of stages that `fit`
# does not have are among them: it calls none.
OVERRIDDEN = {" ".join(part): part for part in (sorted(HOOKS - JOBS)[n::2] for n in range(2))}


@pytest.mark.parametrize("overridden", OVERRIDDEN)
def test_a_hook_overridden_with_pass_changes_nothing(overridden, plain, tiny_model, pairs_file, tmp_path):
    """With a loss that remembers, a reference that moves, dropout, accumulation and validation between the steps."""
    kind = _subclass(f"Passes_{overridden}", **dict.fromkeys(OVERRIDDEN[overridden], _pass))
    _trains_saves_resumes_and_exports(kind, plain, tiny_model, pairs_file, tmp_path)


def test_all_hooks_overridden_at_once_change_nothing(plain, tiny_model, pairs_file, tmp_path):
    methods = {name: _through(name) if name in JOBS else _pass for name in HOOKS}
    kind = _subclass("PassesAll", couples_pairs=False, **methods)
    _trains_saves_resumes_and_exports(kind, plain, tiny_model, pairs_file, tmp_path)


@pytest.mark.parametrize(
    "hook", sorted(JOBS - {"configure_gradient_clipping", "predict_step", "test_step", "validation_step"})
)
def test_a_hook_with_a_job_that_does_nothing_is_named(hook, tiny_model, pairs_file, tmp_path):
    kind = _subclass(f"Nothing_{hook}", couples_pairs=False, **{hook: _pass})
    with pytest.raises((TrainingError, MisconfigurationException), match=rf"`{hook}`"):
        trainer(tmp_path, accumulate_grad_batches=2).fit(_module(tiny_model, kind), data(pairs_file))
    assert not (tmp_path / "adapter").exists()


def test_a_setup_of_one_s_own_leaves_hyper_parameters_that_loggers_take(tiny_model, pairs_file, tmp_path):
    kind = _subclass("Sets", setup=_pass)
    logger = TensorBoardLogger(tmp_path, name="board")
    trainer(tmp_path, logger=logger, max_steps=1).fit(_module(tiny_model, kind), data(pairs_file))
    assert "class_path: lit_dpo.losses.dpo.DPOLoss" in (Path(logger.log_dir) / "hparams.yaml").read_text()


@pytest.mark.parametrize("given", [{"fast_dev_run": True}, {"barebones": True}, {"limit_train_batches": 0}])
def test_trainers_that_log_or_train_nothing_end_well(tiny_model, pairs_file, tmp_path, given):
    plain = {"default_root_dir": tmp_path, "accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, **given}
    Trainer(**plain).fit(_module(tiny_model), data(pairs_file))


def test_a_hook_that_forgets_to_compare_does_not_let_another_run_in(tiny_model, pairs_file, tmp_path):
    kind = _subclass("Forgets", on_load_checkpoint=_pass, on_save_checkpoint=_pass)
    _fit(_module(tiny_model, kind), pairs_file, tmp_path, max_epochs=1, limit_val_batches=0)
    with pytest.raises(ResumeError, match=r"loss\.init_args\.beta: 0\.1 in the checkpoint, 0\.9 now"):
        _fit(
            _module(tiny_model, kind, loss=DPOLoss(beta=0.9)), pairs_file, tmp_path, ckpt_path=tmp_path / "step=3.ckpt"
        )


def test_loading_onto_a_base_that_changed_is_refused_with_and_without_a_trainer(tiny_model, pairs_file, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    kind = _subclass("Loads", on_load_checkpoint=_pass)
    _fit(_module(base, kind), pairs_file, tmp_path, max_epochs=1, limit_val_batches=0)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResumeError, match=r"base\.fingerprint"):
        kind.load_from_checkpoint(tmp_path / "step=3.ckpt")
    with pytest.raises(ResumeError, match=r"base\.fingerprint"):
        trainer(tmp_path).validate(
            _module(base, kind), data(pairs_file, val=str(pairs_file)), ckpt_path=tmp_path / "step=3.ckpt"
        )


def test_weights_alone_say_what_they_belong_to(tiny_model, pairs_file, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    dpo = _module(tiny_model)
    run = trainer(tmp_path, callbacks=[keep], enable_checkpointing=True, limit_train_batches=2)
    run.fit(dpo, data(pairs_file))
    assert torch.load(tmp_path / "weights.ckpt", weights_only=True)["lit_dpo"]["base"]["quantization"] == "none"
    _assert_equal(adapter(dpo), adapter(DPOModule.load_from_checkpoint(tmp_path / "weights.ckpt")))


def test_a_callback_of_the_user_s_takes_the_place_of_ours(tiny_model, pairs_file, tmp_path):
    class Lenient(TrainingHealth):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            self.asked = True

    lenient = Lenient()
    mine = AdapterExport(str(tmp_path / "mine"))
    run = trainer(tmp_path, callbacks=[lenient, mine], limit_train_batches=1)
    run.fit(_module(tiny_model), data(pairs_file))
    assert lenient.asked
    assert (tmp_path / "mine" / "adapter_config.json").is_file()
    assert [type(one) for one in run.callbacks if isinstance(one, TrainingHealth | AdapterExport)] == [
        Lenient,
        AdapterExport,
    ]
    assert len({type(one) for one in run.callbacks}) == len(run.callbacks)
    kinds = [type(one) for one in run.callbacks]
    assert kinds.index(Lenient) < kinds.index(OptimizerSteps) < kinds.index(AdapterExport), "in the order of ours"
    run.fit_loop.max_epochs = 2
    run.fit(_module(tiny_model), data(pairs_file))
    assert len({type(one) for one in run.callbacks}) == len(run.callbacks), "they come along once"


# ---- gradients ----


class Gradients(Callback):
    """What callbacks see of gradients, and what a step of SGD with rate 1 then does."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []
        self.moved: list[dict[str, torch.Tensor]] = []
        self.running: list[dict[str, torch.Tensor]] = []
        self.losses: list[tuple[float, int]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.requires_grad})
        self.before = adapter(pl_module)

    def on_after_backward(self, trainer, pl_module):
        self.running.append({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.requires_grad})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append((float(outputs["loss"]), batch.size))
        if trainer.global_step > len(self.moved):
            self.moved.append({f"model.{name}": self.before[name] - p for name, p in adapter(pl_module).items()})


def _gradients(tiny_model, pairs_file, root, *, batch_size, accumulate, kind=DPOModule, **kwargs):
    gradients = Gradients()
    torch.manual_seed(0)
    sgd = functools.partial(torch.optim.SGD, lr=1.0)
    dpo = kind(LoRAPolicy(str(tiny_model), quantization="none", r=4), optimizer=sgd, lr_scheduler="constant")
    pairs = data(pairs_file, batch_size=batch_size)
    pairs._sampler = lambda table, size, **_: PromptSampler(table.lengths, batch_size, shuffle=False)  # the same order
    run = trainer(root, accumulate_grad_batches=accumulate, callbacks=[gradients], **kwargs)
    run.fit(dpo, pairs)
    return gradients, run


@pytest.fixture(scope="module")
def whole(tiny_model, pairs_file, tmp_path_factory):
    """What steps of 8 pairs and of 9 do, each in one batch."""
    root = tmp_path_factory.mktemp("whole")
    return {size: _gradients(tiny_model, pairs_file, root, batch_size=size, accumulate=1)[0] for size in (8, 9)}


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (1, 8), (3, 3)])
def test_hooks_see_the_gradients_that_the_optimizer_uses(
    whole, tiny_model, pairs_file, tmp_path, batch_size, accumulate
):
    """The mean over the step's pairs, with uneven batches and a short last window; and after each backward so far."""
    found, _ = _gradients(tiny_model, pairs_file, tmp_path, batch_size=batch_size, accumulate=accumulate)
    window = batch_size * accumulate
    assert len(found.seen) == len(found.moved) == -(-21 // window)
    for seen, moved, expected in zip(found.seen, found.moved, whole[window].seen, strict=True):
        for name, gradient in expected.items():
            torch.testing.assert_close(seen[name], gradient, rtol=0, atol=2e-6)
            torch.testing.assert_close(moved[name], seen[name], rtol=0, atol=1e-6)
    part, _ = _gradients(tiny_model, pairs_file, tmp_path, batch_size=batch_size, accumulate=1, max_steps=1)
    for name, gradient in part.seen[0].items():
        torch.testing.assert_close(found.running[0][name], gradient, rtol=0, atol=1e-6)


def test_a_hook_without_super_does_not_change_a_step(tiny_model, pairs_file, tmp_path):
    """As Lightning's documentation logs gradient norms; clipping then sees the mean as well."""

    class Norms(DPOModule):
        def on_before_optimizer_step(self, optimizer):
            self.log_dict(grad_norm(self.model, norm_type=2))

    Norms.couples_pairs = False
    plain, _ = _gradients(tiny_model, pairs_file, tmp_path, batch_size=2, accumulate=4, gradient_clip_val=0.01)
    logged, run = _gradients(
        tiny_model, pairs_file, tmp_path, batch_size=2, accumulate=4, gradient_clip_val=0.01, kind=Norms
    )
    for one, other in zip(plain.moved, logged.moved, strict=True):
        _assert_equal(one, other)
        norm = torch.stack([p.norm() for p in one.values()]).norm()
        assert float(norm) == pytest.approx(0.01, rel=1e-3)
    assert {"grad_2.0_norm_total", "train/loss"} <= run.callback_metrics.keys()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loss_of_a_step_is_the_mean_over_the_batch(tiny_model, pairs_file, tmp_path, accumulate):
    found, run = _gradients(
        tiny_model, pairs_file, tmp_path, batch_size=2, accumulate=accumulate, log_every_n_steps=100
    )
    assert found.losses[0][0] == pytest.approx(0.6931, abs=1e-3)
    mean = sum(loss * pairs for loss, pairs in found.losses) / sum(pairs for _, pairs in found.losses)
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(mean, rel=1e-5)


def test_an_optimizer_that_asks_twice_counts_a_batch_once(tiny_model, pairs_file, tmp_path):
    torch.manual_seed(0)
    twice = functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=3)
    dpo = DPOModule(LoRAPolicy(str(tiny_model), quantization="none", r=4), optimizer=twice, lr_scheduler="constant")
    gradients = Gradients()
    trainer(tmp_path, callbacks=[gradients], max_steps=1).fit(dpo, data(pairs_file))
    plain, _ = _gradients(tiny_model, pairs_file, tmp_path, batch_size=4, accumulate=1, max_steps=1)
    assert len(gradients.running) == 3
    norms = [torch.cat([p.flatten() for p in one.values()]).norm() for one in (*gradients.running, plain.running[0])]
    assert max(norms) < 3 * min(norms), "no factor of the number of pairs between them"


def test_a_training_step_of_one_s_own_trains_with_the_mean_that_it_returns(tiny_model, pairs_file, tmp_path):
    """As every tutorial writes it; nothing is divided again."""

    class Own(DPOModule):
        def training_step(self, batch, batch_idx):
            loss = self.compute_loss(self.pair_logps(batch)).mean()
            self.log("own", loss)
            return loss

    own, run = _gradients(tiny_model, pairs_file, tmp_path / "own", batch_size=4, accumulate=1, kind=Own)
    ours, _ = _gradients(tiny_model, pairs_file, tmp_path / "ours", batch_size=4, accumulate=1)
    for one, other in zip(own.moved, ours.moved, strict=True):
        for name, moved in one.items():
            torch.testing.assert_close(moved, other[name], rtol=0, atol=1e-6)
    assert all(torch.isfinite(p).all() for p in _exported(tmp_path / "own" / "adapter").values())
    assert "own" in run.callback_metrics


def test_what_watches_a_run_makes_do_with_steps_of_one_s_own(tiny_model, pairs_file, tmp_path):
    """None of it measures comparisons then: that is said once, and nothing of it ends the run."""

    class Own(DPOModule):
        def training_step(self, batch, batch_idx):
            return self.compute_loss(self.pair_logps(batch)).mean() * (float("nan") if batch_idx == 2 else 1.0)

        def validation_step(self, batch, batch_idx):
            self.log("val/own", float(batch_idx))

        def predict_step(self, batch, batch_idx):
            return batch.indices

    health = TrainingHealth(nonfinite="skip")
    own = [health, HealthMonitor(), TrainingDynamics(), Throughput(), RewardHistograms()]
    run = trainer(tmp_path, callbacks=[*own, PredictionWriter(str(tmp_path / "rows.jsonl"))], limit_train_batches=4)
    dpo, source = module(tiny_model, kind=Own), data(pairs_file, val=str(pairs_file), predict=str(pairs_file))
    with tiny.records("lit_dpo.callbacks.alone") as lines, tiny.records("lit_dpo.callbacks.health") as skipped:
        run.fit(dpo, source)
    assert [line.getMessage() for line in lines if line.levelname == "WARNING"] == [
        "TrainingDynamics failed, and the run goes on without it: TypeError: there is a `training_step` of one's own, "
        "which measures no comparisons"
    ]
    assert health.skipped == 1
    assert "from a batch of a `training_step` of one's own" in skipped[0].getMessage()
    assert run.global_step == 4
    assert not list(tmp_path.rglob("dynamics.parquet"))
    assert torch.cat(run.predict(dpo, source)).tolist() == [*range(21)]
    # a file inside a step, and one of a run with loaders of its own
    resume = ExactResume()
    with pytest.raises(ResumeError, match="was written inside an optimizer step"):
        resume._go_back({"optimizer_states": [], "lit_dpo_run": {"torn": True}}, "PreferenceDataModule")
    checkpoint = {"optimizer_states": [], "loops": {}, "lit_dpo_run": {"torn": False}}
    resume._go_back(checkpoint, "NoneType")
    assert checkpoint == {"optimizer_states": [], "loops": {}, "lit_dpo_run": {"torn": False}}


# ---- shapes ----


@dataclass(frozen=True)
class MeanLoss(PreferenceLoss):
    def __call__(self, pairs):
        return (1 - self.beta * pairs.margin).mean()


class Reduced(DPOModule):
    def compute_loss(self, pairs):
        return super().compute_loss(pairs).mean()


class Column(DPOModule):
    def compute_loss(self, pairs):
        return super().compute_loss(pairs)[:, None]


class Number(DPOModule):
    def compute_loss(self, pairs):
        return float(super().compute_loss(pairs).sum())


@pytest.mark.parametrize(
    ("kind", "loss", "found"),
    [
        (DPOModule, MeanLoss(), r"the shape \(\)"),
        (Reduced, DPOLoss(), r"the shape \(\)"),
        (Column, DPOLoss(), r"the shape \(4, 1\)"),
        (Number, DPOLoss(), "a float"),
    ],
)
def test_a_loss_of_another_shape_stops_with_both_shapes(tiny_model, pairs_file, tmp_path, kind, loss, found):
    with pytest.raises(
        TrainingError, match=rf"shape \(4,\), but {type(loss).__name__} and .*compute_loss gave {found}"
    ):
        trainer(tmp_path).fit(_module(tiny_model, kind, loss=loss), data(pairs_file))


# ---- what is measured can be monitored ----


def test_what_training_measures_is_there_for_callbacks_in_the_shortest_run(tiny_model, pairs_file, tmp_path):
    """With Lightning's default of a row every 50 steps, and six steps in an epoch."""
    best = ModelCheckpoint(tmp_path / "best", monitor="train/loss", filename="best")
    often = ModelCheckpoint(tmp_path / "often", monitor="train/reward_accuracy", mode="max", every_n_train_steps=2,
                            filename="{step}", save_top_k=-1)  # fmt: skip
    stop = EarlyStopping("train/loss", patience=1, check_on_train_epoch_end=True)
    logger = CSVLogger(tmp_path, name="csv")
    run = trainer(
        tmp_path,
        callbacks=[best, often, stop],
        enable_checkpointing=True,
        log_every_n_steps=50,
        max_epochs=2,
        logger=logger,
    )
    run.fit(_module(tiny_model), data(pairs_file))
    assert 0 < float(best.best_model_score) < 0.7
    assert len(list((tmp_path / "often").glob("*.ckpt"))) == 6
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    assert [row["epoch"] for row in rows if row["train/loss"]] == ["0", "1"]
    assert all(row["train/reward_accuracy"] and row["train/reward_margin"] for row in rows if row["train/loss"])


@pytest.mark.parametrize("every", [2, 4, 100])
def test_rows_are_means_over_the_pairs_since_the_last_and_leave_none_out(tiny_model, pairs_file, tmp_path, every):
    trace, logger = Gradients(), CSVLogger(tmp_path, name="csv")
    run = trainer(tmp_path, callbacks=[trace], log_every_n_steps=every, logger=logger, max_epochs=2)
    run.fit(_module(tiny_model), data(pairs_file))
    found = [float(row["train/loss"]) for row in csv.DictReader((Path(logger.log_dir) / "metrics.csv").open())]
    expected, waiting = [], []
    for step, loss in enumerate(trace.losses, start=1):
        waiting.append(loss)
        if step % every == 0 or step % 6 == 0:
            expected.append(sum(loss * pairs for loss, pairs in waiting) / sum(pairs for _, pairs in waiting))
            waiting = []
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_plateau_scheduler_follows_the_training_loss(tiny_model, pairs_file, tmp_path, interval):
    class Plateau(DPOModule):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)
            self.plateau = scheduler
            config = {"scheduler": scheduler, "interval": interval, "monitor": "train/loss"}
            return {"optimizer": optimizer, "lr_scheduler": config}

    dpo = _module(tiny_model, Plateau)
    trainer(tmp_path, log_every_n_steps=50, max_epochs=3, limit_train_batches=2).fit(dpo, data(pairs_file))
    assert dpo.plateau.last_epoch == (6 if interval == "step" else 3)
    assert dpo.plateau.get_last_lr()[0] < 1.0


def test_the_end_of_a_run_says_its_numbers(tiny_model, pairs_file, tmp_path):
    with tiny.records("lightning.pytorch.utilities.rank_zero") as said:
        trainer(tmp_path, log_every_n_steps=50, max_steps=3, max_epochs=-1).fit(
            _module(tiny_model), data(pairs_file, val=str(pairs_file))
        )
    (text,) = [text for record in said if re.match(r"\d+ steps in ", text := record.getMessage())]
    assert re.match(r"3 steps in 0:00:\d\d, [\d,]+ tokens per second, peak memory ", text)


# ---- strategies, averages ----


@pytest.mark.parametrize("strategy", [ModelParallelStrategy, FSDPStrategy])
def test_a_strategy_that_shards_is_refused_by_name_before_weights_load(tiny_model, pairs_file, tmp_path, strategy):
    dpo = _module(tiny_model)
    with pytest.raises(TrainingError, match=strategy.__name__):
        check_strategy(strategy())
    if strategy is ModelParallelStrategy:  # the other one wants a GPU
        with pytest.raises(TrainingError, match=strategy.__name__):
            trainer(tmp_path, strategy=strategy(), devices=1).fit(dpo, data(pairs_file))
        torch.distributed.destroy_process_group()  # its process group of one is not the next test's
        assert dpo.model is None


class Weights(Callback):
    """The adapter at the start of each epoch, and after each step."""

    def __init__(self) -> None:
        self.starts: list[dict[str, torch.Tensor]] = []
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.starts.append(adapter(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(adapter(pl_module))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_stochastic_weight_averaging_averages(tiny_model, pairs_file, tmp_path, quantization):
    weights, average = Weights(), StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, device=None)
    torch.manual_seed(0)
    policy = LoRAPolicy(str(tiny_model), quantization=quantization, r=4)
    dpo = DPOModule(policy, optimizer=functools.partial(torch.optim.AdamW, lr=1e-2), lr_scheduler="constant")
    trainer(tmp_path, max_epochs=4, limit_train_batches=2, callbacks=[weights, average]).fit(dpo, data(pairs_file))
    for name, found in adapter(dpo).items():
        mean = torch.stack([start[name] for start in weights.starts]).mean(0)
        torch.testing.assert_close(found, mean, rtol=0, atol=1e-6)
        assert torch.equal(_exported(tmp_path / "adapter")[name.replace(".default", "")], found)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_folder_beside_a_checkpoint_holds_the_averages_that_it_holds(
    tiny_model, pairs_file, tmp_path, quantization
):
    """And the run goes on from it to the bit, with its own weights."""

    def fit(root, ckpt_path=None):
        weights, average = Weights(), EMAWeightAveraging(decay=0.5)
        dpo = _module(tiny_model, quantization=quantization)
        _fit(dpo, pairs_file, root, callbacks=[weights, average], ckpt_path=ckpt_path)
        return dpo, weights

    dpo, weights = fit(tmp_path / "a")
    for step in (3, 6):
        saved = torch.load(tmp_path / "a" / f"step={step}.ckpt", weights_only=True)["state_dict"]
        exported = _exported(tmp_path / "a" / f"step={step}")
        _assert_equal({name.removeprefix("model.").replace(".default", ""): p for name, p in saved.items()}, exported)
    for name, found in adapter(dpo).items():
        averages = [steps[name] for steps in weights.steps[1::2]]  # two batches a step
        mean = averages[0]
        for one in averages[1:]:
            mean = 0.5 * mean + 0.5 * one
        torch.testing.assert_close(found, mean, rtol=0, atol=1e-6)
    again, _ = fit(tmp_path / "b", tmp_path / "a" / "step=3.ckpt")
    _assert_equal(adapter(dpo), adapter(again))


# ---- several sets ----


def _validated(dpo, pairs):
    (result, *others) = trainer(Path("unused"), enable_progress_bar=False).validate(dpo, pairs, verbose=False)
    return {name: value for one in (result, *others) for name, value in one.items()}


def test_each_of_several_validation_sets_has_its_own_numbers(tiny_model, pairs_file, tmp_path, monkeypatch):
    """Named ones, and loaders without a name as Lightning numbers them; all pairs together as if they were one set."""
    monkeypatch.chdir(tmp_path)
    lines = pairs_file.read_text().splitlines(keepends=True)
    files = {"easy": tmp_path / "easy.jsonl", "hard": tmp_path / "hard.jsonl", "all": tmp_path / "all.jsonl"}
    for (name, file), part in zip(files.items(), (lines[:5], lines[5:], lines), strict=True):
        file.write_text("".join(part))
        assert name
    dpo = _module(tiny_model)
    trainer(tmp_path).fit(dpo, data(pairs_file))
    alone = {name: _validated(dpo, data(pairs_file, val=str(file), eval_batch_size=2)) for name, file in files.items()}
    assert abs(alone["easy"]["val/reward_margin"] - alone["hard"]["val/reward_margin"]) > 1e-3
    named = {name: str(files[name]) for name in ("easy", "hard")}
    found = _validated(dpo, data(pairs_file, val=named, eval_batch_size=3))
    for name in ("easy", "hard"):
        for measure, value in alone[name].items():
            assert found[measure.replace("val/", f"val/{name}/")] == pytest.approx(value, rel=1e-5, abs=1e-7), measure
    for measure, value in alone["all"].items():
        assert found[measure] == pytest.approx(value, rel=1e-5, abs=1e-7), measure

    class Numbered(PreferenceDataModule):
        def val_dataloader(self):
            return list(super().val_dataloader().values())

    numbered = Numbered(train=str(pairs_file), val=named, eval_batch_size=3)
    found = _validated(dpo, numbered)
    for number, name in enumerate(("easy", "hard")):
        for measure, value in alone[name].items():
            assert found[f"{measure}/dataloader_idx_{number}"] == pytest.approx(value, rel=1e-5, abs=1e-7), measure


def test_several_sets_are_monitored_in_training_and_tested(tiny_model, pairs_file, tmp_path):
    sets = {"one": str(pairs_file), "two": str(pairs_file)}
    best = ModelCheckpoint(tmp_path, monitor="val/two/reward_accuracy", mode="max", filename="best")
    logger = CSVLogger(tmp_path, name="csv")
    run = trainer(tmp_path, callbacks=[best], enable_checkpointing=True, logger=logger, limit_train_batches=2)
    pairs = data(pairs_file, val=sets, test=sets)
    dpo = _module(tiny_model)
    run.fit(dpo, pairs)
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    assert metrics["val/one/loss"] == metrics["val/two/loss"] == pytest.approx(metrics["val/loss"])
    assert best.best_model_path
    first, _ = run.test(dpo, pairs, verbose=False)
    assert {"test/one/kl", "test/kl"} <= first.keys()
    assert all(Path(logger.log_dir).rglob("metrics.csv"))


@pytest.mark.parametrize("names", [{}, {"a/b": "x.jsonl"}, {"": "x.jsonl"}])
def test_a_set_has_a_name_that_can_be_part_of_a_metric_s(names):
    with pytest.raises(DataError, match="names without `/` for the sets of `val`"):
        PreferenceDataModule(train="x.jsonl", val=names)


# ---- where a run writes, and what it says ----


class Service(DummyLogger):
    """As the loggers of services are: a directory for all runs, and a name and a version for each."""

    def __init__(self, save_dir: Path, version: str) -> None:
        super().__init__()
        self._save_dir, self._version = save_dir, version

    @property
    def save_dir(self) -> str:
        return str(self._save_dir)

    @property
    def name(self) -> str:
        return "project"

    @property
    def version(self) -> str:
        return self._version


def test_an_adapter_lies_in_its_run_s_directory_under_any_logger(tiny_model, pairs_file, tmp_path):
    for version in ("first", "second"):
        run = trainer(tmp_path, logger=Service(tmp_path / "all", version), enable_checkpointing=True, max_steps=2)
        run.fit(_module(tiny_model), data(pairs_file))
        directory = tmp_path / "all" / "project" / version
        assert (directory / "adapter" / "adapter_model.safetensors").is_file()
        assert list((directory / "checkpoints").glob("*.ckpt"))
    assert sorted(found.name for found in (tmp_path / "all").iterdir()) == ["project"]


def _warnings(run, *args, **kwargs):
    with tiny.records("lit_dpo") as said:
        run(*args, **kwargs)
    return [record.getMessage() for record in said if "are the same" in record.getMessage()]


def test_measuring_a_policy_against_itself_is_said(tiny_model, pairs_file, tmp_path):
    pairs = data(pairs_file, val=str(pairs_file), test=str(pairs_file), predict=str(pairs_file))
    for stage in ("validate", "test", "predict"):
        (line,) = _warnings(getattr(trainer(tmp_path), stage), _module(tiny_model), pairs)
        assert line.startswith(f"{stage}: policy and reference (BaseReference()) are the same")
        assert "`--ckpt_path`" in line
    dpo = _module(tiny_model)
    assert not _warnings(trainer(tmp_path, max_steps=4).fit, dpo, pairs)
    assert not _warnings(trainer(tmp_path).validate, dpo, pairs)
    policy = LoRAPolicy(str(tiny_model), quantization="none", adapter_path=str(tmp_path / "adapter"))
    (line,) = _warnings(trainer(tmp_path).validate, DPOModule(policy), pairs)
    assert "`--model.reference BaseReference`" in line
    against_base = DPOModule(policy, reference=BaseReference())
    assert not _warnings(trainer(tmp_path).validate, against_base, pairs)
    assert _validated(against_base, pairs)["val/reward_accuracy"] == _validated(dpo, pairs)["val/reward_accuracy"]
