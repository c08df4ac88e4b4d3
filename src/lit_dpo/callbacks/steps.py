from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import Tensor
from torchmetrics import MetricCollection

from lit_dpo.callbacks.tensorboard import describe_run, end_run, lay_out
from lit_dpo.checkpoint import remeasure, standing
from lit_dpo.metrics.preference import on_host

if TYPE_CHECKING:
    from lit_dpo.data.batch import CompletionBatch
    from lit_dpo.module import DPOModule


class OptimizerSteps(pl.Callback):
    """What happens after each optimizer step: a reference that moves follows, and what was measured is logged.

    `train/*` are means over the pairs since the last logged row. Callbacks and schedulers find them after every step;
    loggers get a row every `log_every_n_steps` steps, and what is left at the end of each epoch.
    """

    def setup(self, trainer: pl.Trainer, pl_module: DPOModule, stage: str) -> None:
        """Tell loggers what is run, so that runs can be compared while they go on."""
        if stage == "fit":
            describe_run(trainer, pl_module)
            lay_out(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Forget what an interrupted run, or a validation before this one, left half-counted."""
        pl_module.window.reset()
        pl_module.standing, pl_module.unlogged = None, False
        for measured in (pl_module.train_metrics, pl_module.val_metrics, pl_module.test_metrics):
            measured.reset()
        self._last = trainer.global_step

    def on_train_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Count from here; a checkpoint's steps are known by now."""
        self._last = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: DPOModule, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """Train in training mode, whoever has evaluated before: else dropout and checkpointing would be off."""
        if not pl_module.model.training:
            pl_module.model.train()
        _switch(trainer, "train")
        if pl_module.standing is None:  # a file that is written inside the first step needs one too
            pl_module.standing = standing(trainer, pl_module, {})
        pl_module.standing.inside = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DPOModule, outputs: object, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """Follow and log, unless the step goes on with another batch."""
        _switch(trainer, "eval")
        if trainer.global_step != self._last:
            self._finish_step(trainer, pl_module)

    def _finish_step(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        self._last = trainer.global_step
        pl_module.fresh = False
        # `ModelCheckpoint` runs after this: its file of this step holds the reference of this step
        if pl_module.reference.follows_policy:
            pl_module.reference.update(pl_module.model, trainer.global_step)
        row, every = {}, getattr(trainer, "log_every_n_steps", 0)
        if pl_module.unlogged:
            values = _log(pl_module, pl_module.train_metrics, pl_module.fetched)
            # Lightning's own rule (`should_update_logs`), so that counts begin anew exactly where it writes
            if trainer.should_stop or (every and self._last % every == 0):
                row = {name: float(value) for name, value in values.items()} | {"epoch": trainer.current_epoch}
                _reset(pl_module)  # Lightning writes the row now
        # after the reset, so that a run that goes on does not count the logged pairs again
        pl_module.standing = standing(trainer, pl_module, row)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Log the steps since the last row, so that short epochs, and tails, are seen too."""
        there = pl_module.standing
        if not trainer.is_last_batch and there is not None and there.inside:  # batches of a step that was not made
            remeasure(pl_module.train_metrics, there.measured)
            pl_module.unlogged = bool(there.measured)
        row = {}
        if pl_module.unlogged:
            values = _log(pl_module, pl_module.train_metrics, on_step=False, on_epoch=True)
            row = {name: float(value) for name, value in values.items()} | {"epoch": trainer.current_epoch}
        if trainer.is_last_batch:  # an epoch that was stopped may go on, with the row that it had begun
            _reset(pl_module)
            # Lightning writes the row after all callbacks: a checkpoint of this moment brings it along
            pl_module.standing = standing(trainer, pl_module, row)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Of several validation sets, log all pairs together too."""
        _log_together(pl_module, pl_module.val_metrics, trainer.num_val_batches)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Of several test sets, log all pairs together too."""
        _log_together(pl_module, pl_module.test_metrics, trainer.num_test_batches)

    def on_train_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Say so to TensorBoard, which compares runs."""
        end_run(trainer)


def _switch(trainer: pl.Trainer, mode: str) -> None:
    """Tell optimizers that have a mode (schedule-free ones, arXiv 2405.15682) which weights are wanted.

    Between batches they are those to evaluate, so that validation, checkpoints and exports find them at any moment.
    """
    for optimizer in trainer.optimizers:
        if callable(switch := getattr(getattr(optimizer, "optimizer", optimizer), mode, None)):
            switch()


def fetch(pl_module: DPOModule, finite: Tensor) -> bool:
    """Fetch a yes or no of the device, and what the step measured: the one time in a step that the CPU waits."""
    values = _values(pl_module, pl_module.train_metrics) if pl_module.unlogged else {}
    asked = {f"?{name}": value for name, value in pl_module.asked.items()}
    found = on_host({**values, **asked, "": finite})  # no metric is called "" or begins like these
    pl_module.asked.update({name[1:]: found.pop(name) for name in asked})
    is_finite = bool(found.pop(""))
    pl_module.fetched = found
    return is_finite


def _values(pl_module: DPOModule, measured: MetricCollection) -> dict[str, Any]:
    if pl_module.trainer.barebones:
        return {}
    with warnings.catch_warnings():  # what a checkpoint brought was no `update`
        warnings.filterwarnings("ignore", message=".*was called before the ``update`` method.*")
        values: dict[str, Any] = measured.compute()
    return values


def _log(
    pl_module: DPOModule, measured: MetricCollection, fetched: dict[str, Tensor] | None = None, **when: Any
) -> dict[str, Tensor]:
    # the check of gradients has fetched them already: no second wait for the device
    values = on_host(_values(pl_module, measured)) if fetched is None else fetched
    for name, value in values.items():
        pl_module.log(name, value, prog_bar=name == f"{measured.prefix}reward_accuracy", **when)
    return values


def _reset(pl_module: DPOModule) -> None:
    pl_module.train_metrics.reset()
    pl_module.unlogged, pl_module.fetched = False, None


def _log_together(pl_module: DPOModule, measured: MetricCollection, batches: list[Any]) -> None:
    stage = str(measured.prefix).removesuffix("/")
    # not by what was counted: all ranks log together, and one may have had no pairs
    if len(batches) > 1 and any(key.startswith(f"{stage}_") for key in pl_module.eval_sets):
        _log(pl_module, measured)
        measured.reset()
