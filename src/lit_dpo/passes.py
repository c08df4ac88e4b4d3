"""How a batch of any size is run: in micro-batches, in one pass or in two, and together with the other ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_dpo.checkpoint import random_state, restore_random_state
from lit_dpo.errors import TrainingError
from lit_dpo.logps.coupling import Others, meet, nothing_of
from lit_dpo.logps.fields import Field
from lit_dpo.logps.microbatch import GradientSum, concatenate, cut_off, differentiable, join, microbatches, shares
from lit_dpo.logps.records import CompletionLogps, PairLogps, SequenceLogps
from lit_dpo.logps.score import FrozenStates, frozen_logps
from lit_dpo.policy.symmetry import agreed, idle
from lit_dpo.window import MeasuredBatch

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torchmetrics import MetricCollection

    from lit_dpo.callbacks.out_of_memory import OutOfMemory
    from lit_dpo.data.batch import CompletionBatch
    from lit_dpo.module import DPOModule

    Batch = CompletionBatch

Made = TypeVar("Made")


def trainer_of(module: DPOModule) -> pl.Trainer | None:
    """Return a module's trainer, or None where there is none, or Fabric's."""
    with suppress(RuntimeError):
        return module.trainer if module.fabric is None else None
    return None


def overrides(module: DPOModule, *names: str) -> bool:
    """Say whether one of these methods is a subclass's own."""
    return any(not getattr(type(module), name).__module__.startswith("lit_dpo.") for name in names)


def may_couple(module: DPOModule, *names: str) -> bool:
    """Say whether one of these methods is a subclass's own, which has not said that it takes pairs one by one."""
    return overrides(module, *names) if module.couples_pairs is None else module.couples_pairs


