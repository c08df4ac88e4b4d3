"""Streams and mixtures train what tables do, on one process and on two, and go on to the bit."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain

import pytest
import torch

import ranks
import stops
import two_streams

ROWS = 34
STREAM = {"streaming": True, "shuffle_buffer": 9, "max_length": 60}
CASES = {
    "stream": {**STREAM, "cache": "cache", "epochs": 2, "keep": True},
    "resumed": {**STREAM, "cache": "cache", "epochs": 2, "num_workers": 2},
    "tokens": {**STREAM, "batch_size": None, "max_tokens": 150},
    "one pair a batch": {**STREAM, "size": 2},
    "mixed stream": {**STREAM, "train": "mixture"},
    "mixture": {"train": "mixture"},
    "mixture of tokens": {"train": "mixture", "batch_size": None, "max_tokens": 150},
    "bad": {**STREAM, "train": "bad"},  # last: it stops
}


def _rows(count):
    return [
        {
            "prompt": f"How many are {n}?",
            "chosen": " One," * (12 if n % 5 == 1 else 1 + n % 3),
            "rejected": " No" * (n % 4 + 1),
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def on_two(once, tiny_model):
    """What two processes make of each case, with the case."""
    folder = once("two-streams", lambda folder: _on_two(folder, tiny_model))
    cases = json.loads((folder / "cases.json").read_text())
    return {name: (case, torch.load(folder / f"{name}.pt", weights_only=True)) for name, case in cases.items()}


def _on_two(folder, tiny_model):
    files = {
        "stream": _rows(ROWS),
        "a": _rows(25),
        "b": _rows(7),
        "bad": [*_rows(90), {"prompt": "x", "chosen": "", "rejected": "y"}],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = {str(folder / "a.jsonl"): 3, str(folder / "b.jsonl"): 1}
    cases = {}
    for name, case in CASES.items():
        train = {"mixture": mixture}.get(case.get("train"), str(folder / f"{case.get('train', 'stream')}.jsonl"))
        cases[name] = {"model": str(tiny_model), **case, "train": train}
        if "cache" in case:
            cases[name]["cache"] = str(folder / "logps")
    cases["resumed"]["ckpt_path"] = str(folder / "stream" / f"step={two_streams.STEP}.ckpt")
    (folder / "cases.json").write_text(json.dumps(cases))
    ranks.run(two_streams.of_rank, 2, folder, folder=folder, seconds=300)


def _steps(found):
    """The rows of each step, on all ranks."""
    assert len({len(rows) for rows in found["rows"]}) == 1
    assert all(part for rows in found["rows"] for part in rows)
    return [sorted(chain(*parts)) for parts in zip(*found["rows"], strict=True)]


@pytest.mark.parametrize("name", ["stream", "mixed stream", "mixture"])
def test_two_processes_train_like_one(on_two, tmp_path, name):
    """With rows that are dropped, unevenly on the ranks: the same rows in each step, and the same adapter."""
    case, two = on_two[name]
    if "cache" in case:
        case["cache"] = str(tmp_path / "logps")
    one = two_streams.train(root=tmp_path, **case)
    assert _steps(one) == _steps(two)
    for name, expected in one["adapter"].items():
        torch.testing.assert_close(
            two["adapter"][name], expected, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", ["stream", "tokens", "one pair a batch"])
def test_two_processes_see_every_row_of_a_stream_once(on_two, name):
    case, two = on_two[name]
    seen = Counter(chain(*_steps(two)))
    assert seen == dict.fromkeys([n for n in range(ROWS) if n % 5 != 1], case.get("epochs", 1))


@pytest.mark.parametrize("name", ["mixed stream", "mixture", "mixture of tokens"])
def test_proportions_hold_after_every_step_of_two_processes(on_two, name):
    """Three to one, within one row of each source: of what is read. Of a stream dropped rows come off."""
    _, two = on_two[name]
    of_stream = name == "mixed stream"
    seen = {False: Counter(), True: Counter()}
    for step in _steps(two):
        second = [row % 2 == 1 for row in step] if of_stream else [row >= 25 for row in step]
        seen[False].update(row for row, other in zip(step, second, strict=True) if not other)
        seen[True].update(row for row, other in zip(step, second, strict=True) if other)
        total, b = sum(map(Counter.total, seen.values())), seen[True].total()
        assert abs(b - total / 4) <= (3 if of_stream else 0.5), (total, b)
    if of_stream:
        assert {row // 2 for row in seen[False]} == {n for n in range(25) if n % 5 != 1}
        assert {row // 2 for row in seen[True]} == {n for n in range(7) if n % 5 != 1}
    else:
        assert {*seen[False]} == {*range(25)}
        assert {*seen[True]} == {*range(25, 32)}


def test_two_processes_go_on_to_the_bit(on_two):
    """From the checkpoint of the second step of the first epoch, now with two workers."""
    straight, resumed = on_two["stream"][1], on_two["resumed"][1]
    assert resumed["rows"] == [rows[two_streams.STEP :] for rows in straight["rows"]]
    assert all(torch.equal(straight["adapter"][name], p) for name, p in resumed["adapter"].items())


def test_one_process_goes_on_where_two_stopped(on_two, tmp_path):
    """In the middle of an epoch: where a step began is a place in the stream, whoever reads it."""
    case, straight = on_two["stream"][0], on_two["stream"][1]
    alone = {**case, "cache": str(tmp_path / "logps"), "ckpt_path": on_two["resumed"][0]["ckpt_path"]}
    one = two_streams.train(root=tmp_path, **alone)
    assert _steps(one) == _steps(straight)[two_streams.STEP :]
    for name, expected in one["adapter"].items():
        torch.testing.assert_close(straight["adapter"][name], expected, rtol=0, atol=1e-6, msg=name)


def test_a_bad_row_stops_both_processes(on_two):
    """One of them has met it; both say so, and neither waits for the other."""
    case, two = on_two["bad"]
    assert len({*two["errors"]}) == 1
    assert two["error"] == f"{case['train']}, row 90 (from 0): Expected a completion in `chosen` but got ''."


@pytest.mark.parametrize(
    ("way", "accumulate", "batches", "workers"),
    [("should_stop", 1, (5,), 2), ("killed", 4, (6,), 0)],
)
def test_a_stopped_stream_goes_on_to_the_bit(tiny_model, pairs_file, way, accumulate, batches, workers):
    """Weights, the loss's memory, a reference that moves, and every logged number, with dropout."""
    for *_, at, outcome in stops.table(tiny_model, pairs_file, [way], batches, [accumulate], workers):
        assert outcome.startswith("equal"), f"stopped after batch {at}: {outcome}"
