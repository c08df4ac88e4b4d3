"""All bad rows are found in one pass and reported together; with `on_bad_row="drop"` they are left out."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import Dataset

from lit_dpo import PreferenceDataModule
from lit_dpo.data.bad_rows import form
from lit_dpo.data.formats import Preference, PreferenceFormat, Triples
from lit_dpo.errors import DataError

GOOD = {"prompt": "q", "chosen": " a", "rejected": " b"}
LONG = {**GOOD, "chosen": " long" * 30}


def text(*rows: dict | str) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


BROKEN = text(
    GOOD,
    "{",
    {**GOOD, "prompt": 5},
    {**GOOD, "chosen": ""},
    GOOD,
    {**GOOD, "prompt": 6},
    "[]",
    "{",
    {**GOOD, "prompt": None},
    {**GOOD, "prompt": 7},
    *[GOOD] * 10,
)
BAD = [1, 2, 3, 5, 6, 7, 8, 9]


@pytest.fixture
def module(tmp_path, tokenizer_folder):
    """`module(text, **options)`: the data of a file, made ready."""

    def make(content: str, **options) -> PreferenceDataModule:
        path = tmp_path / options.pop("name", "a.jsonl")
        path.write_text(content)
        made = PreferenceDataModule(train=str(path), **{"tokenizer": tokenizer_folder, **options})
        made.setup("fit")
        return made

    return make


def error(module, content: str, **options) -> str:
    with pytest.raises(DataError) as raised:
        module(content, **options)
    return str(raised.value)


def listed(message: str) -> list[dict]:
    """What the file of all bad rows says, which a message names at its end."""
    path = Path(message.rpartition(" in ")[2])
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_all_are_reported_together(module, tmp_path) -> None:
    message = error(module, BROKEN)
    at = tmp_path / "a.jsonl"
    json_ends = "is no JSON: Expecting property name enclosed in double quotes (character 2)"
    assert message.splitlines()[:-1] == [
        "train: 8 of 20 rows cannot be used:",
        "  4: Expected text or a list of messages in `prompt`",
        f"    {at}, row 2 (from 0): Expected text or a list of messages in `prompt` but got int 5.",
        f"    {at}, row 5 (from 0): Expected text or a list of messages in `prompt` but got int 6.",
        f"    {at}, row 8 (from 0): Expected text or a list of messages in `prompt` but got nothing (null).",
        "  2: line … is no JSON: Expecting property name enclosed in double quotes (character …)",
        f"    {at}, row 1 (from 0): line 2 {json_ends}.",
        f"    {at}, row 7 (from 0): line 8 {json_ends}.",
        f"  1: {at}, row 3 (from 0): Expected a completion in `chosen` but got ''.",
        f"  1: {at}, row 6 (from 0): line 7: expected an object {{…}} but got list.",
    ]
    assert "`--data.on_bad_row drop` leaves them out." in message
    found = listed(message)
    assert [one["row"] for one in found] == BAD
    assert {one["file"] for one in found} == {str(at)}
    assert found[0] == {
        "file": str(at),
        "row": 1,
        "line": 2,
        "reason": f"line 2 {json_ends}",
        "raw": "{",
    }
    assert found[1]["raw"] == {**GOOD, "prompt": 5}


def test_they_are_dropped_and_counted(module, caplog) -> None:
    with caplog.at_level(logging.INFO):
        made = module(BROKEN, on_bad_row="drop")
    table = made._table("train")
    assert (table.size, table.total) == (12, 20)
    assert table.rows.tolist() == [0, 4, *range(10, 20)]
    assert [row for row, _ in table.bad] == BAD
    assert made.place("train", 4).endswith("a.jsonl, row 4 (from 0)")
    assert table.dropped == Counter(
        {
            "Expected text or a list of messages in `prompt`": 4,
            "line … is no JSON: Expecting property name enclosed in double quotes (character …)": 2,
            "Expected a completion in `chosen`": 1,
            "line …: expected an object {…}": 1,
        }
    )
    (warning,) = (one.getMessage() for one in caplog.records if one.levelno == logging.WARNING)
    assert warning.startswith("train: 8 of 20 rows cannot be used:")
    assert "`on_bad_row=drop` leaves them out." in warning
    assert [one["row"] for one in listed(warning)] == BAD
    assert "train: 8 of 20 pairs dropped: 4 Expected text" in caplog.text


def test_the_cache_says_the_same_whatever_the_option(module, caplog) -> None:
    first = error(module, BROKEN)
    assert error(module, BROKEN) == first
    with caplog.at_level(logging.WARNING):
        module(BROKEN, on_bad_row="drop")
    assert listed(caplog.records[-1].getMessage()) == listed(first)
    assert error(module, BROKEN) == first


@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
def test_one_bad_row_is_one_sentence(module, tmp_path, caplog, on_bad_row) -> None:
    said = f"{tmp_path / 'a.jsonl'}, row 1 (from 0): Expected a completion in `chosen` but got ''."
    content = text(GOOD, {**GOOD, "chosen": ""})
    if on_bad_row == "error":
        assert error(module, content).startswith(f"{said}\n`--data.on_bad_row drop` leaves it out. It is in ")
    else:
        module(content, on_bad_row="drop")
        (warning,) = (one.getMessage() for one in caplog.records if one.levelno == logging.WARNING)
        assert warning.startswith(f"{said}\n`on_bad_row=drop` leaves it out. It is in ")


@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
@pytest.mark.parametrize("bad", ["{", {**GOOD, "chosen": ""}, LONG])
def test_a_file_of_bad_rows_alone_is_an_error(module, bad, on_bad_row) -> None:
    options = {"max_length": 40, "truncation": "error", "format": Triples(), "on_bad_row": on_bad_row}
    message = error(module, text(bad, bad), **options)
    assert "2 of 2 rows" in message
    assert "row 1 (from 0)" in message


def test_one_of_two_files_has_bad_rows_alone(tmp_path, tokenizer_folder, jsonl) -> None:
    files = [jsonl("a.jsonl", [GOOD]), jsonl("b.jsonl", [{**GOOD, "chosen": ""}])]
    made = PreferenceDataModule(train=files, tokenizer=tokenizer_folder, format=Triples(), on_bad_row="drop")
    with pytest.raises(DataError, match=r"No row of .*b\.jsonl can be used"):
        made.setup("fit")


def test_true_lines_where_they_are_not_the_rows(module, tmp_path) -> None:
    content = "\n\n" + text(GOOD) + "\n" + text({**GOOD, "chosen": ""})
    assert error(module, content).startswith(f"{tmp_path / 'a.jsonl'}, line 5, row 1 (from 0): Expected a completion")
    rows = json.dumps([GOOD, {**GOOD, "chosen": ""}], indent=1)
    assert error(module, rows, name="a.json").startswith(f"{tmp_path / 'a.json'}, line 7, row 1 (from 0): ")
    cells = 'prompt,chosen,rejected\n"a\nb",x,y\nc,,z\n'
    assert error(module, cells, name="a.csv").startswith(f"{tmp_path / 'a.csv'}, line 4, row 1 (from 0): ")


def test_several_files_are_one_report(tokenizer_folder, jsonl) -> None:
    bad = {**GOOD, "chosen": ""}
    files = [jsonl("a.jsonl", [GOOD, bad]), jsonl("b.jsonl", [bad, GOOD, GOOD, bad])]
    with pytest.raises(DataError) as raised:
        PreferenceDataModule(train=files, tokenizer=tokenizer_folder).setup("fit")
    message = str(raised.value)
    assert "3 of 6 rows" in message
    assert [(one["file"], one["row"]) for one in listed(message)] == [(files[0], 1), (files[1], 0), (files[1], 3)]


def test_too_long_rows_are_reported_together(module) -> None:
    content = text(GOOD, LONG, GOOD, LONG, {**GOOD, "prompt": 5})
    message = error(module, content, max_length=40, truncation="error")
    assert "3 of 5 rows" in message
    assert [one["row"] for one in listed(message)] == [1, 3, 4]
    assert "  2: longer than max_length=… (… tokens, … of them the prompt)" in message
    made = module(content, max_length=40, truncation="error", on_bad_row="drop")
    assert made._table("train").rows.tolist() == [0, 2]


@pytest.mark.parametrize("truncation", ["drop", "error"])
def test_groups_leave_bad_rows_alone(module, truncation) -> None:
    """Bad rows have no prompt in common, and a row that is too long does not take its group with it."""
    rows = text(GOOD, {**GOOD, "chosen": ""}, {**GOOD, "chosen": " c"}, LONG, "{", {**GOOD, "chosen": " d"})
    options = {"group_by_prompt": 8, "max_length": 40, "truncation": truncation}
    made = module(rows, on_bad_row="drop", **options)
    table = made._table("train")
    assert table.size == 1
    assert table.batch([0]).indices.tolist() == [0, 2, 5]
    bad = [1, 3, 4] if truncation == "error" else [1, 4]
    assert [row for row, _ in table.bad] == bad
    message = error(module, rows, **options)
    assert [one["row"] for one in listed(message)] == bad
    assert f"{len(bad)} of 6 rows" in message


def test_the_first_rows_may_be_bad(module) -> None:
    """Neither the layout nor the columns of numbers come from them."""
    rows = [{**GOOD, "weight": 2.0}] * 9
    content = text("{", "[]", {**GOOD, "chosen": "", "weight": 1.0}, *rows)
    made = module(content, on_bad_row="drop")
    assert made._table("train").size == 9
    weighted = module(content, on_bad_row="drop", format=Triples(weight="weight"))
    assert weighted._table("train").columns == ("weight",)
    assert weighted._table("train").batch([0]).columns["weight"].tolist() == [2.0]


def test_many_kinds_are_twenty_lines(module) -> None:
    kinds = [
        {**GOOD, "chosen": [{"role": "user", "content": "x"} for _ in range(n % 7)], f"k{n}": n} for n in range(40)
    ]
    odd = [f'{{"a": 1, "{"b" * n}": 1, "{"b" * n}": 2}}' for n in range(1, 40)]
    message = error(module, text(GOOD, *kinds, *odd), format=Triples())
    assert len(message.splitlines()) <= 20
    assert " other reasons\n" in message
    assert len(listed(message)) == 79
    assert max(map(len, message.splitlines())) < 400


def test_the_columns_of_numbers_of_other_rows(module) -> None:
    rows = [{**GOOD, "x": 1.0}, GOOD, {**GOOD, "x": 2.0}, GOOD]
    message = error(module, text(*rows), format=Numbers())
    assert [one["row"] for one in listed(message)] == [1, 3]
    assert "  2: Expected the columns of numbers of the first row, x, in every row" in message


@dataclass(frozen=True)
class Numbers(PreferenceFormat):
    """A user's own, that fails where a cell is missing."""

    columns = ("prompt", "chosen", "rejected", "x")

    def read(self, row):
        return Preference(
            row["prompt"].strip(), row["chosen"], row["rejected"], {"x": row["x"]} if row["x"] is not None else {}
        )


