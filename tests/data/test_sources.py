from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset

from lit_dpo.data.sources import load_rows
from lit_dpo.data.streaming import open_stream
from lit_dpo.errors import DataError

COLUMNS = ("prompt", "chosen", "rejected")
ROWS = [{"prompt": "q", "chosen": "None", "rejected": "NA"}, {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}]


def csv_text() -> str:
    return "prompt,chosen,rejected\n" + "".join(",".join(row.values()) + "\n" for row in ROWS)


def jsonl_text() -> str:
    return "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path: Path) -> str:
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(jsonl_text().encode()))
    elif path.suffix == ".parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        path.write_text({".json": json.dumps(ROWS), ".jsonl": jsonl_text(), ".csv": csv_text()}[path.suffix])
    return str(path)


def fail(source, columns=COLUMNS) -> str:
    with pytest.raises(DataError) as error:
        load_rows(source, columns)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "odd [1] *.jsonl"])
def test_every_file_type_gives_the_same_text(tmp_path: Path, name: str) -> None:
    (source,) = load_rows(write(tmp_path / name), COLUMNS)
    assert source.rows.to_list() == ROWS
    assert source.name == str(tmp_path / name)


def test_patterns_and_lists_give_one_source_per_file(tmp_path: Path) -> None:
    names = [write(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.csv")]
    assert [source.name for source in load_rows(str(tmp_path / "*.jsonl"), COLUMNS)] == names[:2]
    assert [source.name for source in load_rows(names[::-1], COLUMNS)] == names[::-1]


def test_other_columns_are_left_out(jsonl) -> None:
    path = jsonl("a.jsonl", [{**row, "score": index} for index, row in enumerate(ROWS)])
    assert load_rows(path, COLUMNS)[0].rows.to_list() == ROWS


def test_a_dataset_object_and_a_folder(tmp_path: Path) -> None:
    assert load_rows(Dataset.from_list(ROWS), COLUMNS)[0].rows.to_list() == ROWS
    write(tmp_path / "train.jsonl")
    (source,) = load_rows(f"{tmp_path}:train", COLUMNS)
    assert (source.name, source.rows.to_list()) == (f"{tmp_path}:train", ROWS)
    assert "Expected a split" not in source.name


def test_a_split_must_be_chosen_where_there_are_several(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl")
    message = fail(str(tmp_path))
    assert f"{tmp_path}:train" in message
    assert "test" in message


def test_a_missing_file_is_not_looked_up_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "pairs_train.jsonl")
    monkeypatch.chdir(tmp_path)
    message = fail("pairs_tran.jsonl")
    assert str(tmp_path / "pairs_tran.jsonl") in message
    assert "`pairs_train.jsonl`" in message
    assert "no folder" in fail("nowhere/pairs.jsonl")
    assert "File not found" in fail("./data/pairs")
    assert "File not found" in fail("*.csv")


def test_an_unknown_suffix_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert "`.jsonl`" in fail(str(tmp_path / "a.txt"))


def test_a_missing_column_is_named_with_those_there_are(jsonl) -> None:
    path = jsonl("a.jsonl", [{"request": "q", "chosen": "a", "rejected": "b"}])
    message = fail(path)
    assert all(word in message for word in (path, "`prompt` is missing", "`request`", "--data.format.prompt"))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n\n", "no rows"),
        ("a.json", "[]", "no rows"),
        ("a.csv", "prompt,chosen,rejected\n", "no rows"),
        ("a.jsonl", '{"prompt": "q", "chosen": "a", "rejected": "b"}\n{"prompt": "q",\n', "line 2 is no JSON"),
        ("a.jsonl", '{"prompt": "q", "chosen": "a", "rejected": "b"}\n["q"]\n', "line 2: expected an object"),
        ("a.json", '[{"prompt": "q"},\n{"prompt" "q"}]', "line 2 is no JSON"),
        ("a.json", '{"prompt": "q"}\n{"prompt" "q"}', "line 2 is no JSON"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    message = fail(str(tmp_path / name))
    assert str(tmp_path / name) in message
    assert words in message


@pytest.mark.parametrize("source", [[], "", 3, [""]])
def test_what_is_no_source_is_refused(source) -> None:
    assert "Expected a file" in fail(source)


def test_the_quickstart_is_train_and_val(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lit_dpo.quickstart

    monkeypatch.setattr(lit_dpo.quickstart, "quickstart_directory", lambda: tmp_path)
    for name in ("train", "val"):
        write(tmp_path / f"{name}.jsonl")
    for stage, name in (("train", "train"), ("val", "val"), ("test", "val"), ("predict", "val")):
        assert load_rows("lit-dpo/quickstart", COLUMNS, stage=stage)[0].name == str(tmp_path / f"{name}.jsonl")
        assert [one.name for one in open_stream("lit-dpo/quickstart", stage)] == [str(tmp_path / f"{name}.jsonl")]
