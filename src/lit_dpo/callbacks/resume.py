from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.callbacks.export import data_of, tokenizer_of
from lit_dpo.checkpoint import (
    KEY,
    REMEDY,
    AdapterCheckpointIO,
    check_belongs,
    check_finite,
    compare,
    compare_steps,
    configuration,
    describe,
    describe_steps,
    gather,
    random_state,
    remeasure_share,
    restore_random_state,
    rewind,
    save_adapter,
    take_settings,
)
from lit_dpo.compat import number_rows_from
from lit_dpo.errors import ResumeError
from lit_dpo.requirements import check_run, check_wrapped

if TYPE_CHECKING:
    from lit_dpo.data.batch import CompletionBatch
    from lit_dpo.module import DPOModule


_FITS = ("base", "policy")  # what adapters and the optimizer's state can be put onto


class ExactResume(pl.Callback):
    """What makes a checkpoint continue its run, or say why it does not.

    Before weights load: what the checkpoints will say of the run is worked out, so that it cannot fail later. In each
    file: what its adapters belong to, the random states of all ranks, and the arguments that build the module again; a
    PEFT directory is next to it. On loading: all of it is compared, and random states go on before the first batch.

    None of it is in a hook of the module, which is the user's to override.

    Args:
        changes: what happens if the checkpoint's run had another loss, data, optimizer, schedule or the like: `refuse`
            names them; `accept` goes on from its weights, its optimizer's state and its step under the new ones, and
            says so in a line; a loss of another class begins with a memory of its own. Another base or another adapter
            is refused in any case.

    Raises:
        PolicyError, DataError, TrainingError: before weights load, for a run that cannot work.
        ResumeError: on loading a file that belongs to another run.
    """

    _validated = -1
    _ended = False

    def __init__(self, changes: Literal["refuse", "accept"] = "refuse") -> None:
        if changes not in ("refuse", "accept"):
            raise ResumeError(f"Expected `changes` to be refuse or accept but got {changes!r}.")
        self.changes = changes
        self._resumed: dict[str, Any] | None = None
        self._loaded: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: DPOModule, stage: str) -> None:
        """Know what the run is before weights load, and put it into every file."""
        if not pl_module.checked:  # another rank, or another `prepare_data`
            check_run(pl_module, trainer)
        pl_module.checked = False  # for the next run of this module
        self._resumed, self._loaded = None, {}
        # hyper-parameters in builtins, so that loggers and checkpoints take them as they are
        pl_module.hparams.update(configuration(pl_module))
        pl_module.accepts_changes = self.changes == "accept"
        # one dictionary: what `on_fit_start` adds to it is in every file too
        self._belongs = belongs = describe(pl_module, trainer)

        def on_save(checkpoint: dict[str, Any]) -> None:
            check_finite(checkpoint["state_dict"])
            checkpoint[KEY] = belongs

        def on_load(checkpoint: dict[str, Any]) -> None:
            fitting = stage == "fit"
            check_belongs(checkpoint, belongs, training=fitting, parts=_FITS if self.changes == "accept" else None)
            if fitting:
                self._go_back(checkpoint, type(data_of(trainer)).__qualname__)
                self._say_changes(checkpoint[KEY], belongs)
                if _classes(checkpoint[KEY]["loss"]) != _classes(belongs["loss"]):  # only where changes are accepted
                    # what another loss remembers is of the same shape at most
                    checkpoint["state_dict"].pop("loss_state", None)

        def export(checkpoint: dict[str, Any], directory: Path) -> None:
            save_adapter(pl_module.model, tokenizer_of(trainer), directory, checkpoint["state_dict"], belongs)

        strategy = trainer.strategy
        inner = strategy.checkpoint_io
        # the trainer has had a run before: one of ours around its plugin is enough
        inner = inner.inner if isinstance(inner, AdapterCheckpointIO) else inner
        strategy.checkpoint_io = AdapterCheckpointIO(inner, on_save, on_load, export)
        if any(isinstance(one, StochasticWeightAveraging) for one in getattr(trainer, "callbacks", ())):
            pl_module.configure_model()  # it copies the module in `setup`: a module without weights averages nothing

    def on_fit_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Compare the optimizer and the schedule before a checkpoint's state is put into them."""
        check_wrapped(trainer)
        here = self._belongs["steps"] = describe_steps(pl_module)
        # Lightning has loaded the weights by now, and the optimizers' state not yet
        there = self._loaded.get(KEY, {}).get("steps")
        if there is None or not (found := compare_steps(there, here)):
            return
        if self.changes == "refuse":
            raise ResumeError(f"The checkpoint belongs to another run: {'; '.join(found)}.\n{REMEDY}")
        rank_zero_info(f"going on under other settings: {'; '.join(found)}")
        take_settings(self._loaded, trainer, same=there["optimizer"] == here["optimizer"])

    def _say_changes(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        """Under other settings one line says so; what cannot be put together has been refused."""
        if self.changes == "refuse":
            return
        try:
            compare(there, here, training=True)
        except ResumeError as error:
            changed = [line.strip() for line in str(error).splitlines() if line.startswith("  ")]
            rank_zero_info(f"going on under other settings: {'; '.join(changed)}")

    def _go_back(self, checkpoint: dict[str, Any], datamodule: str) -> None:
        """Let Lightning's loops, and the data, go on after the last optimizer step; remember the rest until they do."""
        if "optimizer_states" not in checkpoint:
            raise ResumeError(
                "The checkpoint holds weights alone, so that no run can be continued from it. To start a new run from "
                "its adapter, give `policy.adapter_path` the directory next to it, not --ckpt_path."
            )
        # the very dictionary that Lightning restores data, loops and optimizers from afterwards: it is changed in place
        self._loaded = checkpoint
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

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: DPOModule, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """Continue as late as possible, so that nothing comes between."""
        # `ModelCheckpoint` comes after all other callbacks: what it linked is there by the next batch
        _link_folders(trainer)
        self._continue(trainer, pl_module)
        self._ended = False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Continue, if the end of the epoch was all that was left of it."""
        self._continue(trainer, pl_module)
        self._ended = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Leave the last link with its folder."""
        _link_folders(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Remember that it was made."""
        if not trainer.sanity_checking:
            self._validated = trainer.fit_loop.total_batch_idx

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: DPOModule, checkpoint: dict[str, Any]) -> None:
        """Add what a run that goes on needs; all ranks ask together, and one of them writes.

        In the middle of a step (batches that are accumulated, an exception) it is what was there after the last one.
        """
        there = pl_module.standing
        if there is None:
            return
        if there.inside and there.loss_state is not None:
            checkpoint["state_dict"]["loss_state"] = there.loss_state
        counted = move_data_to_device(there.measured, torch.device("cpu"))  # not from one rank's device to another's
        mine = {"random": there.random if there.inside else random_state(), "measured": counted}
        everybody = gather(mine, trainer.world_size)
        checkpoint[f"{KEY}_run"] = {
            "random": [one["random"] for one in everybody],
            "measured": [one["measured"] for one in everybody],
            "row": there.row,
            "validated": self._validated == trainer.fit_loop.total_batch_idx,
            # an optimizer step was made, and `OptimizerSteps` has not noted it
            "torn": trainer.global_step != there.step,
            "accumulate": trainer.accumulate_grad_batches,
            "of": _batches_of_epoch(trainer),
            "ended": not trainer.is_last_batch or self._ended,
        }

    def _continue(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Take up random states, so that dropout masks are those of a run that did not stop, and what was measured."""
        if self._resumed is None:
            return
        random, rank, ranks = self._resumed["random"], trainer.global_rank, trainer.world_size
        restore_random_state(random, rank)
        if len(random) != ranks:
            masks = ", with other dropout masks" if pl_module.policy.dropout else ""
            rank_zero_info(f"going on with {ranks} rank{'s' * (ranks > 1)} instead of {len(random)}{masks}")
        shares = self._resumed["measured"]
        shares = [shares] if isinstance(shares, dict) else shares  # as older files have it: of the first rank
        if any(shares):
            if unable := remeasure_share(pl_module.train_metrics, shares, rank, ranks):
                rank_zero_info(f"until the next row these measure from here on only: {', '.join(unable)}")
            pl_module.unlogged = True
        # the number of the next row, which Lightning counts one short where no validation was due
        number_rows_from(trainer, trainer.global_step)
        if row := self._resumed["row"]:  # a stop may have been quicker than the log
            for logger in trainer.loggers:
                # Lightning numbers a step's row by the steps before it
                logger.log_metrics(row, trainer.global_step - 1)
                logger.save()
        self._resumed = None


def _classes(loss: dict[str, Any]) -> list[Any]:
    """Name the classes of a loss and of those within it, from its configuration."""
    inner = loss.get("init_args", {}).values()
    parts = [one for given in inner for one in (given if isinstance(given, list) else [given])]
    return [loss.get("class_path"), *(_classes(one) for one in parts if isinstance(one, dict) and "class_path" in one)]


def _batches_of_epoch(trainer: pl.Trainer) -> int:
    """Batches of the present epoch; 0 if nobody knows, before the last one of data without a length."""
    if not math.isinf(batches := trainer.num_training_batches):
        return int(batches)
    return trainer.fit_loop.batch_idx + 1 if trainer.is_last_batch else 0


def _link_folders(trainer: pl.Trainer) -> None:
    """Beside a `last.ckpt` that is a link (`save_last="link"`) is a link to the folder of the same checkpoint."""
    for keeper in trainer.checkpoint_callbacks if trainer.is_global_zero else ():
        last = Path(getattr(keeper, "last_model_path", ""))
        if getattr(keeper, "save_last", None) != "link" or not last.is_symlink():
            continue
        folder, target = last.with_suffix(""), last.resolve().with_suffix("")
        if target.is_dir() and folder.resolve() != target:
            temporary = folder.with_name(f".{folder.name}.link")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(os.path.relpath(target, folder.parent))
            if folder.is_dir() and not folder.is_symlink():  # of a `save_last=True` before; no link replaces a folder
                shutil.rmtree(folder)
            # in one step, so that there is a folder at any moment
            os.replace(temporary, folder)
