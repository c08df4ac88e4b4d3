"""`deduplicate` leaves out what was said before, to the token, and nothing else."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from datasets import concatenate_datasets

from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.data.formats import Rankings, Triples
from lit_dpo.data.sameness import completion_ids, prompt_ids, same_examples
from lit_dpo.data.table import PromptTable
from toy_tokenizers import byte_level

ROWS = [{"prompt": f"q{n % 3}", "chosen": f" yes {n % 4}", "rejected": " no", "w": 1.0} for n in range(20)]
DIFFERENT = len({(row["prompt"], row["chosen"]) for row in ROWS})


def table(rows: list[dict[str, Any]], **options: Any) -> PromptTable:
    more = {"format": Triples(weight="w"), "tokenizer": byte_level(), **options}
    data = PreferenceDataModule(rows, **more)
    data.setup("fit")
    return data.tables["train"]


def test_the_first_of_each_stays_with_its_row_number():
    assert DIFFERENT == 12
    kept = table(ROWS, deduplicate=True)
    assert kept.rows.tolist() == [*range(12)]
    assert (kept.size, kept.total, kept.repeated) == (12, 20, 8)
    assert table(ROWS).size == 20
    batch = kept.batch([11])
    assert batch.indices.tolist() == [11]
    assert kept.preference(11).chosen == ROWS[11]["chosen"]


def test_what_differs_in_anything_stays():
    first = {"prompt": "q", "chosen": " a", "rejected": " b", "w": 1.0}
    others = [
        {**first, name: value} for name, value in (("prompt", "Q"), ("chosen", " a."), ("rejected", " c"), ("w", 2.0))
    ]
    turned = {**first, "chosen": " b", "rejected": " a"}
    assert table([first, *others, turned, first], deduplicate=True).rows.tolist() == [0, 1, 2, 3, 4, 5]


def test_rankings_are_the_same_if_all_of_them_is():
    first = {"prompt": "q", "completions": [" a", " b", " c"], "scores": [3.0, 2.0, 1.0]}
    rows = [first, {**first, "scores": [3.0, 1.0, 2.0]}, {**first, "scores": [3.0, 2.0, 0.0]}, first]
    assert table(rows, format=Rankings(), deduplicate=True).rows.tolist() == [0, 1, 2]


def test_rows_are_left_out_before_those_of_a_prompt_are_merged():
    whole, kept = (table(ROWS, group_by_prompt=8, deduplicate=flag) for flag in (False, True))
    assert (whole.size, kept.size) == (3, 3)
    assert (whole.comparisons_count, kept.comparisons_count, kept.repeated) == (20, 12, 8)
    rows = [row for n in range(3) for row in kept.batch([n]).indices.tolist()]
    assert sorted(rows) == [*range(12)]


def test_what_is_dropped_for_its_length_is_counted_by_itself(caplog):
    rows = [*ROWS[:3], ROWS[0], {**ROWS[1], "chosen": " yes" * 40}]
    with caplog.at_level(logging.INFO):
        kept = table(rows, deduplicate=True, max_length=30)
    assert kept.rows.tolist() == [0, 1, 2]
    lines = [record.getMessage() for record in caplog.records]
    assert "train: 1 rows left out: an earlier one says the same (deduplicate)" in lines
    assert "train: 1 of 5 pairs dropped: longer than max_length=30 (truncation=drop)" in lines


def test_that_it_changes_nothing_is_said(caplog):
    with caplog.at_level(logging.INFO):
        table(ROWS[:12], deduplicate=True)
    assert any("`deduplicate` changes nothing" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("share", [0.3])
def test_a_part_that_is_held_out_has_no_copy_either(share):
    data = PreferenceDataModule(
        ROWS, format=Triples(weight="w"), tokenizer=byte_level(), val_split=share, deduplicate=True
    )
    data.setup("fit")
    parts = data.tables
    assert parts["train"].size + parts["val"].size == 12
    for one in parts.values():
        assert same_examples(one).tolist() == [*range(one.size)]


def test_a_run_with_it_is_another_run():
    assert table(ROWS).digest != table(ROWS, deduplicate=True).digest


def test_files_are_merged_anew_when_it_is_switched(jsonl):
    file = jsonl("rows.jsonl", ROWS)
    counts = [table(file, group_by_prompt=8, deduplicate=flag).comparisons_count for flag in (False, True, False)]
    assert counts == [20, 12, 20]


def test_ids_are_found_in_chunks_however_they_are_cut():
    """Tables of many rows are mapped in chunks, of which one may begin in the middle of an array."""
    whole = table(ROWS)
    parts = whole.encoded.select(range(3, 17)).with_format("arrow")
    cut = whole._replace(encoded=concatenate_datasets([parts, whole.encoded]), rows=np.array([1, 2, 13, 15, 30]))
    expected = [[*range(3, 17), *range(20)][row] for row in cut.rows]
    texts = [whole.batch([row]).input_ids[0].tolist()[whole.prompt_lengths[row] :] for row in expected]
    for found, lengths in ((prompt_ids(cut), "prompt_lengths"), (completion_ids(cut), "completion_lengths")):
        assert len(found.ends) == len(getattr(cut, lengths))
        assert (found.ends - found.starts).tolist() == getattr(cut, lengths).tolist()
        last = found.last(3)
        for n in range(len(found.ends)):
            ids = found.of(n).tolist()
            assert [one for one in last[n].tolist() if one >= 0] == ids[-3:]
    completions = completion_ids(cut)
    assert [completions.of(n).tolist() + completions.of(n + 1).tolist() for n in range(0, 10, 2)] == texts
    assert same_examples(cut).tolist() == [0, 1, 0, 3, 0]  # of rows 4, 5, 16, 1, 16, and 16 says what 4 says
