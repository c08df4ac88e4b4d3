"""What data and their options cannot be is refused in a sentence that names it; and numbers at their edges."""

from __future__ import annotations

import json
import math

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from lit_dpo import PreferenceDataModule
from lit_dpo.data.comparisons import Comparing
from lit_dpo.data.doctor.examine import examine
from lit_dpo.data.doctor.findings import percent
from lit_dpo.data.doctor.shortcuts import wilson
from lit_dpo.data.encoding import read_checked
from lit_dpo.data.formats import ImplicitPrompt, Preference, Triples
from lit_dpo.data.formats.ranked import RankedObjects
from lit_dpo.data.sources import Unread, load_rows
from lit_dpo.data.sources.base import typed
from lit_dpo.data.stream_order import StreamOrder
from lit_dpo.data.streaming import open_stream
from lit_dpo.errors import DataError, LitDPOError

ROW = {"prompt": "p", "chosen": " c", "rejected": " r"}
ROWS = [{**ROW, "prompt": f"p{number}"} for number in range(4)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"val_split": 1.0}, r"`val_split` in \[0, 1\) but got 1.0"),
        ({"val_split": -0.1}, r"`val_split` in \[0, 1\) but got -0.1"),
        ({"num_workers": -1}, "`num_workers` and `seed` >= 0 but got -1 and 0"),
        ({"seed": -1}, "`num_workers` and `seed` >= 0 but got 0 and -1"),
        ({"batch_size": 0}, "`batch_size` >= 1 but got 0"),
        ({"eval_batch_size": 0}, "`eval_batch_size` >= 1 but got 0"),
        ({"group_by_prompt": 1}, "`group_by_prompt` >= 2 .* but got 1"),
        ({"max_length": 1}, "`max_length` >= 2 .* but got 1"),
        ({"max_prompt_length": 8, "max_length": 8}, r"`max_prompt_length` in \[1, max_length=8\) but got 8"),
        ({"max_prompt_length": 0}, r"`max_prompt_length` in \[1, max_length=1024\) but got 0"),
        ({"streaming": True, "deduplicate": True}, "no `deduplicate` with `streaming`"),
        ({"streaming": True, "shuffle_buffer": 0}, "`shuffle_buffer` >= 1 but got 0"),
        ({"on_bad_row": "keep"}, "`on_bad_row` as `error` or `drop` but got 'keep'"),
    ],
)
def test_an_option_beyond_its_edge_is_named_with_what_came(options, said):
    with pytest.raises(ValueError, match=said):
        PreferenceDataModule(train=ROWS, **options)


def test_options_at_their_edges_are_taken(tokenizer_folder):
    edges = {"val_split": 0.0, "num_workers": 0, "seed": 0, "batch_size": 1, "eval_batch_size": 1, "max_length": 3}
    found = PreferenceDataModule(train=ROWS, tokenizer=tokenizer_folder, max_prompt_length=2, **edges)
    assert found.state_dict() == {}, "nothing was read"
    assert found.train_digest is None


def _streamed(rows, folder, **options):
    from torch.utils.data import IterableDataset

    class Rows(IterableDataset):
        def __iter__(self):
            return iter(rows)

    found = PreferenceDataModule(train=Rows(), tokenizer=folder, batch_size=2, streaming=True, **options)
    found.setup("fit")
    return found


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([], {}, "has no rows"),
        ([1, 2, 3], {}, "it is no object .*; and none of the first 3 rows can be read"),
        (ROWS, {"ignore_columns": ["scores"]}, r"in `ignore_columns` but it has no \['scores'\]"),
    ],
)
def test_a_stream_that_cannot_begin_says_why(tokenizer_folder, rows, options, said):
    with pytest.raises(DataError, match=said):
        _streamed(rows, tokenizer_folder, **options)


