"""Where a run stands: the last optimizer step that was made, and how Lightning's loops go on from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection

from lit_dpo.checkpoint.random import random_state
from lit_dpo.compat import BATCHES_THAT_STEPPED

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lit_dpo.module import DPOModule


@dataclass
class Standing:
    """How things stood after the last optimizer step: what a run that goes on from it needs besides weights.

    Attributes:
        step: how many were made.
        random: this rank's random state.
        loss_state: what the loss remembers.
        measured: what the training metrics of this rank have counted since the last logged row.
        row: the row that the step wrote, if it did.
        inside: whether a batch of the next step has begun.
    """

    step: int
    random: dict[str, Any]
    loss_state: Tensor | None
    measured: dict[str, dict[str, Any]]
    row: dict[str, float]
    inside: bool = False


def standing(trainer: pl.Trainer, module: DPOModule, row: dict[str, float]) -> Standing:
    """How things stand now."""
    # a copy: where a step is left out, `TrainingHealth` copies this into the buffer
    state = None if module.loss_state is None else module.loss_state.clone()
    counted = measured(module.train_metrics) if module.unlogged else {}
    return Standing(trainer.global_step, random_state(), state, counted, row)


def rewind(loops: dict[str, Any], epoch: int, batches: int, of: int, *, validated: bool) -> None:
    """Let a run go on inside its epoch, after the batches of the last optimizer step that was made.

    Lightning takes an epoch that was stopped for a finished one, and starts the next; and what it accumulated towards a
    step is lost with the gradients.

    Args:
        loops: of a checkpoint; changed.
        epoch: of the data, from 0.
        batches: of it that went into optimizer steps.
        of: batches of an epoch; 0 if that is not known.
        validated: whether the validation that is due after that batch, if one is, has been made.
    """
    fit = loops["fit_loop"]
    # counters of Lightning: an event is ready, started, processed and completed, in this order
    epochs, done = fit["epoch_progress"], fit["epoch_loop.batch_progress"]
    if batches == 0 and epochs["current"]["ready"] <= epoch:
        return  # the epoch before is finished, and this one was not begun
    begun = int(batches > 0)
    last = batches > 0 and batches == of
    # batches whose step was not made: they come again
    ahead = done["current"]["ready"] - batches
    for part, count in (("total", done["total"]["ready"] - ahead), ("current", batches)):
        # as it is written after a training batch, if validation shall not begin again, or after a validation
        done[part] = dict.fromkeys(done[part], count)
        # one less than processed: by that Lightning knows a file of `on_train_batch_end`, after which it trains on
        done[part]["completed"] -= int(begun and validated and not last)
        # an epoch that has begun and not ended is ready and started, no more
        epochs[part] = {"ready": epoch + begun, "started": epoch + begun, "processed": epoch, "completed": epoch}
    done["is_last_batch"] = last
    # one less, as Lightning writes it: on going on it adds the one that was under way
    step = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    fit["epoch_loop.state_dict"][BATCHES_THAT_STEPPED] = step["total"]["completed"] - 1
    validation = fit["epoch_loop.val_loop.batch_progress"]
    count = validation["total"]["completed"]
    begun = int(
        begun and not validated
    )  # as if it had been interrupted in its first batch: then Lightning begins it again
    for part, completed in (("total", count), ("current", 0)):
        validation[part] = {
            "ready": completed + begun,
            "started": completed + begun,
            "processed": completed,
            "completed": completed,
        }
    validation["is_last_batch"] = False


def take_settings(checkpoint: dict[str, Any], trainer: pl.Trainer, *, same: bool) -> None:
    """Let a checkpoint's optimizer and schedulers go on under the settings of the trainer's.

    Args:
        checkpoint: changed, before it is put into them.
        trainer: has the optimizer and the schedulers as they are configured.
        same: whether the optimizer is of the same class; another one begins without a memory.
    """
    fresh = [optimizer.state_dict() for optimizer in trainer.optimizers]
    if same:
        for saved, here in zip(checkpoint["optimizer_states"], fresh, strict=True):
            for group, wanted in zip(saved["param_groups"], here["param_groups"], strict=True):
                # `params` are numbers by which the state finds its parameters: they are the file's
                group.update({name: given for name, given in wanted.items() if name in group and name != "params"})
    else:
        checkpoint["optimizer_states"] = fresh
    saved_schedulers = checkpoint["lr_schedulers"]
    checkpoint["lr_schedulers"] = []
    for place, config in enumerate(trainer.lr_scheduler_configs):
        scheduler = config.scheduler
        state = scheduler.state_dict()
        if place < len(saved_schedulers) and isinstance(scheduler, LambdaLR):  # ours are
            # our rates are functions of the step alone, so that the new ones can be taken up at any step
            moved = _moved(scheduler, saved_schedulers[place]["last_epoch"])
            state |= moved.state_dict()
            for group, rate in zip(checkpoint["optimizer_states"][0]["param_groups"], moved.get_last_lr(), strict=True):
                group["lr"] = rate  # loading a scheduler moves no rate
        checkpoint["lr_schedulers"].append(state)


def _moved(scheduler: LambdaLR, steps: int) -> LambdaLR:
    """Another one of the same rates, as it is after some steps."""
    # of an optimizer of its own: to make a scheduler sets rates. It takes one step then, so `last_epoch` is one less
    groups = [{"params": [torch.zeros(())], "lr": rate, "initial_lr": rate} for rate in scheduler.base_lrs]
    return LambdaLR(torch.optim.SGD(groups), scheduler.lr_lambdas, last_epoch=steps - 1)


def measured(metrics: MetricCollection) -> dict[str, dict[str, Any]]:
    """Return what the metrics have counted, in tensors and lists of them."""
    # copies, because metrics may count on in the same tensors
    return {name: {key: _copy(state) for key, state in metric.metric_state.items()} for name, metric in metrics.items()}


def remeasure(metrics: MetricCollection, states: dict[str, dict[str, Any]]) -> None:
    """Go on counting from there."""
    for name, metric in metrics.items():
        for key, state in states.get(name, {}).items():
            # copies again: the same standing may be taken up twice
            setattr(metric, key, _copy(state, metric.device))


def remeasure_share(
    metrics: MetricCollection, shares: Sequence[dict[str, dict[str, Any]]], rank: int, ranks: int
) -> list[str]:
    """Go on counting from what the ranks of another run have counted, however many they were.

    Each of the shares is taken up by one rank: by the same one where there are as many, else several by one, or none.

    Args:
        metrics: of this rank.
        shares: of the ranks of then.
        rank: of this process.
        ranks: how many there are now.

    Returns:
        The names of metrics whose counts cannot be put together, which begin anew.
    """
    own = list(shares[rank::ranks])
    remeasure(metrics, own[0] if own else {})
    unable = []
    for name, metric in metrics.items():
        try:
            for counted in (states[name] for states in own[1:] if name in states):
                metric.merge_state({key: _copy(state, metric.device) for key, state in counted.items()})
        except RuntimeError:  # torchmetrics, of one that says it cannot
            metric.reset()
            unable.append(name)
    return unable


def _copy(state: Tensor | list[Tensor], device: torch.device | None = None) -> Any:
    if isinstance(state, list):
        return [_copy(one, device) for one in state]
    return state.detach().clone().to(device or state.device)
