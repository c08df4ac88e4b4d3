from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lit_dpo.callbacks.export import data_of
from lit_dpo.callbacks.steps import fetch
from lit_dpo.checkpoint import remeasure
from lit_dpo.errors import TrainingError
from lit_dpo.metrics.preference import on_host
from lit_dpo.policy.adapters import is_adapters
from lit_dpo.schedules import steps_of_run

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lit_dpo.data.batch import CompletionBatch
    from lit_dpo.logps.records import PairLogps
    from lit_dpo.module import DPOModule


log = logging.getLogger(__name__)
warn = rank_zero_only(log.warning)

_PATIENCE = 10  # steps without any gradient before the run counts as stuck


class TrainingHealth(pl.Callback):
    """Stops a run that would train nothing, or something else than what was asked for.

    At the start: only adapters train, in float32, and the optimizer has them all. At step 0: policy and reference are
    the same, so that every reward is 0 and the loss is its value at margin 0. After the first step that had a gradient
    and a learning rate: every `lora_B` moved. Before each step: gradients are finite.

    Args:
        nonfinite: what happens where they are not: `stop` names the rows; `skip` leaves the step out, and says so.

    Raises:
        TrainingError: naming the tensors, or the policy and the reference.
    """

    def __init__(self, nonfinite: Literal["stop", "skip"] = "stop") -> None:
        if nonfinite not in ("stop", "skip"):
            raise TrainingError(f"Expected `nonfinite` to be stop or skip but got {nonfinite!r}.")
        self.nonfinite = nonfinite
        self._before: dict[str, Tensor] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Check what trains."""
        if pl_module.model is None:
            raise TrainingError("Expected `configure_model` to load the policy: call `super().configure_model()`.")
        trainable = {name: p for name, p in pl_module.model.named_parameters() if p.requires_grad}
        if not trainable:
            raise TrainingError("Expected trainable adapters but no parameter of the policy requires gradients.")
        if strange := [name for name in trainable if not is_adapters(name)]:
            raise TrainingError(f"Expected only adapters to train but these do too: {', '.join(strange[:5])}.")
        if low := [name for name, p in trainable.items() if p.dtype != torch.float32]:
            raise TrainingError(
                f"Expected float32 adapters but {low[0]} is {trainable[low[0]].dtype}: small learning rates would not "
                "move it. Use precision bf16-mixed, or leave the dtype to the policy."
            )
        known = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        if missing := [name for name, p in trainable.items() if id(p) not in known]:
            raise TrainingError(
                "Expected the optimizer of `configure_optimizers` to have every adapter but not "
                f"{', '.join(missing[:5])}."
            )
        if all(optimizer.defaults.get("lr") == 0 for optimizer in trainer.optimizers):
            raise TrainingError("Expected a learning rate > 0 but got 0, with which nothing trains.")
        every, steps = getattr(pl_module.reference, "every", 1), steps_of_run(trainer)
        if pl_module.reference.follows_policy and every > steps:
            raise TrainingError(
                f"{pl_module.reference} moves every {every} steps but the run has {steps:.0f}: it would never move. "
                "Lower `reference.every`."
            )
        self._before = {name: p.detach().clone() for name, p in trainable.items() if "lora_B" in name}
        self._steps = self._seen = self.skipped = 0
        self._start: int | None = trainer.global_step
        self._rates = [one.scheduler.last_epoch for one in _stepped(trainer)]
        _check_zero_grad(trainer, pl_module, next(iter(trainable.values())))

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: DPOModule, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """Compare policy and reference before a fresh policy's first step."""
        if not pl_module.fresh or not pl_module.reference.starts_at_policy:
            return
        with trainer.precision_plugin.train_step_context():
            pairs = pl_module.batch_logps(batch)
        if pairs.reference_chosen is None or pairs.reference_rejected is None or not batch.size:
            return
        furthest = torch.cat([pairs.chosen_logratio / pairs.policy_chosen.length,
                              pairs.rejected_logratio / pairs.policy_rejected.length]).abs().max()  # fmt: skip
        loss = pl_module.losses_of(pairs).mean()
        at_zero = pl_module.losses_of(_at_the_policy(pairs)).mean()
        furthest, loss, at_zero = on_host({"furthest": furthest, "loss": loss, "at zero": at_zero}).values()
        # 16 bits may round the two passes differently; adapters that do nothing yet still round their input
        exact = pl_module.model.get_base_model().dtype == torch.float32 and "32" in str(trainer.precision)
        off = abs(float(loss - at_zero)) / max(1.0, abs(float(at_zero)))
        if not (furthest <= (1e-4 if exact else 5e-2) and off <= 0.05):  # NaN too
            raise TrainingError(
                f"Expected policy and reference to be the same before the first step but their log-probs differ by up "
                f"to {furthest:.3g} nats per token (loss {float(loss):.4f}, at margin 0 {float(at_zero):.4f}).\n"
                f"  policy: {pl_module.policy}\n  reference: {pl_module.reference}\n"
                "A policy that continues an adapter is compared with that adapter (AdapterReference)."
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Say if a policy was measured against itself."""
        _say_if_the_same(trainer, pl_module, "val/")

    def on_test_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Say if a policy was measured against itself."""
        _say_if_the_same(trainer, pl_module, "test/")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: DPOModule, optimizer: Optimizer) -> None:
        """Count the steps that can move something: a warm-up begins at 0."""
        if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            raise TrainingError(
                "Expected gradients before an optimizer step but there are none: a `training_step` or `backward` of "
                f"{type(pl_module).__name__} returns without them."
            )
        self._check_finite(trainer, pl_module, optimizer)
        if self._before is not None and any(group["lr"] > 0 for group in optimizer.param_groups):
            self._steps += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DPOModule, outputs: object, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """There was a first step; after the first one that counts, every `lora_B` has moved."""
        self._check_first_step(trainer, pl_module, batch, batch_idx)
        if self._before is None or self._steps == self._seen:
            return
        self._seen = self._steps
        now = {name: p.detach() for name, p in pl_module.model.named_parameters() if name in self._before}
        moved = on_host({name: (before != now[name]).any() for name, before in self._before.items()})
        still = [name for name, any_moved in moved.items() if not any_moved]
        if len(still) < len(self._before) and still:
            raise TrainingError(
                f"{len(still)} of {len(now)} adapters did not move in the first steps: {', '.join(still[:3])}. "
                "Something cuts their gradient; leave them out of `target_modules` if that is how it should be."
            )
        if not still:
            self._before = None
        elif self._steps >= _PATIENCE:
            raise TrainingError(
                f"No adapter moved in {self._steps} steps: learning rate "
                f"{[group['lr'] for optimizer in trainer.optimizers for group in optimizer.param_groups]}, "
                f"loss {outputs}. Are chosen and rejected the same?"
            )

    def _check_finite(self, trainer: pl.Trainer, pl_module: DPOModule, optimizer: Optimizer) -> None:
        """Stop, or skip, a step with a gradient that is not finite: it would leave nothing that is."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if fetch(pl_module, torch.stack([gradient.sum() for gradient in gradients]).isfinite().all()):
            return
        if getattr(trainer.precision_plugin, "scaler", None) is not None and not pl_module.window.nonfinite():
            return  # float16: the scaler skips the step, and takes a smaller scale
        where = _places(trainer, pl_module.window.nonfinite() or pl_module.window.indices())
        what = "loss" if pl_module.window.nonfinite() else "gradient"
        if what == "gradient" and trainer.world_size > 1:
            where = f"{where}, or from rows of another rank, which then names them"
        if self.nonfinite == "stop":
            raise TrainingError(
                f"The {what} of step {trainer.global_step + 1} is not finite, from {where}. Look at these rows, lower "
                "the learning rate, or leave such steps out: `TrainingHealth(nonfinite='skip')`. What was saved before "
                "is as it was."
            )
        self.skipped += 1
        warn(
            f"step {trainer.global_step + 1} is left out, {self.skipped} by now: its {what} is not finite, from {where}"
        )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        there = pl_module.standing
        assert there is not None  # by the callback of the steps
        if there.loss_state is not None and pl_module.loss_state is not None:
            pl_module.loss_state.copy_(there.loss_state)
        pl_module.train_metrics.reset()
        remeasure(pl_module.train_metrics, there.measured)
        pl_module.unlogged, pl_module.fetched = bool(there.measured), None

    def _check_first_step(
        self, trainer: pl.Trainer, pl_module: DPOModule, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """See that no hook returns nothing where it must return something, and leaves it undone without a word."""
        if self._start is None:
            return
        if trainer.global_step == self._start:
            if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
                hooks = "`optimizer_step`"
                if batch is None:
                    hooks = "`on_before_batch_transfer`, `transfer_batch_to_device` or `on_after_batch_transfer`"
                raise TrainingError(f"Expected an optimizer step but {hooks} of {type(pl_module).__name__} made none.")
            return
        self._start = None
        if any(one.scheduler.last_epoch == rate for one, rate in zip(_stepped(trainer), self._rates, strict=False)):
            raise TrainingError(
                f"Expected a scheduler that moves after a step but `lr_scheduler_step` of {type(pl_module).__name__} "
                "does not call its `step`."
            )


def _places(trainer: pl.Trainer, indices: list[int]) -> str:
    """Where rows of the data set are, as far as the data can say."""
    if not indices:
        return "a batch of a `training_step` of one's own"
    shown = indices[:5]
    if hasattr(data := data_of(trainer), "place"):
        places = [data.place("train", row) for row in shown]
    else:
        places = [f"row {row}" for row in shown]
    return "; ".join(places) + (f" and {len(indices) - 5} more" if len(indices) > 5 else "")


def _stepped(trainer: pl.Trainer) -> list[Any]:
    """Schedulers that move after every optimizer step."""
    return [one for one in trainer.lr_scheduler_configs if (one.interval, one.frequency) == ("step", 1)
            and not one.reduce_on_plateau]  # fmt: skip


def _at_the_policy(pairs: PairLogps) -> PairLogps:
    """As if the reference were the policy."""
    lists = pairs.completions and pairs.completions._replace(reference=pairs.completions.policy)
    return pairs._replace(
        reference_chosen=pairs.policy_chosen, reference_rejected=pairs.policy_rejected, completions=lists
    )


def _check_zero_grad(trainer: pl.Trainer, pl_module: DPOModule, parameter: Tensor) -> None:
    """See that a step does not begin with the gradients of the last one."""
    if not is_overridden("optimizer_zero_grad", pl_module) or parameter.grad is not None:
        return
    parameter.grad = torch.ones_like(parameter)
    pl_module.optimizer_zero_grad(trainer.current_epoch, 0, trainer.optimizers[0])
    kept = parameter.grad is not None and bool(parameter.grad.any())
    parameter.grad = None
    if kept:
        raise TrainingError(
            f"Expected `optimizer_zero_grad` of {type(pl_module).__name__} to clear gradients but it keeps them."
        )


def _say_if_the_same(trainer: pl.Trainer, pl_module: DPOModule, prefix: str) -> None:
    """Say that a policy is its own reference, or that nothing was loaded into it: all it gets is 0.5."""
    rewards = [trainer.callback_metrics.get(f"{prefix}{side}_reward") for side in ("chosen", "rejected")]
    if trainer.state.fn != "fit" and not any(reward is None or reward != 0 for reward in rewards):
        say_it_is_the_same(trainer, pl_module)


def say_it_is_the_same(trainer: pl.Trainer, pl_module: DPOModule) -> None:
    """Every reward was exactly 0: that is no result, but a policy that is its own reference."""
    remedy = "give `--ckpt_path` a checkpoint of a run"
    if pl_module.policy.starts_from_adapter:
        remedy = "to compare the adapter with its base, say `--model.reference BaseReference`"
    assert trainer.state.fn is not None
    warn(
        f"{trainer.state.fn.value}: policy and reference ({pl_module.reference}) are the same, so that every reward is "
        f"0 and the accuracy says nothing: {remedy}."
    )
