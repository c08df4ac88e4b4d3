"""Training rows that are read as training goes: each once, in an order that can be taken up at any batch."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import random
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from lightning.pytorch.callbacks import ModelCheckpoint
from recorder import Recorder, trainer

from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.data.formats import Preference, Ranking, Triples
from lit_dpo.data.stream_loader import StepLimits, _last, _Place, _Step
from lit_dpo.data.stream_order import Item
from lit_dpo.errors import DataError, ResumeError


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


# --- steps ----------------------------------------------------------------------------------------------------------


def packed(places: list[_Place], limits: StepLimits) -> list[_Step]:
    steps, step = [], _Step(limits)
    for place in places:
        if not step.take(place):
            steps.append(step)
            step = _Step(limits)
            assert step.take(place)
    return steps[:-1] + _last(limits, steps[-1].rows if steps else [], step.rows)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_rows_make_steps_of_all_ranks_that_can_be_taken_up_at_each(ranks: int) -> None:
    draw = random.Random(ranks)
    for _ in range(500):
        tokens = draw.choice([None, 50])
        limits = StepLimits(ranks, draw.choice([1, 2, 4, 8] if tokens is None else [None, 1, 3]), tokens)
        positions = sorted(draw.sample(range(200), draw.randint(ranks, 60)))
        places = [_Place(position, Item(0, 0, None, ""), draw.randint(5, 40), None) for position in positions]
        steps = packed(places, limits)
        seen = [place.position for step in steps for place in step.rows]
        assert len({*seen}) == len(seen)
        assert seen == positions or (tokens and len(seen) > len(positions) - ranks)
        for number, step in enumerate(steps):
            last = number == len(steps) - 1
            assert all(0 < len(part) <= (limits.prompts or 99) + last for part in step.parts)
            assert all(sum(place.tokens for place in part) <= (tokens or 9999) for part in step.parts)
            again = packed([place for place in places if place.position >= step.start], limits)
            assert [one.parts for one in again] == [one.parts for one in steps[number:]]


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


def test_other_batches_cannot_continue_an_epoch_of_a_stream(data, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=2)
    trainer(checkpoint, max_steps=2).fit(Recorder(), data())
    for option, said in (({"shuffle_buffer": 9}, "buffer 10 -> 9"), ({"seed": 1}, "seed 3 -> 1")):
        with pytest.raises(ResumeError, match=said):
            trainer().fit(Recorder(), data(**option), ckpt_path=tmp_path / "x.ckpt")
    with pytest.raises(ResumeError, match="pairs None -> 23"):
        trainer().fit(Recorder(), data(streaming=False, shuffle_buffer=None), ckpt_path=tmp_path / "x.ckpt")


# --- sources --------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> dict[str, Any]:
    """The same rows in every form that can be streamed."""
    given = rows(23)
    lines = "".join(json.dumps(row) + "\n" for row in given)
    for name in ("a.jsonl", "a.json"):
        (folder / name).write_text(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*given[0]])
        writer.writeheader()
        writer.writerows(given)
    (folder / "a.csv.gz").write_bytes(gzip.compress((folder / "a.csv").read_bytes()))
    Dataset.from_list(given).to_parquet(folder / "a.parquet", batch_size=5)
    (folder / "parts").mkdir()
    for part, first in enumerate((0, 9, 18)):
        (folder / "parts" / f"{part}.jsonl").write_text("".join(lines.splitlines(True)[first : first + 9]))
    return {
        **{path.name: str(path) for path in folder.glob("a.*")},
        "a pattern": str(folder / "parts" / "*.jsonl"),
        "a Dataset": Dataset.from_list(given),
        "an IterableDataset": IterableDataset.from_generator(lambda: iter(given)),
        "a list": given,
        "a function": lambda: iter(given),
    }


def test_every_source_that_can_be_streamed_gives_the_same_batches(data, tmp_path: Path) -> None:
    found = {}
    for name, source in _files(tmp_path).items():
        module = data(train=source)
        module.setup("fit")
        found[name] = [batch.input_ids.tolist() for batch in module.train_dataloader()]
    assert len(found) == 11
    assert all(batches == found["a list"] for batches in found.values())
    assert sum(map(len, found["a list"])) == 6


def test_rows_are_found_again_by_their_number(data, tmp_path: Path) -> None:
    files = _files(tmp_path)
    one, several = (
        data(train=files["a.jsonl.gz"]),
        data(train=[files["a.csv"], *sorted(map(str, tmp_path.glob("parts/*")))]),
    )
    for module in (one, several):
        module.setup("fit")
    assert one.preference("train", 7) == Preference("question 7", " yes" * 3, " no")
    assert one.place("train", 7) == f"{tmp_path / 'a.jsonl.gz'}, row 7 (from 0)"
    assert [row for row, *_ in one.prompts("train", 3)] == [0, 1, 2]
    for batch in several.train_dataloader():
        for row in batch.indices.tolist():
            preference = several.preference("train", row)
            name, _, number = several.place("train", row).removesuffix(" (from 0)").partition(", row ")
            offset = 9 * int(Path(name).stem) if "parts" in name else 0
            assert preference.prompt == f"question {int(number) + offset}"


def test_json_is_read_as_what_it_says(data, jsonl) -> None:
    odd = [{"prompt": '"Hello."', "chosen": "2024-01-01", "rejected": "12"}] * 3
    module = data(train=jsonl("odd.jsonl", odd))
    module.setup("fit")
    assert module.preference("train", 2) == Preference('"Hello."', "2024-01-01", "12")


def test_rankings_and_rows_of_several_examples_are_streamed(data, jsonl) -> None:
    ranked = [{"prompt": f"q {i}", "completions": [" a", " bb", " ccc"], "scores": [1, 3, 2]} for i in range(9)]
    stream = data(train=jsonl("ranked.jsonl", ranked), comparisons="best_rest")
    stream.setup("fit")
    assert isinstance(stream.preference("train", 3), Ranking)
    batches = list(stream.train_dataloader())
    assert sorted(chain(*(batch.indices.tolist() for batch in batches))) == sorted([*range(9)] * 2)
    assert {*chain(*(batch.columns["score_margin"].tolist() for batch in batches))} == {1.0, 2.0}


# --- what is refused, and what is said ------------------------------------------------------------------------------


def stop(data: PreferenceDataModule) -> str:
    with pytest.raises(DataError) as error:
        trainer().fit(Recorder(), data)
    return str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_is_named_when_it_is_met(data, tmp_path: Path, workers: int) -> None:
    bad = {
        "line": ("{oops", "row 100 (from 0): line 101 is no JSON"),
        "list": ("[1]", "row 100 (from 0): line 101: expected an object"),
        "deep": ("[" * 100_000, "row 100 (from 0): "),
        "cell": (json.dumps({"prompt": "q", "chosen": "", "rejected": "b"}), "row 100 (from 0): "),
        "missing": (json.dumps({"prompt": "q", "rejected": "b"}), "row 100 (from 0): "),
    }
    for name, (line, said) in bad.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(100)) + line + "\n")
        message = stop(data(train=str(path), num_workers=workers))
        assert message.startswith(f"{path}, {said}"), message
        assert "Traceback" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_may_be_left_out(data, tmp_path: Path, workers: int, caplog) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row) for row in rows(100)]
    lines[7], lines[70] = "{oops", json.dumps({"prompt": "q", "chosen": "", "rejected": "b"})
    path.write_text("\n".join(lines) + "\n")
    module = Recorder()
    with caplog.at_level("INFO"):
        trainer().fit(module, data(train=str(path), num_workers=workers, on_bad_row="drop"))
    (line,) = (one.getMessage() for one in caplog.records if "epoch 0" in one.getMessage())
    assert "100 rows read, 98 kept, dropped: " in line
    assert "1 line … is no JSON" in line


def test_a_file_that_breaks_off_is_named(data, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows(5000)).encode())[:-2000])
    assert f"{path}, row " in (message := stop(data(train=str(path))))
    assert "cannot be read" in message


def test_what_cannot_be_streamed_is_refused(data, tmp_path: Path, jsonl) -> None:
    for option, named in (
        ({"val_split": 0.1}, "val_split"),
        ({"group_by_prompt": 4}, "group_by_prompt"),
        ({"shuffle_buffer": 0}, "shuffle_buffer"),
        ({"streaming": False}, "shuffle_buffer"),
    ):
        with pytest.raises(ValueError, match=f"`{named}`"):
            data(**option)
    assert "gives them once" in stop(data(train=iter(rows(3))))
    assert "File not found" in stop(data(train=str(tmp_path / "none.jsonl")))
    (tmp_path / "list.json").write_text(json.dumps(rows(3)))
    assert "an object a line" in stop(data(train=str(tmp_path / "list.json")))
    (tmp_path / "empty.jsonl").write_text("")
    assert "has no rows" in stop(data(train=str(tmp_path / "empty.jsonl")))
    lacking = jsonl("x.jsonl", [{"prompt": "a", "rejected": "b"}])
    assert "expected the column `chosen`" in stop(data(train=lacking, format=Triples()))
    assert "no row of 23 is left for 1 ranks: 23 longer than" in stop(data(max_length=2))


def test_a_table_is_made_of_a_stream_unless_it_shall_be_streamed(data, caplog) -> None:
    module = data(train=IterableDataset.from_generator(lambda: iter(rows(9))), streaming=False, shuffle_buffer=None)
    with caplog.at_level(logging.INFO):
        module.setup("fit")
    assert module._tables["train"].size == 9
    assert "was read to its end, into a table; see `streaming`" in caplog.text


def test_leaks_are_not_looked_for_in_a_stream(data, jsonl, caplog) -> None:
    with caplog.at_level(logging.INFO):
        seen(data(val=jsonl("val.jsonl", rows(3))))
    assert caplog.text.count("val: whether prompts are in train too is not known") == 1


class Counts(Recorder):
    """Asks Lightning for the number of steps, as its documentation shows it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.steps = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