def test_a_format_that_fails_says_where(module) -> None:
    rows = [{**GOOD, "x": 1.0}, {**GOOD, "prompt": None, "x": 1.0}]
    message = error(module, text(*rows), format=Numbers())
    assert "row 1 (from 0): `Numbers` cannot read it: AttributeError: 'NoneType' object" in message
    assert "(test_bad_rows.py, line " in message
    assert module(text(*rows), format=Numbers(), on_bad_row="drop")._table("train").size == 1


@dataclass(frozen=True)
class Offline(Numbers):
    """What it needs is not there: no fault of the row."""

    def read(self, row):
        raise OSError("no network")


def test_other_failures_are_none_of_the_rows(module) -> None:
    with pytest.raises(OSError, match="no network"):
        module(text({**GOOD, "x": 1.0}), format=Offline(), on_bad_row="drop")


def test_rows_that_are_held(tokenizer_folder) -> None:
    rows = Dataset.from_list([GOOD, {**GOOD, "chosen": ""}, {**GOOD, "rejected": None}])
    with pytest.raises(DataError) as raised:
        PreferenceDataModule(train=rows, tokenizer=tokenizer_folder, format=Triples()).setup("fit")
    assert [one["raw"]["rejected"] for one in listed(str(raised.value))] == [" b", None]


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected `on_bad_row` as `error` or `drop` but got 'skip'"):
        PreferenceDataModule(on_bad_row="skip")


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("Expected text in `response_1` but got 'a 5 b'.", "Expected text in `response_1`"),
        ("Expected text in message 12 of `chosen` but it is empty.", "Expected text in message … of `chosen`"),
        ("Expected 3 cells, as many as columns, but got 4: why", "Expected … cells, as many as columns"),
        ("it holds 'x\\'y' and \"z\" and 1,000.5", "it holds … and … and …"),
    ],
)
def test_rows_are_counted_by_what_is_not_their_own(reason, kind) -> None:
    assert form(reason) == kind
