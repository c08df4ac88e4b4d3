"""A stopped run goes on to the bit, wherever and however it was stopped: a part of the table of `stops.py`."""

from __future__ import annotations

import pytest

import stops


@pytest.mark.parametrize(
    ("way", "accumulate", "batches"),
    [
        ("should_stop", 1, (1, 2)),  # inside an epoch, with and without a validation that is due
        ("should_stop", 4, (2, 7)),  # inside a step, too
        ("early_stopping", 1, (4,)),
        ("max_time", 1, (3,)),
        ("max_steps", 1, (7,)),
        ("sigterm", 1, (3,)),
        ("sigterm", 4, (9,)),
        ("sigint", 1, (8,)),
        ("killed", 1, (4, 6)),  # before a row and a validation that are due; at the end of an epoch
        ("killed", 4, (1, 5, 6)),
        ("killed at the end", 1, (6, 12)),  # of an epoch whose last row is still to come; of the run
    ],
)
def test_a_stopped_run_goes_on_to_the_bit(tiny_model, pairs_file, way, accumulate, batches):
    """Weights, the loss's memory, a reference that moves, and every logged number, with dropout."""
    for *_, at, outcome in stops.table(tiny_model, pairs_file, [way], batches, [accumulate]):
        assert outcome.startswith("equal"), f"stopped after batch {at}: {outcome}"


@pytest.mark.parametrize("batches", [6, 12])
def test_a_run_that_is_killed_again_before_it_asks_for_a_batch_goes_on_to_the_bit(
    tiny_model, pairs_file, tmp_path, batches
):
    """First with an epoch's validation to come, then after it: the second file says the same place in the data."""
    *_, first = stops.run(tiny_model, pairs_file, tmp_path, way="killed", batches=batches)
    again = {"way": "killed at the end", "ckpt_path": tmp_path / "stopped.ckpt"}
    *_, second = stops.run(tiny_model, pairs_file, tmp_path / "again", **again)
    resumed = stops.run(tiny_model, pairs_file, tmp_path / "on", ckpt_path=tmp_path / "again" / "stopped.ckpt")
    assert stops.compare(stops.straight(tiny_model, pairs_file, 1), resumed, [*first, *second]) == "equal"