def test_a_stream_that_is_read_before_its_position_is_known_is_refused(data, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=2)
    module = Counts()
    trainer(checkpoint, max_steps=2).fit(module, data())
    assert module.steps == 2
    with pytest.raises(ResumeError, match="estimated_stepping_batches"):
        trainer(max_steps=4).fit(Counts(), data(), ckpt_path=tmp_path / "x.ckpt")


def test_a_place_of_a_stream_that_nobody_noted_is_refused(data) -> None:
    module = data()
    module.setup("fit")
    loader = module.train_dataloader()
    loader.load_position(0, 3)
    loader.start = None
    with pytest.raises(ResumeError, match="where batch 3 of the stream began"):
        next(iter(loader))


# --- what a model or a loss cannot read -----------------------------------------------------------------------------


def test_every_row_is_held_to_the_model_and_the_budget_not_only_the_first_ones(data, jsonl) -> None:
    path = jsonl("late.jsonl", [*rows(100), {"prompt": "q", "chosen": " yes" * 90, "rejected": " no"}])

    class Checked(Recorder):
        def on_fit_start(self) -> None:
            self.trainer.datamodule.check_tokens(10_000, 60, None, "a model")

    with pytest.raises(DataError, match=r"late\.jsonl, row 100 .from 0.: \d+ tokens, but a model has 10000 token ids"):
        trainer().fit(Checked(), data(train=path))
    assert "row 100 (from 0): Expected prompts of up to `max_tokens`=70" in stop(data(train=path, max_tokens=70))
    module = data()
    module.setup("fit")
    with pytest.raises(DataError, match="token id"):
        module.check_tokens(20, None, None, "a model")


def test_every_row_is_held_to_a_loss_over_lists(data, jsonl) -> None:
    ranked = [
        {"prompt": f"q {i}", "completions": [" a", " bb", " ccc"][: 2 + (i < 90)], "scores": [1, 3, 2][: 2 + (i < 90)]}
        for i in range(99)
    ]

    def ask(completions: torch.Tensor, comparisons: torch.Tensor, counts: torch.Tensor) -> None:
        if 2 in comparisons.flatten().tolist():
            raise ValueError("no third one")

    stream = data(train=jsonl("ranked.jsonl", ranked[::-1]))
    stream.setup("fit")
    with pytest.raises(DataError, match=r"row 9 .from 0.: no third one"):
        stream.check_lists(ask)


def test_overfitting_takes_the_first_batches_of_a_stream(data) -> None:
    assert seen(data(), 2, overfit_batches=2) == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


def test_a_function_that_gives_its_rows_once_is_named(data, jsonl) -> None:
    once = iter(rows(200))
    message = stop(data(train=[(lambda: once, 0.5), (jsonl("a.jsonl", rows(150)), 0.5)], shuffle_buffer=5))
    assert "gave no rows when it was read again" in message
