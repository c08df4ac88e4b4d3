from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_dpo.callbacks.alone import alone
from lit_dpo.callbacks.completions import SampleCompletions
from lit_dpo.callbacks.export import callbacks_of
from lit_dpo.callbacks.findings import RULES, Finding, FirstPairs, History, PairsSeen, Rule
from lit_dpo.callbacks.health import TrainingHealth
from lit_dpo.errors import TrainingError
from lit_dpo.logps.fields import Field
from lit_dpo.policy.adapters import is_adapters

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lit_dpo.data.batch import CompletionBatch
    from lit_dpo.module import DPOModule


log = logging.getLogger(__name__)
warn = rank_zero_only(log.warning)

_FIRST = 64  # pairs that say how the policy comes
_KEPT = 4096  # pairs of an epoch that are looked at


class HealthMonitor(pl.Callback):
    """Says in a line, once each, when a run goes wrong: what was seen, why it matters and what to try.

    It reads what is measured anyway: no pass is made for it, and no step waits for the device because of it. What no
    run survives (nothing trains, gradients that are not finite) is the business of `TrainingHealth`.

    Args:
        rules: of one's own, besides the ones that are there (`lit_dpo.callbacks.findings`); one of the same class takes
            the place of ours, so that thresholds are its fields: `rules=[KLRunaway(limit=3.0)]`.
        ignore: names of rules that are left out.
        on_finding: `warn`, or `stop` with an error.
        patience: steps on end that something has to be seen in, so that one strange batch says nothing.

    Raises:
        TrainingError: for a name that no rule has, or a value outside its domain; with `on_finding="stop"` the first
            finding.
    """

    def __init__(
        self,
        rules: Sequence[Rule] = (),
        ignore: Sequence[str] = (),
        on_finding: Literal["warn", "stop"] = "warn",
        patience: int = 5,
    ) -> None:
        if on_finding not in ("warn", "stop"):
            raise TrainingError(f"Expected `on_finding` to be warn or stop but got {on_finding!r}.")
        if patience < 1:
            raise TrainingError(f"Expected `patience` >= 1 but got {patience}.")
        found = {type(rule).__name__: rule for rule in (*RULES, *rules)}
        if unknown := [name for name in ignore if name not in found]:
            raise TrainingError(f"Expected `ignore` to name rules, of {', '.join(found)}, but got {unknown[0]!r}.")
        self.rules = {name: rule for name, rule in found.items() if name not in ignore}
        self.on_finding, self.patience = on_finding, patience
        self.findings: dict[str, Finding] = {}
        """What was said, by the name of the rule."""
        self._resumed: dict[str, Any] = {}
        self._forget()

    def _forget(self) -> None:
        self.seen = History()
        self.seen.recent = type(self.seen.recent)(maxlen=self.patience)
        self._held: dict[str, int] = {}
        self._blind = False  # after something failed
        self._counted = 0  # first pairs whose numbers are asked for by now
        self._asked: list[Tensor] = []
        self._trained: dict[str, Tensor] = {}
        self._without: dict[str, int] = {}
        self._pairs: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": []}

    # ---- what a run is, and goes on from ----

    def state_dict(self) -> dict[str, Any]:
        """Where a run that goes on continues to look: what was said is not said again."""
        seen = self.seen
        return {
            "said": {name: tuple(finding) for name, finding in self.findings.items()},
            "start": dict(seen.start),
            "effort": seen.effort,
            "first": tuple(seen.first),
            "validations": [dict(row) for row in seen.validations],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._resumed = state_dict

    def on_fit_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Begin, or go on."""
        state, self._resumed = self._resumed, {}
        self._forget()
        self.findings = {name: Finding(*said) for name, said in state.get("said", {}).items()}
        seen, loss = self.seen, pl_module.loss
        seen.beta, seen.compared = getattr(loss, "beta", float("nan")), Field.REFERENCE in loss.requires
        seen.reference = type(pl_module.reference).__name__ + _named(getattr(pl_module.reference, "model", None))
        if state:
            seen.start, seen.effort, seen.first = state["start"], state["effort"], FirstPairs(*state["first"])
            seen.validations = list(state["validations"])
            self._counted = 0 if seen.first.pairs == 0 else _FIRST
        pl_module.asked.clear()

    def on_train_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Find adapters that are frozen at zero."""
        frozen = [
            (name, one) for name, one in pl_module.model.named_parameters() if _is_end(name) and not one.requires_grad
        ]
        if frozen:  # of the adapter that trains: a reference's stands under another name
            zero = torch.stack([one.any() for _, one in frozen]).logical_not().tolist()
            self.seen.dead = [name for (name, _), is_zero in zip(frozen, zero, strict=True) if is_zero]
        self._trained = {name: one for name, one in pl_module.model.named_parameters() if one.requires_grad}
        self._look(trainer, "once")

    # ---- what is seen ----

    def on_after_backward(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Ask for the first pairs, with what the step waits for anyway."""
        if self.seen.first.pairs >= _FIRST or pl_module.measured_batch is None:
            return
        self._safely(self._ask, pl_module)

    def _ask(self, pl_module: DPOModule) -> None:
        if self._counted < _FIRST:
            self._count_first(pl_module)
        if self._asked:
            pl_module.asked.update(_names(torch.stack(self._asked).sum(0)))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: DPOModule, optimizer: Optimizer) -> None:
        """Look for gradients that are not there, which costs no look at the device."""
        if all(one.grad is None for one in self._trained.values()):  # a step that is left out
            return
        for name, one in self._trained.items():
            self._without[name] = self._without.get(name, 0) + 1 if one.grad is None else 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DPOModule, outputs: object, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """Take in what the step measured, and look."""
        self._safely(self._keep, "train", pl_module)
        self._safely(self._take_first, pl_module)
        if trainer.global_step == self.seen.step:
            return
        self._safely(self._take_step, trainer)
        self._look(trainer, "once")
        self._look(trainer, "step")

    def _take_step(self, trainer: pl.Trainer) -> None:
        """Take in what an optimizer step showed."""
        seen = self.seen
        seen.step = trainer.global_step
        rates = [(group["lr"], group.get("initial_lr", group["lr"]))
                 for optimizer in trainer.optimizers for group in optimizer.param_groups]  # fmt: skip
        seen.rate, largest = max(rates)
        seen.effort += min(1.0, seen.rate / largest) if largest > 0 else 0.0
        seen.skipped = max((one.skipped for one in callbacks_of(trainer) if isinstance(one, TrainingHealth)), default=0)
        without = [name for name, count in self._without.items() if count >= self.patience]
        seen.dead = seen.dead or without
        measured = _measured(trainer, "train/")
        if measured:
            seen.start = seen.start or measured
            seen.recent.append(measured)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: DPOModule,
        outputs: object,
        batch: CompletionBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep margins; before training, the policy is as it comes."""
        if trainer.state.fn != "fit":
            return
        self._safely(self._keep, "val", pl_module)
        if trainer.sanity_checking and self._counted < _FIRST:
            self._safely(self._count_first, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Look at the validation; the one before training is of a few batches only."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            self._pairs["val"].clear()
            return
        self._safely(self._take_validation, trainer)
        self._look(trainer, "pairs")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Look at the epoch's pairs, unless there are held-out ones."""
        if self.seen.validations:
            self._pairs["train"].clear()
        else:
            self._safely(self._take_pairs, "train")
        self._look(trainer, "pairs")

    def _keep(self, stage: str, pl_module: DPOModule) -> None:
        """Keep a batch's margins on the device, for the end of the epoch."""
        if (batch := pl_module.measured_batch) is None:
            return
        kept = self._pairs[stage]
        longer = batch.pairs.policy_chosen.length - batch.pairs.policy_rejected.length
        kept.append((batch.chosen_rewards - batch.rejected_rewards, longer))
        while sum(len(margins) for margins, _ in kept) > _KEPT:
            del kept[0]

    def _take_validation(self, trainer: pl.Trainer) -> None:
        self.seen.validations.append(_measured(trainer, "val/"))
        self._take_pairs("val")
        self.seen.validated = len(self.seen.pairs.margins) if self.seen.pairs else 0

    def _take_pairs(self, stage: str) -> None:
        kept = self._pairs[stage]
        if kept:
            together = torch.stack([torch.cat([one.double() for one in side]) for side in zip(*kept, strict=True)])
            margins, longer = together.cpu().numpy()  # one copy
            finite = np.isfinite(margins)
            self.seen.pairs = PairsSeen(margins[finite], longer[finite])
        kept.clear()

    def _count_first(self, pl_module: DPOModule) -> None:
        if pl_module.measured_batch is None:  # a step of one's own
            return
        pairs = pl_module.measured_batch.pairs
        chosen, rejected = pairs.policy_chosen, pairs.policy_rejected
        near = (chosen.total - rejected.total).abs() <= 1e-5 * chosen.total.abs()
        counts = [chosen.mean < rejected.mean, near & (chosen.length == rejected.length)]
        self._asked.append(torch.stack([torch.ones_like(counts[0]), *counts]).sum(1).double())
        self._counted += len(chosen.total)

    def _take_first(self, pl_module: DPOModule) -> None:
        """Take what the step has fetched of the first pairs."""
        found = [pl_module.asked.pop(name, None) for name in FirstPairs._fields]
        if all(one is not None and one.device.type == "cpu" for one in found):
            self.seen.first = FirstPairs(*(int(one) for one in found if one is not None))

    def _safely(self, look: Callable[..., None], *given: Any) -> None:
        """Look, and if that fails, look no more: in one line, which costs nothing that is trained."""
        if self._blind:
            return
        self._blind = True
        with alone("HealthMonitor"):
            look(*given)
            self._blind = False

    # ---- what is said ----

    def _look(self, trainer: pl.Trainer, when: str) -> None:
        """Ask the rules; a rule that fails, fails alone."""
        if sampled := next((one for one in callbacks_of(trainer) if isinstance(one, SampleCompletions)), None):
            self.seen.lengths = sampled.lengths
        for name, rule in self.rules.items():
            if rule.when != when or name in self.findings:
                continue
            finding = None
            with alone(f"The rule {name}"):
                finding = rule(self.seen)
            self._held[name] = self._held.get(name, 0) + 1 if finding else 0
            if finding and self._held[name] >= (self.patience if when == "step" else 1):
                self._say(name, finding)

    def _say(self, name: str, finding: Finding) -> None:
        self.findings[name] = finding
        if self.on_finding == "stop":
            raise TrainingError(f"{name} at step {self.seen.step}: {finding} What was saved before is as it was.")
        warn(f"{name} at step {self.seen.step}: {finding}")


def _named(model: str | None) -> str:
    return f" {model}" if model else ""


def _is_end(name: str) -> bool:
    """Whether it is the part of the policy's adapter that begins at zero."""
    return is_adapters(name) and "lora_B" in name and ".default" in name


def _names(counts: Tensor) -> dict[str, Tensor]:
    return dict(zip(FirstPairs._fields, counts.unbind(), strict=True))


def _measured(trainer: pl.Trainer, prefix: str) -> dict[str, float]:
    """Measures by name, without where they were measured. They are on the CPU: nothing waits."""
    found = trainer.callback_metrics
    return {name[len(prefix) :]: float(value) for name, value in found.items() if name.startswith(prefix)}
