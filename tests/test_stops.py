"""A stopped run goes on to the bit, wherever and however it was stopped: a part of the table of `stops.py`."""

from __future__ import annotations

import pytest

import stops


@pytest.mark.parametrize(
    ("way", "accumulate", "batches"),
    [
        ("should_stop", 1, (1, 2, 5)),  # inside an epoch, with and without a validation that is due
        ("should_stop", 4, (2, 7)),  # inside a step, too
        ("early_stopping", 1, (4,)),
        ("max_time", 1, (3,)),
        ("max_steps", 1, (2, 7)),
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
