"""The data with weights say what the data said, in whatever layout they came, and train with their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lit_dpo import PreferenceDataModule
from lit_dpo.data import formats
from lit_dpo.quickstart import quickstart_tokenizer
from lit_dpo.tools.audit.rows import Rows, row_weights
from lit_dpo.tools.inspect import CHAT_TEMPLATE

LAYOUTS = Path(__file__).parents[1] / "data" / "layouts"
SOME = ["alpaca_history", "helpsteer2", "labelled_shares", "nectar", "sharegpt_tools", "stack_exchange_scores", "trees"]


def read(train: Any, **options: Any) -> PreferenceDataModule:
    tokenizer = quickstart_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    data = PreferenceDataModule(train=train, tokenizer=tokenizer, max_length=None, **options)
    data.setup("fit")
    return data


def options_of(arguments: list[str]) -> dict[str, Any]:
    """The options of the data module that a command line names."""
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    of_format = {
        name.removeprefix("--data.format."): yaml.safe_load(value)
        for name, value in given.items()
        if name.startswith("--data.format.")
    }
    train = yaml.safe_load(given["--data.train"])
    return {"train": train, "format": getattr(formats, given["--data.format"])(**of_format)}


def again(
    data: PreferenceDataModule, folder: Path, weights: dict[int, float], without: int = 0
) -> PreferenceDataModule:
    """Write the data with weights, and read them as the options say."""
    rows = Rows(data)
    assert rows.why_not_weighted() == ""
    parts, left_out = rows.weighted(weights)
    assert left_out == without
    files = [str(folder / f"{number}.jsonl") for number in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in part))
    return read(**options_of(rows.options(files)))


def everything(data: PreferenceDataModule) -> Any:
    table = data.tables["train"]
    return table.batch(range(table.size))


@pytest.mark.parametrize("layout", SOME)
def test_a_layout_is_the_same_with_weights(layout, tmp_path):
    data = read(str(LAYOUTS / f"{layout}.jsonl"))
    before = everything(data)
    first, last = before.indices[0].item(), before.indices[-1].item()
    after = everything(again(data, tmp_path, {first: 0.25, last: 0.5}))
    assert torch.equal(before.input_ids, after.input_ids)
    assert torch.equal(before.comparisons, after.comparisons)
    wanted = {first: 0.25, last: 0.5}
    assert after.columns["weight"].tolist() == [wanted.get(row, 1.0) for row in before.indices.tolist()]
    assert before.columns.keys() <= after.columns.keys()
    for name, values in before.columns.items():
        assert torch.equal(values, after.columns[name]), name


def test_rows_that_no_layout_with_a_weight_has_are_left_out_and_counted(tmp_path):
    data = read(str(LAYOUTS / "implicit_prompt.jsonl"))
    after = everything(again(data, tmp_path, {0: 0.5}, without=1))
    assert after.columns["weight"].tolist() == [0.5, 1.0]


def pairs(path: Path, count: int, **columns: float) -> str:
    rows = [{"prompt": f"{path.stem} {n}?", "chosen": f" {n}", "rejected": " no", **columns} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_mixture_stays_one_and_a_weight_is_multiplied(tmp_path):
    one, other = (
        pairs(tmp_path / "one.jsonl", 4, trust=0.5, mood=3.0),
        pairs(tmp_path / "other.jsonl", 2, trust=2.0, mood=4.0),
    )
    how = formats.Triples(weight="trust", numeric_columns=["mood"])
    data = read({one: 0.7, other: 0.3}, format=how)
    (tmp_path / "out").mkdir()
    after = again(data, tmp_path / "out", {0: 0.5, 5: 0.0})
    assert everything(after).columns["weight"].tolist() == [0.25, 0.5, 0.5, 0.5, 2.0, 0.0]
    assert everything(after).columns["mood"].tolist() == [3.0] * 4 + [4.0] * 2
    assert list(after.sources["train"].values()) == [0.7, 0.3]


def test_pairs_among_rankings_have_no_one_layout(tmp_path):
    ranked = tmp_path / "ranked.jsonl"
    ranked.write_text(json.dumps({"prompt": "Count", "completions": [" 1", " 2"], "ranks": [2, 1]}) + "\n")
    both = {pairs(tmp_path / "pairs.jsonl", 2): 0.5, str(ranked): 0.5}
    assert "no one layout" in Rows(read(both)).why_not_weighted()


def test_rows_of_a_stream_are_found_in_the_table(tmp_path):
    files = [pairs(tmp_path / "one.jsonl", 4), pairs(tmp_path / "other.jsonl", 2)]
    stream, rows = read(files, streaming=True), Rows(read(files))
    numbers = [0, 2, 4, 6, 1, 3]
    found = rows.of_stream(np.array(numbers), stream).tolist()
    assert found == [0, 1, 2, 3, 4, 5]
    for number, row in zip(numbers, found, strict=True):
        assert stream.place("train", number) == rows.table.place(row)
        assert stream.preference("train", number) == rows.table.preference(row)


def test_a_row_that_cannot_be_read_is_left_out_and_the_others_keep_their_weights(tmp_path):
    file = tmp_path / "some.jsonl"
    pairs(file, 3)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], "{broken", *lines[1:]]) + "\n")
    after = again(read(str(file), on_bad_row="drop"), tmp_path, {2: 0.5})
    assert everything(after).columns["weight"].tolist() == [1.0, 0.5, 1.0]


def test_completions_of_a_ranking_are_told_by_what_is_trained_on(tmp_path):
    file = tmp_path / "ranked.jsonl"
    file.write_text(
        json.dumps({"prompt": "Count", "completions": [" one", " two", " three"], "scores": [1, 3, 2]}) + "\n"
    )
    rows = Rows(read(str(file)))
    keys = [(0, 1, 0), (0, 1, 2), (0, 2, 0)]
    rows.decode(dict.fromkeys(keys))
    said = [rows.said(*key) for key in keys]
    assert [(one.chosen.strip(), one.rejected.strip()) for one in said] == [
        ("two", "one"),
        ("two", "three"),
        ("three", "one"),
    ]
    assert {one.place for one in said} == {f"{file}, row 0 (from 0)"}


def test_comparisons_of_a_row_share_their_weight():
    assert row_weights(np.array([3, 3, 5]), np.array([0.0, 1.0, 1.0])) == {3: 0.5, 5: 1.0}
