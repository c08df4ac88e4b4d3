"""The checkpoints of a run, by their steps."""

from __future__ import annotations

from pathlib import Path

from lit_dpo.checkpoint import read_checkpoint
from lit_dpo.errors import LitDPOError


def checkpoints_of(run: Path) -> dict[int, Path]:
    """Find the checkpoints of a run in the order of its steps, one for each.

    Raises:
        LitDPOError: if there is none.
    """
    found: dict[int, Path] = {}
    here = [*run.glob("*.ckpt"), *run.glob("checkpoints/**/*.ckpt")]  # not those of an ablation within
    for file in sorted(file for file in here if file.is_file()):
        found.setdefault(int(read_checkpoint(file)["global_step"]), file)
    if not found:
        raise LitDPOError(
            f"Expected checkpoints in {run} but there are none. `ModelCheckpoint` keeps them: "
            "`--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.every_n_train_steps=50 "
            "--trainer.callbacks.save_top_k=-1`."
        )
    return dict(sorted(found.items()))
