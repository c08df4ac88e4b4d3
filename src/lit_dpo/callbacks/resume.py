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
    gather,
    random_state,
    restore_random_state,
    save_adapter,
)
from lit_dpo.errors import ResumeError
from lit_dpo.position import remeasure, rewind
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

    _validated = -1
    _ended = False

    def __init__(self) -> None:
        self._resumed: dict[str, Any] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Know what the run is before weights load, and put it into every file."""
        if not pl_module.checked:  # another rank, or another `prepare_data`
            check_run(pl_module, trainer)
        pl_module.checked = False
        self._resumed = None
        # hyper-parameters in builtins, so that loggers and checkpoints take them as they are
        pl_module._set_hparams(configuration(pl_module))
        pl_module._hparams_initial = copy.deepcopy(pl_module._hparams)
        belongs = describe(pl_module)

        def on_save(checkpoint: dict[str, Any]) -> None:
            checkpoint[KEY] = belongs

        def on_load(checkpoint: dict[str, Any]) -> None:
            check_belongs(checkpoint, belongs, training=stage == "fit")
            if stage == "fit":
                self._go_back(checkpoint, type(trainer.datamodule).__qualname__)

        def beside(checkpoint: dict[str, Any], directory: Path) -> None:
            save_adapter(pl_module.model, tokenizer_of(trainer), directory, checkpoint["state_dict"])

        strategy = trainer.strategy
        inner = strategy.checkpoint_io
        inner = inner.inner if isinstance(inner, AdapterCheckpointIO) else inner
        strategy.checkpoint_io = AdapterCheckpointIO(inner, on_save, on_load, beside)
        if any(isinstance(one, StochasticWeightAveraging) for one in trainer.callbacks):
            pl_module.configure_model()  # it copies the module in `setup`: a module without weights averages nothing

    def _go_back(self, checkpoint: dict[str, Any], datamodule: str) -> None:
        """Let Lightning's loops, and the data, go on after the last optimizer step; remember the rest until they do."""
        if f"{KEY}_run" not in checkpoint:
            return
        self._resumed = run = checkpoint[f"{KEY}_run"]
        if run["torn"]:
            raise ResumeError("The checkpoint was written inside an optimizer step, so that nothing can go on from it.")
        stands = checkpoint.get(datamodule, {})
        if "batches" not in stands:  # data of one's own
            return
        if not run["ended"]:  # validation, and the end of the epoch, are still to come
            stands.update(epoch=stands["epoch"] - 1, batches=run["of"], finished=True)
        else:  # what was accumulated towards a step that was not made is lost with the gradients
            stands["batches"] -= stands["batches"] % run["accumulate"]
        stands["between"] = stands["batches"] == 0  # two epochs: the next one may have other batches
        rewind(checkpoint["loops"], stands["epoch"], stands["batches"], run["of"], validated=run["validated"])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Continue as late as possible, so that nothing comes between."""
        self._continue(trainer, pl_module)
        self._ended = False

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Continue, if the end of the epoch was all that was left of it."""
        self._continue(trainer, pl_module)
        self._ended = True

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Remember that it was made."""
        if not trainer.sanity_checking:
            self._validated = trainer.fit_loop.total_batch_idx

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add what a run that goes on needs; all ranks ask together, and one of them writes.

        In the middle of a step (batches that are accumulated, an exception) it is what was there after the last one.
        """
        there = pl_module.standing
        if there is None:
            return
        if there.inside and there.loss_state is not None:
            checkpoint["state_dict"]["loss_state"] = there.loss_state
        checkpoint[f"{KEY}_run"] = {
            "random": gather(there.random if there.inside else random_state(), trainer.world_size),
            "measured": there.measured,
            "row": there.row,
            "validated": self._validated == trainer.fit_loop.total_batch_idx,
            "torn": trainer.global_step != there.step,
            "accumulate": trainer.accumulate_grad_batches,
            "of": trainer.num_training_batches,
            "ended": not trainer.is_last_batch or self._ended,
        }

    def _continue(self, trainer: Any, pl_module: Any) -> None:
        """Take up random states, so that dropout masks are those of a run that did not stop, and what was measured."""
        if self._resumed is None:
            return
        restore_random_state(self._resumed["random"], trainer.global_rank)
        if self._resumed["measured"]:
            remeasure(pl_module.train_metrics, self._resumed["measured"])
            pl_module.unlogged = True
        # the number of the next row, which Lightning counts one short where no validation was due
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        if row := self._resumed["row"]:  # a stop may have been quicker than the log
            for logger in trainer.loggers:
                logger.log_metrics(row, trainer.global_step - 1)
                logger.save()
        self._resumed = None