class BatchPasses:
    """Runs a module's batches, of any size.

    A batch is cut into micro-batches. Where each prompt's losses are its own, their gradients add up in one pass. Else
    there are two: all log-probs without a graph, the losses and their gradients with respect to these, and then each
    micro-batch again, under the dropout masks that it had. A loss that couples pairs sees those of all ranks.

    Args:
        module: whose template methods are called.
    """

    def __init__(self, module: DPOModule) -> None:
        self.module = module
        self.frozen: FrozenStates | None = None  # of the reference, while `forward` runs
        self.others: Others | None = None  # the other ranks' records of this batch, for a loss that couples pairs
        self.out_of_memory: OutOfMemory | None = None  # begins a batch again that was too large
        self._draws: list[dict[str, Any]] | None = None  # random states before each `forward`, while they are noted
        self._said_whole = False

    # ---- a batch ----

    def step(self, batch: Batch, *measured: MetricCollection, training: bool = False) -> tuple[Tensor, Tensor]:
        """Measure a batch; the sum of its losses, and the losses."""
        if not batch.size:
            return self._without(batch, training=training)
        if training:
            total, losses, seen = self._again(lambda: self._train(batch), batch)
        else:
            seen = self.measure(batch).detach()
            every, losses = self._losses_over_ranks(seen)
            total = self._total(every, losses)
        found = MeasuredBatch(seen, losses.detach(), *self.module.loss.rewards(seen))
        self.module.measured_batch = found
        measures = {**found._asdict(), "parts": self._parts_of_losses(seen)}
        for collection in measured:
            collection.update(**measures)
        return total, losses

    def measure(self, batch: Batch) -> PairLogps:
        """`pair_logps` of a batch, without gradients and dropout, one micro-batch at a time."""
        return self._again(lambda: self._measure(batch), batch)

    def _measure(self, batch: Batch) -> PairLogps:
        model = self.module.model
        training = model.training
        if training:
            model.eval()
        try:
            with torch.no_grad():
                # a loss that couples pairs is no reason here: it sees the joined record
                whole = may_couple(self.module, "forward", "completion_logps", "pair_logps")
                parts = [batch] if whole else self.cut(batch)
                others = idle(model, parts)
                record = self._record(parts, batch)
                self.score_for_nothing(others)
                return record
        finally:
            if training:
                model.train()

    def _again(self, run: Callable[[], Made], batch: Batch) -> Made:
        """Run what takes the memory of a batch; where it runs out, `OutOfMemory` may run it again in smaller pieces."""
        if self.out_of_memory is None:
            return run()
        return self.out_of_memory.again(self.module, run, lambda: self.cut(batch))

    def _train(self, batch: Batch) -> tuple[Tensor, Tensor, PairLogps]:
        """Return the sum of a batch's losses, to run backward from, the losses and the record."""
        module = self.module
        if agreed(module.model, len(parts := self._microbatches(batch))) > 1:
            return self.accumulate(parts, batch)
        pairs = self.remember(module.pair_logps(batch))
        every, losses = self._losses_over_ranks(pairs)
        if not (self.out_of_memory and self.out_of_memory.halvings) or module.why_whole is not None:
            return self._total(every, losses), losses, pairs.detach()
        sums = self._gradient_sum()  # the backward pass too happens here, where it can be begun again
        sums.add(every, own=losses)
        return sums.total(), sums.losses, pairs.detach()

    # ---- its micro-batches ----

    def cut(self, batch: Batch) -> list[Batch]:
        """Cut a batch into what runs at once; pairs that a subclass makes are of whole prompts."""
        if overrides(self.module, "pair_logps"):
            return batch.cut(self.module.microbatch_limit)
        return microbatches(batch, self.module.microbatch_limit, self.module.prompt_limit)

    def _microbatches(self, batch: Batch) -> list[Batch]:
        """Cut a training batch; or leave it whole where it must be, in a line that says so once."""
        parts = self.cut(batch)
        if len(parts) == 1 or (reason := self.module.why_whole) is None:
            return parts
        if not self._said_whole:
            rank_zero_info(f"training batches run in one piece, whatever `microbatch_tokens` is: {reason}")
            self._said_whole = True
        return [batch]

    def accumulate(self, parts: Sequence[Batch], batch: Batch | None = None) -> tuple[Tensor, Tensor, PairLogps]:
        """Return the sum of a batch's losses, to run backward from, the losses and the record.

        Args:
            parts: micro-batches.
            batch: of which they are. Needed where a prompt is in several of them.
        """
        module, records = self.module, []
        sums = self._gradient_sum()
        others = idle(module.model, parts)
        if agreed(module.model, module.needs_two_passes or not all(part.size for part in parts)):
            return self.in_two_passes(parts, batch, sums, others)
        for part in parts:
            pairs = module.pair_logps(part)
            sums.add(module.losses_of(pairs))
            records.append(pairs.detach())
            del pairs  # or it stays until the next one is there
        for part in others:
            pairs = module.pair_logps(part)
            sums.leave([pairs.policy_chosen.total, pairs.policy_rejected.total])
            del pairs
        return sums.total(), sums.losses, join(records)

    def in_two_passes(
        self, parts: Sequence[Batch], batch: Batch | None, sums: GradientSum, others: Sequence[Batch] = ()
    ) -> tuple[Tensor, Tensor, PairLogps]:
        """Know all log-probs before any gradient: for losses that look at several prompts, or at one that is in parts.

        Args:
            parts: micro-batches.
            batch: of which they are.
            sums: where gradients add up.
            others: micro-batches whose passes are made for nothing; see `lit_dpo.policy.symmetry`.

        Returns:
            The sum of this rank's losses, to run backward from, these losses, and the record.
        """
        with torch.no_grad():
            record, draws = self._noted(parts, batch, others)
        assert record.completions is not None
        leaves = cut_off(record.completions)
        losses, own = self._losses_over_ranks(leaves.record.pairs(record.columns, record.state))
        sums.add(losses, leaves.tensors, own)
        after = random_state()
        for part, draw, gradients in zip(parts, draws, shares(sums.of_leaves, parts), strict=True):
            restore_random_state([draw], 0)
            logps = self._second_pass(part)
            sums.follow(differentiable(logps), gradients)
            del logps  # or they stay until the next ones are there
        for part in others:
            sums.leave(differentiable(self._second_pass(part)))
        restore_random_state([after], 0)
        return sums.total(), sums.losses, record

    def _noted(
        self, parts: Sequence[Batch], batch: Batch | None, others: Sequence[Batch]
    ) -> tuple[PairLogps, list[dict[str, Any]]]:
        """Score the parts of a training batch, and note the random state before each."""
        draws: list[dict[str, Any]] = []
        self._draws = draws
        try:
            record = self._record(parts, batch)
        finally:
            self._draws = None
        self.score_for_nothing(others)
        return self.remember(record), draws

    def note_draw(self) -> None:
        """Note the random state before the policy runs, if the first of two passes is made."""
        if self._draws is not None:
            self._draws.append(random_state())

    def _record(self, parts: Sequence[Batch], batch: Batch | None) -> PairLogps:
        """Score the parts of a batch, and put them together; parts of a prompt compare nothing, the batch does."""
        module = self.module
        if all(part.size for part in parts):
            return join([module.pair_logps(part) for part in parts])
        if batch is None:
            raise TrainingError("Expected the batch of these parts, since a prompt is in several, but got none.")
        scored = [module.completion_logps(part) for part in parts]
        policy, reference = (concatenate([one[side] for one in scored]) for side in (0, 1))
        return CompletionLogps.of(batch, policy, reference).pairs(batch.columns, module.loss_state)

    def score_for_nothing(self, parts: Sequence[Batch]) -> None:
        """Run the passes of a record for nothing: see `lit_dpo.policy.symmetry`."""
        for part in parts:
            if part.size:
                self.module.pair_logps(part)
            else:  # of a part of a prompt
                self.module.completion_logps(part)

    def _gradient_sum(self) -> GradientSum:
        module, trainer = self.module, trainer_of(self.module)
        scaler = getattr(trainer.precision_plugin, "scaler", None) if trainer is not None else None
        trained = [p for p in module.parameters() if p.requires_grad]
        # not `get_scale`, which waits for the device
        return GradientSum(trained, scaler.scale(torch.ones((), device=module.device)) if scaler else 1.0)

    # ---- log-probs ----

    def policy_logps(self, batch: Batch, frozen: FrozenStates | None) -> SequenceLogps:
        """Log-probs by `forward`, which compares with the reference's states where the loss asks for it."""
        self.frozen = frozen
        try:
            scored = self.module(batch)
        finally:
            self.frozen = None
        count = len(batch.completion_lengths)
        if not isinstance(scored, SequenceLogps) or scored.total.shape != (count,):
            raise TrainingError(
                f"Expected `forward` to return `SequenceLogps` of the batch's {count} completions, in their order, but "
                f"{type(self.module).__name__} gave {scored!r}."
            )
        return scored

    def reference_logps(self, batch: Batch) -> tuple[FrozenStates | None, SequenceLogps | None]:
        """Hidden states of the reference, for a loss that reads how far whole distributions diverge, and log-probs."""
        module = self.module
        if Field.KL in module.loss.requires:
            return frozen_logps(module.model, batch, module.reference.activated)
        return None, module.reference.logps(module.model, batch)

    def _second_pass(self, part: Batch) -> SequenceLogps:
        frozen = self.reference_logps(part)[0] if Field.KL in self.module.loss.requires else None
        return self.policy_logps(part, frozen)

    # ---- over ranks ----

    def remember(self, pairs: PairLogps) -> PairLogps:
        """Let a loss with a memory see a training batch, on all ranks together, before that batch's losses read it."""
        module = self.module
        if module.loss_state is None:
            return pairs
        # a loss of one's own may not take a mean of no pairs
        there = len(pairs.policy_chosen.total)
        mine = module.loss.sums(pairs.detach()) if there else torch.zeros_like(module.loss_state)
        added = module.trainer.strategy.reduce(mine, reduce_op="sum")
        module.loss_state = module.loss.next_state(module.loss_state, added)
        return pairs._replace(state=module.loss_state)

    def losses_among(self, pairs: PairLogps) -> Tensor:
        """`losses_of` the pairs of all ranks, of which others are without gradients; or of these, if none couple."""
        return self.module.losses_of(pairs if self.others is None else self.others.around(pairs))

    def _losses_over_ranks(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """All losses that depend on these pairs, and these pairs' own; ranks exchange records if the loss couples."""
        self._exchange(pairs)
        losses = self.losses_among(pairs)
        return losses, losses if self.others is None else self.others.own(losses, pairs)

    def _exchange(self, pairs: PairLogps) -> None:
        trainer = trainer_of(self.module)
        several = trainer is not None and int(trainer.world_size) > 1
        self.others = meet(pairs) if self.module.loss.couples_pairs and several else None

    def _total(self, every: Tensor, own: Tensor) -> Tensor:
        """Sum this rank's losses, with the gradient of what its pairs do to the losses of all."""
        total = own.sum()
        return total if self.others is None else every.sum() + (total - every.sum()).detach()

    def _parts_of_losses(self, pairs: PairLogps) -> dict[str, Tensor]:
        """Parts of a composed loss, of this rank's pairs."""
        if self.others is None:
            return self.module.loss.parts(pairs)
        found = self.module.loss.parts(self.others.around(pairs))
        return {name: self.others.own(values, pairs) for name, values in found.items()}

    # ---- without a share of a batch ----

    def _without(self, batch: Batch, *, training: bool) -> tuple[Tensor, Tensor]:
        """Make the passes, and wait for the other ranks, where this one has no share of a batch: see `Uncounted`."""
        if training and agreed(self.module.model, 1) > 1:
            return self._passes_without(batch)
        pairs = self.module.pair_logps(batch) if training else self.measure(batch)
        nothing = self._counted_nothing(pairs, training=training)
        chosen, rejected = pairs.policy_chosen.total, pairs.policy_rejected.total
        return chosen.sum() + rejected.sum(), nothing  # 0, whose gradients are 0

    def _passes_without(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Make the passes of `accumulate`, all of them for nothing: over a sharded base other ranks wait for them."""
        parts, sums = [batch, *idle(self.module.model, [batch])], self._gradient_sum()
        twice = agreed(self.module.model, self.module.needs_two_passes)
        with torch.set_grad_enabled(not twice):
            for part in parts:
                pairs = self.module.pair_logps(part)
                if not twice:
                    sums.leave([pairs.policy_chosen.total, pairs.policy_rejected.total])
        nothing = self._counted_nothing(pairs, training=True)
        for part in parts if twice else ():
            sums.leave(differentiable(self._second_pass(part)))
        return sums.total(), nothing

    def _counted_nothing(self, pairs: PairLogps, *, training: bool) -> Tensor:
        """Wait for the other ranks with a record and losses of no pairs."""
        nothing = nothing_of(pairs.detach())
        if training:
            nothing = self.remember(nothing)
        self._exchange(nothing)
        losses = nothing.policy_chosen.total
        self.module.measured_batch = MeasuredBatch(nothing, losses, losses, losses)
        return losses
