from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lit_dpo.callbacks.alone import alone
from lit_dpo.logps.fields import Field
from lit_dpo.memory import Lengths, StepMemory, estimate_step
from lit_dpo.policy.sharding import mesh_of

if TYPE_CHECKING:
    from lit_dpo.module import DPOModule


log = logging.getLogger(__name__)


class MemoryEstimate(pl.Callback):
    """Says before training what a step over the epoch's largest micro-batch needs, and on a GPU whether it is there.

    It needs the lengths of all pairs, which `PreferenceDataModule` knows; with other loaders it says nothing.
    """

    step: StepMemory | None = None
    """What was said last."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Print the estimate; warn if it will not fit."""
        largest = getattr(trainer.train_dataloader, "largest_microbatches", None)
        # over a sharded base every rank makes the probes, which are the same on all, and the first one says what it saw
        if largest is None or not (trainer.is_global_zero or mesh_of(pl_module.model)):
            return
        with alone("The estimate of a step's memory"):
            whole = pl_module.why_whole is not None
            limits = (math.inf, math.inf) if whole else (pl_module.microbatch_limit, pl_module.prompt_limit)
            parts, several = largest(*limits)
            step = estimate_step(
                pl_module.model,
                [Lengths.of(part) for part in parts],
                several=several,
                optimizer=pl_module.optimizer,
                with_kl=Field.KL in pl_module.loss.requires,
                context=trainer.precision_plugin.train_step_context,
            )
            self.step = step
            room = _room(pl_module.device)
            rank_zero_info(f"a step needs about {step}" + (f"; the device has {room / 2**30:.2f} GiB" if room else ""))
            if room and step.total > room:
                rank_zero_only(log.warning)(_remedy(step, room, pl_module, one_pair=max(map(len, parts)) == 1))


def _room(device: torch.device) -> int | None:
    """Bytes of a GPU that are free or already ours; None elsewhere."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _remedy(step: StepMemory, room: int, pl_module: DPOModule, one_pair: bool) -> str:
    again = "" if pl_module.policy.gradient_checkpointing else "set `--model.policy.gradient_checkpointing true`, or "
    pairs = (
        "`--data.max_tokens` (or `--data.batch_size`) or " if pl_module.why_whole else "`--model.microbatch_tokens` or "
    )
    return (
        f"A step will not fit: it needs about {step.total / 2**30:.2f} GiB and the device has {room / 2**30:.2f}; "
        f"{again}lower {'' if one_pair else pairs}`--data.max_length`."
    )
