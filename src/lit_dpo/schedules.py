"""How the learning rate goes on from step to step: by a name, or by any scheduler of PyTorch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from lit_dpo.errors import PolicyError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

ScheduleName: TypeAlias = Literal["linear", "cosine", "constant", "wsd"]
_DECAY_RATIO = 0.2


def check_schedule(
    lr_scheduler: Any, warmup_ratio: float, min_lr_ratio: float = 0.0, decay_ratio: float | None = None
) -> None:
    """See that the parts of a schedule go together; see `DPOModule` for what they mean.

    Raises:
        PolicyError: for a value outside its domain, or one that would have no effect.
    """
    if not 0 <= warmup_ratio <= 1:
        raise PolicyError(f"Expected `warmup_ratio` in [0, 1] but got {warmup_ratio}.")
    if not 0 <= min_lr_ratio < 1:
        raise PolicyError(f"Expected `min_lr_ratio` in [0, 1) but got {min_lr_ratio}.")
    if decay_ratio is not None and not 0 < decay_ratio <= 1 - warmup_ratio:
        raise PolicyError(f"Expected `decay_ratio` in (0, 1 - `warmup_ratio`] but got {decay_ratio}.")
    if isinstance(lr_scheduler, str):
        if lr_scheduler not in (known := get_args(ScheduleName)):
            raise PolicyError(
                f"Expected `lr_scheduler` among {', '.join(known)}, or a class, but got {lr_scheduler!r}."
            )
        if lr_scheduler == "constant" and min_lr_ratio:
            raise PolicyError("`min_lr_ratio` has no effect with `lr_scheduler` constant: leave it out.")
        if lr_scheduler != "wsd" and decay_ratio is not None:
            raise PolicyError(f"`decay_ratio` has no effect with `lr_scheduler` {lr_scheduler}: leave it out.")
    elif warmup_ratio or min_lr_ratio or decay_ratio is not None:
        raise PolicyError(
            "Expected no `warmup_ratio`, `min_lr_ratio` or `decay_ratio` with a scheduler of one's own, which says all "
            "of it: torch's `SequentialLR` puts a `LinearLR` before another one."
        )


def steps_of_run(trainer: pl.Trainer) -> float:
    """Optimizer steps of a whole run; infinite if nobody knows, as with streamed data and no `max_steps`."""
    if not trainer.limit_train_batches:
        return 0
    if getattr(getattr(trainer, "datamodule", None), "streaming", False) and not isinstance(
        trainer.limit_train_batches, int
    ):
        # Lightning would begin to read, before it knows where a run that goes on stands in its data
        steps: float = trainer.max_steps
    else:
        steps = trainer.estimated_stepping_batches
    return steps if steps >= 0 else math.inf


def make_schedule(
    optimizer: Optimizer,
    lr_scheduler: ScheduleName | Callable[[Optimizer], Any],
    steps: float,
    *,
    warmup_ratio: float = 0.0,
    min_lr_ratio: float = 0.0,
    decay_ratio: float | None = None,
) -> dict[str, Any] | None:
    """Make a scheduler, in the words of Lightning's `configure_optimizers`; None where the rate stays as it is.

    Args:
        optimizer: whose learning rate it is.
        lr_scheduler: a name, or what makes a scheduler from the optimizer.
        steps: optimizer steps of the whole run; infinite if nobody knows.
        warmup_ratio: part of the steps over which the rate rises from 0.
        min_lr_ratio: part of the rate that is left at the end.
        decay_ratio: part of the steps over which `wsd` falls. None: 0.2.

    Raises:
        TrainingError: for a name without an end, or a scheduler that reads a measure and does not say which.
    """
    if not isinstance(lr_scheduler, str):
        return _lightnings(lr_scheduler(optimizer))
    if lr_scheduler == "constant" and not warmup_ratio:
        return None
    if math.isinf(steps):
        raise TrainingError(
            "Expected `max_epochs` (with data of a known length) or `max_steps`: a falling rate, or a warm-up, needs "
            "to know the end. Or use `constant` without a warm-up."
        )
    return _lightnings(
        _transformers(optimizer, lr_scheduler, int(steps), warmup_ratio, min_lr_ratio, decay_ratio or _DECAY_RATIO)
    )


def _transformers(
    optimizer: Optimizer, name: ScheduleName, steps: int, warmup_ratio: float, min_lr_ratio: float, decay_ratio: float
) -> LRScheduler:
    from transformers import get_scheduler

    # transformers has a name of its own for each case
    asked: dict[str, Any] = {}
    theirs = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}.get(name, str(name))
    if name == "linear" and min_lr_ratio:
        theirs, asked = "polynomial", {"lr_end": min_lr_ratio * optimizer.defaults["lr"], "power": 1.0}
    if name == "cosine" and min_lr_ratio:
        theirs, asked = "cosine_with_min_lr", {"min_lr_rate": min_lr_ratio}
    if name == "wsd":
        asked = {
            "num_decay_steps": round(decay_ratio * steps),
            "min_lr_ratio": min_lr_ratio,
            "warmup_type": "linear",
            "decay_type": "linear",
        }
    made: LRScheduler = get_scheduler(
        theirs,
        optimizer,
        num_warmup_steps=round(warmup_ratio * steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=asked,
    )
    return made


def _lightnings(scheduler: Any) -> dict[str, Any]:
    """Have it step with the optimizer, but after validations where it reads a measure."""
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    if not isinstance(scheduler, ReduceLROnPlateau):
        return {"scheduler": scheduler, "interval": "step"}
    if (monitor := getattr(scheduler, "monitor", None)) is None:
        raise TrainingError(
            "Expected a scheduler that says what it reads but torch's ReduceLROnPlateau does not: use "
            "`lightning.pytorch.cli.ReduceLROnPlateau` with `monitor`, such as val/loss."
        )
    return {"scheduler": scheduler, "interval": "epoch", "monitor": monitor}
