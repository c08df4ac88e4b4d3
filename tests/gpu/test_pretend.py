"""Training on a pretend accelerator (`pretend.py`): every tensor is where it belongs, and the CPU waits once a step."""

from __future__ import annotations

import json
from collections import Counter

import pytest

import ranks
import tiny
from losses.test_contract import LOSSES, SETTINGS

RUNS = (
    "all shown",
    "rows",
    "accumulated",
    "checkpointing",
    "padded",
    "padded sdpa",
    "adapter",
    "other model",
    "moving",
    "stored",
    "all columns",
    "rankings",
    "rankings in parts",
    "scaled",
)
# What a training step waits for: one copy, with the check of its gradients and all that is logged.
CHECK = "lit_dpo/metrics/preference.py:on_host"
# And what else may wait, by run: places, and how often in a step at most.
MORE = {
    # transformers 5.17 makes a mask's smallest number on the CPU, for policy and reference
    "padded": {"transformers/masking_utils.py:eager_mask": 2},
    # transformers looks whether a mask hides anything, twice each
    "padded sdpa": {"transformers/masking_utils.py:_ignore_causal_mask_sdpa": 4},
    # pairs that come by for the first time
    "stored": {"lit_dpo/references/cache.py:_compute": 1},
    # torch's scaler decides whether it makes the step
    "scaled": {"lightning/pytorch/plugins/precision/amp.py:optimizer_step": 1},
}
# In the first step: are policy and reference the same (in each of its batches), and did every adapter move?
FIRST = 2


@pytest.fixture(scope="module")
def found(once):
    """What real runs did, and losses by themselves, in a process of their own: the device is there for all of it."""
    return json.loads((once("pretend", _runs) / "found.json").read_text())


def _runs(folder):
    tiny.directory(folder / "model", max_position_embeddings=256, num_hidden_layers=1)
    rows = [
        {
            "prompt": f"How many are {number}?",
            "chosen": " Exactly " + "one, " * (number % 4) + f"{number}.",
            "rejected": " No" + " idea" * (number % 3) + "!",
            "score": 1.0 + number % 3,
            "share": 0.8,
            "weight": 0.5,
        }
        for number in range(21)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [" one", " two", " three", " four", " many"]
    ranked = [
        {"prompt": row["prompt"], "completions": words[: 2 + place % 4], "scores": [*range(2 + place % 4)]}
        for place, row in enumerate(rows)
    ]
    (folder / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    ranks.run(_run, 1, folder, folder=folder, seconds=300)


def _run(folder):
    import pretend_runs  # in this process alone: it makes the device

    pretend_runs.main(folder)


def _parts(found, name, stage):
    if "error" in found[name]:
        pytest.fail(f"{found[name]['error']}\n{found[name]['trace']}")
    return [[place for _, place in waits] for part, waits in found[name]["parts"].items() if part.startswith(stage)]


@pytest.mark.parametrize("name", RUNS)
def test_a_step_waits_for_the_device_once(found, name):
    first, *steps = _parts(found, name, "train")
    begun = FIRST
    if name == "accumulated":
        first, steps, begun = first + steps[0], steps[1:], FIRST + 1
        assert [sum(map(len, pair)) for pair in zip(steps[::2], steps[1::2], strict=True)] == [1]
    allowed = Counter({CHECK: 1, **MORE.get(name, {})})
    for step in steps:
        assert Counter(step) <= allowed
    twice = {place: 2 * count for place, count in MORE.get(name, {}).items()}
    assert Counter(first) <= Counter({CHECK: 1 + begun, **twice})


@pytest.mark.parametrize("name", RUNS)
def test_a_validation_batch_waits_for_nothing(found, name):
    """But for the reference's first time and what transformers asks. After the last comes the epoch's end."""
    batches = _parts(found, name, "validate")
    assert len(batches) >= 2
    for batch in batches[::2]:
        assert Counter(batch) <= Counter(MORE.get(name, {}))


def test_a_tested_batch_waits_for_nothing_and_a_predicted_one_once(found):
    assert _parts(found, "all shown", "test")[0] == []
    assert _parts(found, "all shown", "predict")[0] == ["lit_dpo/module.py:predict_step"]


@pytest.mark.parametrize("loss", [f"{kind(**given)}" for kind in LOSSES for given in [{}, *SETTINGS.get(kind, [])]])
def test_a_loss_and_its_metrics_stay_on_the_device_and_wait_for_nothing(found, loss):
    assert _parts(found, f"loss {loss}", "steps") == [[]]
