"""Training rows that are read as training goes: each once, in an order that can be taken up at any batch."""

from __future__ import annotations

import logging
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from recorder import Recorder, trainer

from lit_dpo.data.datamodule import PreferenceDataModule


def rows(count: int, start: int = 0) -> list[dict]:
    return [
        {"prompt": f"question {i}", "chosen": " yes" * (i % 5 + 1), "rejected": " no"}
        for i in range(start, start + count)
    ]


@pytest.fixture
def data(jsonl, tokenizer_folder: str):
    """`data(**options)`: a stream of 23 pairs, in blocks of 10 rows and batches of 4."""
    path = jsonl("train.jsonl", rows(23))
    given = {"train": path, "tokenizer": tokenizer_folder, "streaming": True, "shuffle_buffer": 10, "batch_size": 4}
    return lambda **options: PreferenceDataModule(**{**given, "seed": 3, **options})


def seen(data: PreferenceDataModule, epochs: int = 1, **options: Any) -> list[list[int]]:
    module = Recorder()
    trainer(max_epochs=epochs, **options).fit(module, data)
    return module.seen


# --- the order ------------------------------------------------------------------------------------------------------


def test_every_row_comes_once_an_epoch_shuffled_within_its_block(data) -> None:
    found = seen(data(), 2)
    first, second = (list(chain(*found[:6])), list(chain(*found[6:])))
    assert sorted(first) == sorted(second) == list(range(23))
    assert [sorted(first[start : start + 10]) for start in (0, 10, 20)] == [
        [*range(10)],
        [*range(10, 20)],
        [20, 21, 22],
    ]
    assert first != second
    assert first[:10] != sorted(first[:10])
    assert [len(batch) for batch in found[:6]] == [4, 4, 4, 4, 4, 3]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(data, workers: int) -> None:
    assert seen(data(num_workers=workers), 2) == seen(data(), 2)


def test_the_order_is_a_function_of_seed_and_epoch(data) -> None:
    assert seen(data(), 2) == seen(data(), 2) != seen(data(seed=4), 2)
    assert seen(data(shuffle_buffer=1)) == [[*range(start, min(start + 4, 23))] for start in range(0, 23, 4)]


def test_a_stream_trains_on_what_a_table_holds(data) -> None:
    stream, table = data(), data(streaming=False, shuffle_buffer=None)
    for module in (stream, table):
        module.setup("fit")
    expected = table._tables["train"]
    for batch in stream.train_dataloader():
        same = expected.batch(batch.indices.tolist())
        for name in batch._fields:
            assert torch.equal(getattr(batch, name), getattr(same, name)) if name != "columns" else not batch.columns


def test_dropped_rows_leave_no_hole_and_are_counted_after_the_epoch(data, jsonl, caplog) -> None:
    long = [{**row, "chosen": " yes" * 90} if i % 3 == 0 else row for i, row in enumerate(rows(23))]
    with caplog.at_level(logging.INFO):
        found = seen(data(train=jsonl("long.jsonl", long), max_length=60))
    assert [len(batch) for batch in found] == [4, 4, 4, 3]
    assert sorted(chain(*found)) == [row for row in range(23) if row % 3]
    said = "train: epoch 0: 23 rows read, 15 kept, dropped: 8 longer than max_length=60"
    assert [record.getMessage() for record in caplog.records].count(said) == 1


def test_a_budget_of_tokens_holds(data) -> None:
    module = data(batch_size=None, max_tokens=90)
    found = seen(module)
    assert sorted(chain(*found)) == list(range(23))
    assert len({len(batch) for batch in found}) > 1
    module.setup("fit")
    assert all(batch.input_ids.shape[1] <= 90 for batch in module.train_dataloader())


# --- resuming -------------------------------------------------------------------------------------------------------

MOMENTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "steps": ({"every_n_train_steps": 1}, {}, {}),
    "two workers": ({"every_n_train_steps": 5}, {}, {"num_workers": 2}),
    "accumulation": ({"every_n_train_steps": 1}, {"accumulate_grad_batches": 2}, {}),
    "validation within the epoch": ({"save_on_train_epoch_end": False}, {"val_check_interval": 2}, {}),
    "end of the epoch": ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {}, {}),
    "fewer batches": ({"every_n_train_steps": 1}, {"limit_train_batches": 4}, {}),
    "a token budget": ({"every_n_train_steps": 1}, {}, {"batch_size": None, "max_tokens": 90}),
    "dropped rows": ({"every_n_train_steps": 1}, {}, {"max_length": 25}),
    "a mixture": ({"every_n_train_steps": 1}, {}, {"mixed": True}),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_resumed_run_sees_exactly_the_next_rows(data, tmp_path: Path, jsonl, moment: str) -> None:
    when, options, source = MOMENTS[moment]
    source = {"val": jsonl("val.jsonl", rows(3, 90)), **source}
    if source.pop("mixed", False):
        source["train"] = {jsonl("a.jsonl", rows(11)): 0.7, jsonl("b.jsonl", rows(7, 50)): 0.3}
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_top_k=-1, **when)
    straight = Recorder()
    trainer(checkpoint, **options).fit(straight, data(**source))
    of_epoch = len(straight.seen) // 2
    files = sorted((tmp_path / "ckpt").iterdir())
    assert len(files) >= 2
    for file in files:
        state = torch.load(file, weights_only=True)["PreferenceDataModule"]
        resumed = Recorder()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*resum.*")
            trainer(**options).fit(resumed, data(**source), ckpt_path=file)
        steps = int(file.stem.split("step=")[1].split("-")[0])
        done = state["epoch"] * of_epoch + state["batches"]
        assert resumed.seen == straight.seen[done:], (file.name, state)
        assert done == min(steps * options.get("accumulate_grad_batches", 1), len(straight.seen))