def test_a_stream_is_known_by_its_first_rows_and_a_row_beyond_its_end_is_none(tokenizer_folder):
    one, same, other = (_streamed(rows, tokenizer_folder) for rows in (ROWS, [*ROWS], [*ROWS[:3], ROW]))
    assert one.train_digest == same.train_digest != other.train_digest
    assert one.preference("train", 3) == Preference("p3", " c", " r")
    with pytest.raises(IndexError, match="it has none of the number 4"):
        one.preference("train", 4)
    bad = _streamed([*ROWS, "no row"], tokenizer_folder, on_bad_row="drop")
    with pytest.raises(LookupError, match=r"Expected a row that is used but .*row 4 .* is not"):
        bad.preference("train", 4)


def test_a_stream_of_several_splits_gives_the_one_that_is_asked_for():
    splits = {"train": datasets.IterableDataset.from_generator(lambda: iter(ROWS))}
    (found,) = open_stream(splits)
    assert found.head(9) == ROWS
    with pytest.raises(DataError, match="Expected a split val in the `dict` given but it has train"):
        open_stream(splits, "val")


def test_what_cannot_be_read_row_by_row_says_why(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    text = str(tmp_path / "a.txt")
    for source, said in ((3, "rows but got a int"), (text, "ends in one of .*jsonl.* but got .*a.txt")):
        with pytest.raises(DataError, match=f"Expected a file.*{said}"):
            open_stream(source)
    (found,) = open_stream(lambda: (ROWS[number] if number < 2 else 1 // 0 for number in range(4)))
    assert found.head(2) == ROWS[:2]
    with pytest.raises(DataError, match=r"row 2 \(from 0\) cannot be read: .*by zero"):
        found.head(3)


def test_a_folder_is_streamed_by_its_split_as_it_is_read(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (found,) = open_stream(f"{tmp_path}:train")
    assert found.head(9) == load_rows(f"{tmp_path}:train", [*ROW])[0].rows.to_list() == ROWS


def test_a_saved_table_that_is_damaged_is_named(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DataError, match="saved` cannot be read: "):
        load_rows(str(tmp_path / "saved"), [*ROW])


def test_rows_that_fail_while_a_table_is_made_of_them_and_tables_of_none():
    with pytest.raises(DataError, match="cannot be read: "):
        load_rows(datasets.IterableDataset.from_generator(lambda: (1 // 0 for _ in range(2))), [*ROW])
    with pytest.raises(DataError, match="has no rows"):
        load_rows(Dataset.from_dict({name: [] for name in ROW}), [*ROW])
    with pytest.raises(DataError, match="Expected rows but x is a dict; choose one of its splits"):
        typed("x", {})


class Doubled(Triples):
    """A row holds two examples, of which the second is its opposite."""

    def examples(self, row):
        return [row, {**row, "chosen": row["rejected"], "rejected": row["chosen"]}]


def test_examples_of_a_row_are_streamed_one_by_one_and_a_bad_row_is_one_of_them():
    given = open_stream([*ROWS[:2], {"prompt": "p"}])
    order = StreamOrder(given, [Doubled()], [[0]], [1.0], 10)
    first, second, third, fourth, bad = order.of_source(0)
    places = [(one.row, one.part) for one in (first, second, third, fourth, bad)]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert (first.raw["chosen"], second.raw["chosen"]) == (ROW["chosen"], ROW["rejected"])
    assert isinstance(bad.raw, Unread)


def test_what_is_wrong_with_all_rows_stops_when_they_are_met(tokenizer_folder):
    """The first rows of a stream may all be bad; or a tokenizer has no template for what they are."""
    bad = _streamed([{**ROW, "chosen": None}] * 4, tokenizer_folder, format=Triples(), on_bad_row="drop")
    with pytest.raises(DataError, match="no row of 4 is left"):
        next(iter(bad.train_dataloader()))


def test_a_prompt_of_more_rows_than_are_merged_at_once_keeps_all_comparisons(tokenizer_folder):
    rows = [{**ROW, "chosen": f" {number}"} for number in range(1001)]
    found = PreferenceDataModule(train=rows, tokenizer=tokenizer_folder, group_by_prompt=600, batch_size=1)
    found.setup("fit")
    table = found.train_dataloader().dataset.table
    assert sorted(table.completions_per_prompt.tolist()) == [403, 600]
    assert table.comparisons_per_prompt.sum() == 1001


def test_a_prompt_of_which_every_row_is_too_long_is_left_out_alone(tokenizer_folder):
    rows = [ROW, {**ROW, "prompt": "long", "chosen": " c" * 99}]
    options = {"group_by_prompt": 2, "truncation": "error", "max_length": 20, "on_bad_row": "drop", "batch_size": 1}
    found = PreferenceDataModule(train=rows, tokenizer=tokenizer_folder, **options)
    found.setup("fit")
    assert found.train_dataloader().dataset.table.size == 1


def test_prompts_that_all_run_in_parts_are_the_largest_microbatches(tokenizer_folder):
    rows = [{"prompt": "p", "completions": [" a", " bb", " ccc" * 9 * size], "scores": [3, 2, 1]} for size in (1, 2)]
    found = PreferenceDataModule(train=rows, tokenizer=tokenizer_folder, batch_size=2)
    found.setup("fit")
    (flat, padded), several = found.train_dataloader().largest_microbatches(math.inf, 1)
    longest = max(found.train_dataloader().dataset.table.side_lengths)
    assert several
    assert [prompt + max(lengths) for prompt, lengths in flat] == [longest]
    assert [prompt + max(lengths) for prompt, lengths in padded] == [longest]


def test_several_tables_are_no_rows():
    with pytest.raises(DataError, match=r"Expected a split|choose one of its splits"):
        load_rows(DatasetDict(one=Dataset.from_list(ROWS)), ["prompt"])


def test_a_split_without_data_is_named_by_its_option(tokenizer_folder):
    found = PreferenceDataModule(train=ROWS, tokenizer=tokenizer_folder)
    found.setup("fit")
    with pytest.raises(LitDPOError, match=r"Expected `val` data but there are none: set `--data.val`"):
        found.preference("val", 0)
    with pytest.raises(IndexError, match=r"Expected a row in \[0, 4\) but got 4"):
        found.preference("train", 4)


def test_what_is_held_out_is_predicted_where_nothing_else_is_set(tokenizer_folder):
    found = PreferenceDataModule(train=ROWS, tokenizer=tokenizer_folder, val_split=0.5)
    found.setup("predict")
    found.setup("fit")
    rows = {name: [row for row, *_ in found.prompts(name, 9)] for name in ("predict", "val", "train")}
    assert rows["predict"] == rows["val"]
    assert sorted(rows["val"] + rows["train"]) == [0, 1, 2, 3]
    alone = PreferenceDataModule(train=[ROW, ROW], tokenizer=tokenizer_folder, val_split=0.5)
    with pytest.raises(DataError, match=r"at least two different prompts for `val_split=0.5` but got 1"):
        alone.setup("fit")


def test_a_row_that_says_both_rank_and_score_or_neither_is_not_read():
    for given in ({"rank": "r", "score": "s"}, {"rank": None, "score": None}):
        with pytest.raises(ValueError, match="Expected one of `rank` and `score` but got"):
            RankedObjects(**given)


def test_a_system_turn_that_a_column_repeats_is_there_once():
    says = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    sides = {side: [*says, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    read = ImplicitPrompt().read
    assert read({**sides, "system": "Be brief."}) == read(sides)
    assert read({**sides, "prompt": says}) == read({**sides, "prompt": says[:1]}) == read(sides)
    assert read({**sides, "system": "Be long."}).prompt[0] == {"role": "system", "content": "Be long."}


@pytest.mark.parametrize("number", [10**400, -(10**400), math.inf, math.nan, -1.0, True])
def test_a_weight_that_is_no_finite_number_names_its_row(tokenizer_folder, number):
    rows = [{**ROW, "weight": 1.0}, {**ROW, "weight": number}]
    format = Triples(weight="weight")
    with pytest.raises(DataError, match=r"row 1 \(from 0\): .*`?weight"):
        _streamed(rows, tokenizer_folder, format=format).train_dataloader().__iter__().__next__()


def test_shares_at_their_edges():
    assert [percent(share) for share in (0, 0.0009, 0.001, 1)] == ["0 %", "< 0.1 %", "0.1 %", "100 %"]
    assert wilson(0, 0) == (0.0, 1.0), "nothing is known"
    assert np.all(np.diff([wilson(right, 10)[0] for right in range(11)]) > 0)


def test_there_is_something_to_inspect(tokenizer_folder):
    with pytest.raises(DataError, match=r"Expected training data to inspect: name a file with `--data.train`"):
        examine({}, None, Comparing())


PAIR = '{"prompt": "q", "chosen": "a", "rejected": "b"}'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("names.csv", '"prompt"x,chosen\n1,2\n', "line 1 is no CSV: "),
        ("twice.csv", "a,a\n1,2\n", "columns of different names but `a` is there more than once"),
        ("empty.csv", "", "is empty"),
        ("five.json", "5", "row 0 .*expected an object .* but got int"),
        ("key.json", "{1: 2}", "row 0 .*line 1 is no JSON: Expecting property name"),
        ("colon.json", '{"m" 1}', "row 0 .*line 1 is no JSON: Expecting ':'"),
        ("bracket.json", '{"a": [1}', "line 1 is no JSON: what begins here does not end"),
        ("comma.json", f"[{PAIR}\n{PAIR}]", "line 2 is no JSON: expected `,` or `]` after an element of the list"),
        ("end.json", f"[{PAIR}", "line 1 is no JSON: expected `,` or `]` after an element of the list"),
        ("after.json", f"[{PAIR}] x", "line 1 is no JSON: expected nothing after the list"),
        ("several.json", f'{{"a": [{PAIR}], "b": [{PAIR}]}}', "several keys hold a list of objects, `a`, `b`"),
        ("value.json", '{"a": [1e9x], "b": [2]}', "row 0 .*line 1 is no JSON: Expecting ','"),
    ],
)
def test_a_file_that_breaks_its_grammar_names_the_line_and_what_is_missing(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name}.*{said}"):
        load_rows(str(tmp_path / name), ["prompt"])


def test_names_as_long_as_a_file_are_names(tmp_path):
    """`csv` stops at 131072 characters unless it is told otherwise, in the header as in the rows."""
    (tmp_path / "long.csv").write_text("x" * 200_000 + ",b\n1," + "y" * 200_000 + "\n")
    (found,) = load_rows(str(tmp_path / "long.csv"), None)
    assert found.rows.column_names == ["x" * 200_000, "b"]
    assert found.head(1) == [{"x" * 200_000: "1", "b": "y" * 200_000}]


@pytest.mark.parametrize("columns", [{"a": {"0": "q"}, "b": {"0": "r"}}, {"a": ["q"], "b": ["r"]}])
def test_columns_of_one_length_are_rows_and_others_a_row(tmp_path, columns):
    (tmp_path / "columns.json").write_text(json.dumps(columns))
    (found,) = load_rows(str(tmp_path / "columns.json"), None)
    assert found.head(9) == [{"a": "q", "b": "r"}]
    other = {"a": columns["a"], "b": type(columns["b"])()}
    (tmp_path / "row.json").write_text(json.dumps(other))
    (found,) = load_rows(str(tmp_path / "row.json"), None)
    assert found.head(9) == [other]


class Huge(Triples):
    """Its pairs have a weight of hundreds of digits."""

    def read(self, row):
        return super().read(row)._replace(columns={"weight": 10**400})


def test_a_format_that_returns_no_finite_number_makes_a_bad_row():
    found = read_checked(ROW, Huge(), Comparing())
    assert found.fatal
    assert "weight" in found.reason
