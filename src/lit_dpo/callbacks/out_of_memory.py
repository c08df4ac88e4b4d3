from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.memory import garbage_collection_cuda

from lit_dpo.callbacks.memory import MemoryEstimate
from lit_dpo.checkpoint import random_state, restore_random_state
from lit_dpo.errors import TrainingError
from lit_dpo.memory.room import in_use, is_out_of_memory

if TYPE_CHECKING:
    from lit_dpo.data.batch import CompletionBatch
    from lit_dpo.module import DPOModule

    Cut = Callable[[], Sequence[CompletionBatch]]

Made = TypeVar("Made")
log = logging.getLogger(__name__)


class OutOfMemory(pl.Callback):
    """Explains why memory ran out, with the numbers; and, if that is asked for, goes on in smaller micro-batches.

    A batch that ran out is computed again from its start: with the random state that it began with, and before it was
    counted anywhere. So the run is the one that had the smaller `microbatch_tokens` from this step on, to the bit; and
    without dropout, up to rounding, the one that had it from the start. Checkpoints remember the size.

    Args:
        halvings: how many times `microbatch_tokens` may be halved, in training, validation, test or prediction. 0:
            the run stops.

    Raises:
        TrainingError: before weights load, for `halvings` on several ranks, which would have to agree.
    """

    def __init__(self, halvings: int = 0) -> None:
        if halvings < 0:
            raise TrainingError(f"Expected `halvings` >= 0 but got {halvings}.")
        self.halvings = halvings
        self._left = halvings
        self._smaller: int | None = None  # the size that was found

    def setup(self, trainer: pl.Trainer, pl_module: DPOModule, stage: str) -> None:
        """Stand ready for a batch that is too large."""
        if self.halvings and trainer.world_size > 1:
            raise TrainingError(
                f"Expected one process with `OutOfMemory(halvings={self.halvings})` but there are {trainer.world_size} "
                "ranks, which would wait for the one that begins a batch again: lower `--model.microbatch_tokens`."
            )
        self._left = self.halvings
        pl_module.passes.out_of_memory = self

    def again(self, pl_module: DPOModule, run: Callable[[], Made], cut: Cut) -> Made:
        """Run what takes memory; if that runs out, once more in smaller micro-batches.

        Args:
            pl_module: whose `microbatch_tokens` is lowered.
            run: computes from the beginning each time, and counts nothing.
            cut: gives the micro-batches as they would be now.
        """
        if not self.halvings:
            return run()
        begun, remembered = random_state(), pl_module.loss_state
        while True:
            try:
                return run()
            except Exception as error:
                if not (is_out_of_memory(error) and self._halve(pl_module, cut)):
                    raise
            # after the `except`, whose error keeps every tensor of the failed pass
            garbage_collection_cuda()
            restore_random_state([begun], 0)
            pl_module.loss_state = remembered

    def _halve(self, pl_module: DPOModule, cut: Cut) -> bool:
        """Lower the limit to half of what ran, if that makes anything smaller."""
        before, largest = pl_module.microbatch_tokens, _largest(cut())
        if not self._left or pl_module.why_whole is not None:
            return False
        pl_module.microbatch_tokens = largest // 2
        if _largest(cut()) >= largest:  # one prompt, which is not cut
            pl_module.microbatch_tokens = before
            return False
        self._left, self._smaller = self._left - 1, largest // 2
        log.warning(
            "out of memory after step %d, in a micro-batch of %d tokens: `microbatch_tokens` is %d from here on, and "
            "the batch is computed again. %s",
            pl_module.trainer.global_step,
            largest,
            largest // 2,
            in_use(pl_module.device),
        )
        return True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: DPOModule, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """Go on with the size that the checkpoint's run had found."""
        if self._smaller is not None and self._smaller != pl_module.microbatch_tokens:
            pl_module.microbatch_tokens = self._smaller
            log.warning(
                "going on with `microbatch_tokens` %d, as the run did after it ran out of memory", self._smaller
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the size, if it was lowered."""
        return {} if self._smaller is None else {"microbatch_tokens": self._smaller}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the size."""
        self._smaller = state_dict.get("microbatch_tokens") if self.halvings else None

    def explain(self, trainer: pl.Trainer, pl_module: DPOModule) -> str:
        """Say what was under way when memory ran out, what there is, and what takes less."""
        stage = "training" if trainer.training else str(trainer.state.stage and trainer.state.stage.value)
        estimates = [one.step for one in getattr(trainer, "callbacks", ()) if isinstance(one, MemoryEstimate)]
        lines = [f"Out of memory in {stage}, after step {trainer.global_step}.", in_use(pl_module.device)]
        whole = pl_module.model is not None and pl_module.why_whole is not None
        lines.append(
            "Batches run in one piece."
            if whole
            else f"Micro-batches have up to {pl_module.microbatch_limit:,} tokens (`microbatch_tokens`)."
        )
        if step := next(iter(estimates), None):
            lines.append(f"A training step needs about {step}.")
        size = "`--data.batch_size` or `--data.max_tokens`" if whole else "`--model.microbatch_tokens`"
        remedies = [f"lower {size} or `--data.max_length`"]
        if not pl_module.policy.gradient_checkpointing:
            remedies.append("set `--model.policy.gradient_checkpointing true`")
        if pl_module.policy.quantization == "none":
            remedies.append("hold the base in 4 bits, `--model.policy.quantization nf4`")
        if not (whole or self.halvings or trainer.world_size > 1):
            remedies.append(
                "let the run lower it itself: `--trainer.callbacks+=OutOfMemory --trainer.callbacks.halvings=1`"
            )
        return " ".join(one for one in lines if one) + f" What takes less: {'; '.join(remedies)}."


def _largest(parts: Sequence[CompletionBatch]) -> int:
    return max(part.input_ids.shape[1] for part in parts)
