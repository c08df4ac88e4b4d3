from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lit_dpo.callbacks.export import tokenizer_of
from lit_dpo.checkpoint import (
    KEY,
    AdapterCheckpointIO,
    check_belongs,
    configuration,
    describe,
    random_states,
    restore_random_state,
    save_adapter,
)
from lit_dpo.requirements import check_run


class ExactResume(pl.Callback):
    """What makes a checkpoint continue its run, or say why it does not.

    Before weights load: what the checkpoints will say of the run is worked out, so that it cannot fail later. In each
    file: what its adapters belong to, the random states of all ranks, and the arguments that build the module again; a
    PEFT directory is beside it. On loading: all of it is compared, and random states go on before the first batch.

    None of it is in a hook of the module, which is the user's to override.

    Raises:
        PolicyError, DataError, TrainingError: before weights load, for a run that cannot work.
        ResumeError: on loading a file that belongs to another run.
    """

    def __init__(self) -> None:
        self._random_states: list[dict[str, Any]] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Know what the run is before weights load, and put it into every file."""
        if not pl_module.checked:  # another rank, or another `prepare_data`
            check_run(pl_module, trainer)
        pl_module.checked = False
        self._random_states = None
        # hyper-parameters in builtins, so that loggers and checkpoints take them as they are
        pl_module._set_hparams(configuration(pl_module))
        pl_module._hparams_initial = copy.deepcopy(pl_module._hparams)
        belongs = describe(pl_module)

        def on_save(checkpoint: dict[str, Any]) -> None:
            checkpoint[KEY] = belongs

        def on_load(checkpoint: dict[str, Any]) -> None:
            check_belongs(checkpoint, belongs, training=stage == "fit")

        def beside(checkpoint: dict[str, Any], directory: Path) -> None:
            save_adapter(pl_module.model, tokenizer_of(trainer), directory, checkpoint["state_dict"])

        strategy = trainer.strategy
        inner = strategy.checkpoint_io
        inner = inner.inner if isinstance(inner, AdapterCheckpointIO) else inner
        strategy.checkpoint_io = AdapterCheckpointIO(inner, on_save, on_load, beside)
        if any(isinstance(one, StochasticWeightAveraging) for one in trainer.callbacks):
            pl_module.configure_model()  # it copies the module in `setup`: a module without weights averages nothing

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the random states; all ranks ask together, and one of them writes."""
        checkpoint[f"{KEY}_random"] = random_states(trainer.world_size)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Remember the random states."""
        self._random_states = checkpoint.get(f"{KEY}_random")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Continue them as late as possible, so that dropout masks are those of a run that did not stop."""
        if self._random_states is not None:
            restore_random_state(self._random_states, trainer.global_rank)
            self._random_states = None
