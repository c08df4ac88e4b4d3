"""Where training stands in its data: the epoch, the batches of it that are consumed, and what these depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lit_dpo.errors import ResumeError

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lit_dpo.data.loader import TrainLoader


def position(trainer: pl.Trainer, loader: TrainLoader, resumed: Mapping[str, Any] | None) -> dict[str, Any]:
    """Say where a run stands, for its checkpoint.

    Args:
        trainer: of the run.
        loader: of the training data; it counts the batches that it has handed out.
        resumed: the state that the run goes on from, as long as no batch has been asked for.
    """
    if resumed is not None:  # only validation, or the end of an epoch, has come since: the loader knows of nothing yet
        finished = resumed.get("finished", False)
        epoch, batches = (resumed["epoch"] + 1, 0) if finished else (resumed["epoch"], resumed["batches"])
        return {"epoch": epoch, "batches": batches, **loader.notes(trainer.accumulate_grad_batches)}
    in_hand = trainer.fit_loop.epoch_loop.batch_progress.current
    # An exception saves in the middle of a step: the batch in hand is not consumed.
    batches = loader.used - (in_hand.ready - in_hand.processed)  # type: ignore[attr-defined]
    finished = batches >= (loader.batches if loader.ended else trainer.num_training_batches)
    epoch, batches = (loader.epoch + 1, 0) if finished else (loader.epoch, batches)
    return {"epoch": epoch, "batches": batches, **loader.notes(trainer.accumulate_grad_batches)}


def first_position(
    state: Mapping[str, Any] | None, trainer: pl.Trainer, loader: TrainLoader, facts: Mapping[str, Any]
) -> tuple[int, int]:
    """Say at which epoch, and after how many of its batches, a run begins.

    Args:
        state: of the checkpoint that it goes on from, or None.
        trainer: of the run.
        loader: of the training data.
        facts: what decides which prompts the next batches hold.

    Raises:
        ResumeError: if it would go on inside an epoch whose batches are others now, with what differs.
    """
    if state is None:
        return trainer.fit_loop.epoch_progress.current.processed, 0  # type: ignore[attr-defined]
    if not trainer.fit_loop.restarting:  # Lightning starts an epoch, even if the last one was cut short
        return state["epoch"] + (state["batches"] > 0), 0
    if state.get("finished"):  # what is left of its epoch is validation, whatever its batches were
        return state["epoch"], loader.batches_of(state)
    if not state.get("between"):
        _check_same_batches(state, facts)
    return state["epoch"], state["batches"]


def _check_same_batches(state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """In the middle of an epoch "the remaining batches" means something only for the same batches of all ranks."""
    changed = {
        name: f"{name} {state.get(name)} -> {value}" for name, value in facts.items() if state.get(name) != value
    }
    remedy = "Restore these settings"
    if "ranks" in changed and facts["max_tokens"] is not None:
        remedy = "With `max_tokens` each rank's batches are filled by themselves. " + remedy
    elif "ranks" in changed:
        there, here = ((facts.get("batch_size") or 0) * facts["ranks"] for facts in (state, facts))
        if there == here:  # the same rows, shared out among others
            del changed["ranks"], changed["batch_size"]
        else:
            remedy += f", or give `--data.batch_size` so that all ranks together have {there} again"
    if changed:
        raise ResumeError(
            f"The checkpoint stopped after batch {state['batches']} of epoch {state['epoch']}, and the batches are "
            f"others now: {', '.join(changed.values())}. {remedy}, or resume from the end of an epoch."
        )
