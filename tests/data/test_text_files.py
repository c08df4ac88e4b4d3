"""Text files are read as what they say: every value, encoding, compression and line; or refused in a sentence."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import math
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import datasets
import pandas
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from lit_dpo.data.sources import load_rows
from lit_dpo.data.sources.base import cache_root
from lit_dpo.data.sources.json_rows import DEEPEST, checked
from lit_dpo.errors import DataError

ROWS = [
    {"prompt": "Où ça, «café»?", "chosen": "là\tbas", "rejected": "“ici”"},
    {"prompt": "2\n+ 2?", "chosen": "4", "rejected": "5"},
]
SIMPLE = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "r", "chosen": "c", "rejected": "d"}]


def as_jsonl(rows: list[dict], **options) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, **options) + "\n" for row in rows)


def as_csv(rows: list[dict], delimiter: str = ",") -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def read(path: Path, content: str | bytes, **options) -> list[dict]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (source,) = load_rows(str(path), None, **options)
    return source.rows.to_list()


def refused(path: Path, content: str | bytes, **options) -> str:
    with pytest.raises(DataError) as error:
        read(path, content, **options)
    assert str(path) in str(error.value)
    return str(error.value)


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".zst": zst, ".bz2": bz2.compress, ".xz": lzma.compress}
WRITE = {
    ".jsonl": as_jsonl,
    ".json": lambda rows: json.dumps(rows, indent=1),
    ".csv": as_csv,
    ".tsv": lambda rows: as_csv(rows, "\t"),
}


# --- compressions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", WRITE)
def test_every_kind_is_read_compressed(tmp_path, suffix, compression) -> None:
    content = COMPRESS[compression](WRITE[suffix](ROWS).encode())
    assert read(tmp_path / f"a{suffix}{compression}", content) == ROWS
    assert read(tmp_path / f"B{suffix.upper()}{compression.upper()}", content) == ROWS


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_damaged_file_is_refused(tmp_path, compression) -> None:
    """Half of it is not the half of its rows."""
    rows = [{"prompt": str(number**5), "chosen": "a", "rejected": "b"} for number in range(5000)]
    content = COMPRESS[compression](as_jsonl(rows).encode())
    for number, wrong in enumerate((content[: len(content) // 2], b"\n" + content, as_jsonl(ROWS).encode())):
        assert "is damaged, or not what its name says" in refused(tmp_path / f"{number}.jsonl{compression}", wrong)


def test_several_members_are_all_read(tmp_path) -> None:
    """As `cat a.gz b.gz` and parallel compressors write them."""
    for suffix, compress in COMPRESS.items():
        content = b"".join(compress(as_jsonl([row]).encode()) for row in ROWS)
        assert read(tmp_path / f"a.jsonl{suffix}", content) == ROWS


# --- encodings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITE)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_an_encoding_that_the_file_declares(tmp_path, suffix, encoding) -> None:
    assert read(tmp_path / f"a{suffix}", WRITE[suffix](ROWS).encode(encoding)) == ROWS


@pytest.mark.parametrize("suffix", WRITE)
@pytest.mark.parametrize("encoding", ["cp1252", "gb18030", "cp1251"])
def test_another_encoding_is_named_by_the_user(tmp_path, suffix, encoding) -> None:
    """No guess: these decode each other's texts. What the first line says in each is shown."""
    text = {"cp1252": "Où ça?", "gb18030": "你好吗", "cp1251": "Как дела?"}[encoding]
    rows = [{"prompt": text, "chosen": "a", "rejected": "b"}] * 3
    text_of_all = as_jsonl(rows) if suffix == ".jsonl" else WRITE[suffix](rows)
    if suffix == ".json":
        text_of_all = json.dumps(rows, ensure_ascii=False)
    path = tmp_path / f"a{suffix}"
    message = refused(path, text_of_all.encode(encoding))
    assert "is no UTF-8" in message
    assert f"{encoding}: " in message
    assert text in message
    assert read(path, text_of_all.encode(encoding), encoding=encoding) == rows
    assert read(path, text_of_all.encode(), encoding=encoding) == rows  # UTF-8 stays what it is


def test_an_encoding_that_nobody_knows(tmp_path) -> None:
    assert "`utf-9`" in refused(tmp_path / "a.jsonl", as_jsonl(ROWS), encoding="utf-9")


def test_an_encoding_without_text_files_changes_nothing(tmp_path, caplog) -> None:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    with caplog.at_level(logging.INFO):
        load_rows(str(tmp_path / "a.parquet"), None, encoding="cp1252")
    assert "`encoding=cp1252` changes nothing" in caplog.text


def test_a_cut_utf_16_file(tmp_path) -> None:
    assert "is no utf-16-le: " in refused(tmp_path / "a.jsonl", as_jsonl(ROWS).encode("utf-16-le")[:-3])


def test_one_bad_byte_is_one_bad_row(tmp_path) -> None:
    content = (as_jsonl(ROWS) * 3).encode() + '{"prompt": "caf\udce9"}\n'.encode("utf-8", "surrogateescape")
    assert r"row 6 (from 0): line 7 holds a byte that is no text, \xe9" in refused(tmp_path / "a.jsonl", content)
    content = as_csv(ROWS).encode() + b"caf\xe9,a,b\r\n"
    assert r"row 2 (from 0): line 5 holds a byte that is no text, \xe9" in refused(tmp_path / "a.csv", content)


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_values_are_what_the_file_says(tmp_path) -> None:
    """Each of these came out changed when a table with types was made of them."""
    rows = [
        {"date": "2024-01-01", "mixed": '"Hello."', "nested": {"a": 1}, "number": 1, "list": [1, "a", None]},
        {"date": "2024-02-30T00:00:00Z", "mixed": 5, "nested": {"b": "x"}, "number": 10**30, "list": []},
        {"date": "2024-01-03", "mixed": ["a"], "nested": {"a": None}, "number": 1.0, "list": [{"a": 1}, {"b": 2}]},
    ]
    found = read(tmp_path / "a.jsonl", as_jsonl(rows))
    assert found == rows
    assert [json.dumps(row) for row in found] == [json.dumps(row) for row in rows]  # 1 is not 1.0, keys in order
    assert read(tmp_path / "a.json", json.dumps(rows)) == rows


def test_a_column_that_a_row_lacks_is_null(tmp_path) -> None:
    assert read(tmp_path / "a.jsonl", '{"a": 1}\n{"b": 2}\n') == [{"a": 1, "b": None}, {"a": None, "b": 2}]


def test_numbers_that_python_writes(tmp_path) -> None:
    (row,) = read(tmp_path / "a.jsonl", '{"a": NaN, "b": Infinity, "c": 1e999}\n')
    assert math.isnan(row["a"])
    assert row["b"] == row["c"] == math.inf


def test_lines_end_where_lines_end(tmp_path) -> None:
    """Some texts hold what `str.splitlines` takes for an end."""
    rows = [{"prompt": "a\u2028b\x85c\u2029\x0bd", "chosen": "x", "rejected": "y"}] * 2
    assert read(tmp_path / "a.jsonl", as_jsonl(rows)) == rows
    assert read(tmp_path / "b.jsonl", as_jsonl(rows).replace("\n", "\r\n\r\n \t\n").rstrip()) == rows
    assert read(tmp_path / "c.csv", as_csv(rows)) == rows


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "q",', "line 4 is no JSON: "),
        ('{"prompt": "a\tb"}', "line 4 is no JSON: Invalid control character at (character 14)"),
        ("[1]", "line 4: expected an object {…} but got list"),
        ('{"a": 1, "a": 2}', "Expected each key once in an object but `a` is there twice"),
        ('{"a": {"b": 1, "b": 1}}', "`b` is there twice"),
        ('{"\\ud83d": 1, "\\ud83d": 1}', r"`\ud83d` is there twice"),
        ('{"a": "\\ud83d"}', "a lone surrogate"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ('{"a": ' + "[" * 10_000 + "]" * 10_000 + "}", f"at most {DEEPEST} levels"),
        ('{"a": ' + '{"a": ' * 3000 + "1" + "}" * 3000 + "}", f"at most {DEEPEST} levels"),
        ('{"a": ' + "[" * DEEPEST + "]" * DEEPEST + "}", f"at most {DEEPEST} levels"),
    ],
)
def test_a_line_that_is_no_row(tmp_path, line, words) -> None:
    path, text = tmp_path / "a.jsonl", as_jsonl(SIMPLE) + "\n" + line + "\n" + as_jsonl(SIMPLE)
    message = refused(path, text)
    assert message.startswith(f"{path}, line 4, row 2 (from 0): ")
    assert words in message
    (source,) = load_rows(str(path), None, keep_bad=True)
    assert len(source.rows) == 5
    assert [source.rows[number]["prompt"] for number in (0, 1, 3, 4)] == ["q", "r"] * 2
    assert source.head(3) == [source.rows[0], source.rows[1], source.rows[3]]
    with pytest.raises(DataError):
        source.rows[2]


def test_nesting_up_to_the_limit_is_read(tmp_path) -> None:
    text = '{"a": ' + "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1) + "}"
    assert read(tmp_path / "a.jsonl", text) == [json.loads(text)]
    flat = json.dumps({"a": [[] for _ in range(DEEPEST * 2)]})
    assert not checked(flat, 1).reason


def test_several_bad_lines_are_named_together(tmp_path) -> None:
    message = refused(tmp_path / "a.jsonl", as_jsonl(SIMPLE) + "x\ny\n")
    assert "2 of 4 rows" in message
    assert "line 3 is no JSON" in message
    assert "line 4 is no JSON" in message


@pytest.mark.parametrize(
    "document",
    [
        SIMPLE,
        {"data": SIMPLE},
        {"version": 1, "data": SIMPLE, "notes": [{"by": "me"}]},
        {"version": "1.0", "examples": SIMPLE},
        {name: [row[name] for row in SIMPLE] for name in SIMPLE[0]},
        {name: {str(number): row[name] for number, row in enumerate(SIMPLE)} for name in SIMPLE[0]},
    ],
    ids=["list", "data", "data and more", "one key", "columns", "columns of pandas"],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_documents(tmp_path, document, indent) -> None:
    assert read(tmp_path / "a.json", json.dumps(document, indent=indent)) == SIMPLE


def test_a_document_of_one_row(tmp_path) -> None:
    turn = [{"role": "user", "content": "q"}]
    for row in (SIMPLE[0], dict.fromkeys(SIMPLE[0], turn), {"messages": turn, "chosen": "a", "rejected": "b"}):
        assert read(tmp_path / "a.json", json.dumps(row)) == [row]


def test_pandas_own_files(tmp_path) -> None:
    frame = pandas.DataFrame(ROWS)
    frame.to_json(tmp_path / "a.json")
    frame.to_json(tmp_path / "b.json", orient="records", lines=True)
    frame.to_csv(tmp_path / "c.csv")
    frame.to_csv(tmp_path / "d.csv", index=False)
    frame.set_index("prompt", drop=False).reset_index(drop=True).to_parquet(tmp_path / "e.parquet")
    pandas.concat([frame, frame]).drop_duplicates().to_parquet(tmp_path / "f.parquet")
    pandas.read_csv(tmp_path / "c.csv").to_csv(tmp_path / "g.csv")
    for name in ("a.json", "b.json", "c.csv", "d.csv", "e.parquet", "f.parquet", "g.csv"):
        (source,) = load_rows(str(tmp_path / name), None)
        assert source.rows.to_list() == ROWS, name


def test_a_list_in_a_file_of_lines(tmp_path) -> None:
    for indent in (None, 1):
        assert read(tmp_path / f"{indent}.jsonl", "\n" + json.dumps(SIMPLE, indent=indent)) == SIMPLE


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps(SIMPLE, indent=1)[:-12], "line 7 is no JSON: what begins here does not end"),
        (json.dumps({"data": SIMPLE}, indent=1)[:-12], "line 1 is no JSON: what begins here does not end"),
        (json.dumps(SIMPLE) + "\n]", "line 2 is no JSON: expected nothing after the list"),
        ('[{"a": 1}\n{"a": 2}]', "line 2 is no JSON: expected `,` or `]`"),
        (json.dumps({"train": SIMPLE, "test": SIMPLE}), "several keys hold a list of objects, `train`, `test`"),
    ],
)
def test_a_document_that_cannot_be_read(tmp_path, text, words) -> None:
    assert words in refused(tmp_path / "a.json", text)


def test_bad_elements_of_a_list(tmp_path) -> None:
    deep = '{"a": ' + "[" * 10_000 + "]" * 10_000 + "}"
    good = json.dumps(SIMPLE[0])
    path = tmp_path / "a.json"
    path.write_text("[" + ",\n".join([good, '{"prompt" "q, ]"}', deep, "5", '{"a": "\t}"}', good]) + "]")
    (source,) = load_rows(str(path), None, keep_bad=True)
    assert [number for number, _ in source.rows.unread] == [1, 2, 3, 4]
    assert source.place(4) == f"{path}, row 4 (from 0)"  # on line 5
    assert source.rows[5] == source.rows[0]


# --- CSV -------------------------------------------------------------------------------------------------------------

HEADER = "prompt,chosen,rejected\n"


@pytest.mark.parametrize("line", ["hello, you,x,y", "x,y", "x", "a,b,c,"])
def test_a_row_of_another_length(tmp_path, line) -> None:
    path = tmp_path / "a.csv"
    text = HEADER + '"a\nb",c,d\n\n' + line + "\ne,f,g\n"
    message = refused(path, text)
    assert message.startswith(f"{path}, line 5, row 1 (from 0): Expected 3 cells, as many as columns, but got ")
    (source,) = load_rows(str(path), None, keep_bad=True)
    assert [row["prompt"] for row in source.head(9)] == ["a\nb", "e"]


@pytest.mark.parametrize("keep_bad", [False, True])
def test_a_comma_in_every_row_shifts_nothing(tmp_path, keep_bad) -> None:
    message = refused(tmp_path / "a.csv", HEADER + "Hello, you,x,y\n" * 4, keep_bad=keep_bad)
    assert "4 of 4 rows" in message
    assert "a cell that holds a comma is written in quotes" in message


def test_quotes(tmp_path) -> None:
    assert read(tmp_path / "a.csv", HEADER + '"a ""b"" c","x,y",\n')[0]["prompt"] == 'a "b" c'
    assert "line 2 is no CSV" in refused(tmp_path / "b.csv", HEADER + '"a"b,c,d\n')
    assert "line 3: a quote opens" in refused(tmp_path / "c.csv", HEADER + "a,b,c\n" + 'a,"b,c\n' + "a,b,c\n" * 9)


def test_long_cells(tmp_path) -> None:
    rows = [{**SIMPLE[0], "chosen": "a" * 300_000}]
    assert read(tmp_path / "a.csv", as_csv(rows)) == rows


@pytest.mark.parametrize(("sign", "word"), [(";", "semicolon"), ("\t", "tab"), ("|", "bar")])
def test_other_separators_are_said(tmp_path, caplog, sign, word) -> None:
    rows = [{"prompt": "Hello, you", "chosen": "a, b", "rejected": "c"}] * 2
    path = tmp_path / "a.csv"
    for _ in range(2):  # from the cache, too
        with caplog.at_level(logging.INFO):
            assert read(path, as_csv(rows, sign)) == rows
        assert caplog.text.count(f"{path}: cells are separated by {word}s") == 1
        caplog.clear()


def test_columns_that_pandas_adds_are_no_columns(tmp_path) -> None:
    text = ",prompt,chosen,rejected,Unnamed: 0.1\n0,q,a,b,0\n"
    assert read(tmp_path / "a.csv", text) == SIMPLE[:1]
    table = Dataset.from_list([{**SIMPLE[0], "Unnamed: 0": 0, "__index_level_0__": 0}])
    table.to_parquet(tmp_path / "a.parquet")
    assert load_rows(str(tmp_path / "a.parquet"), None)[0].rows.to_list() == SIMPLE[:1]


def test_columns_of_the_same_name(tmp_path) -> None:
    message = refused(tmp_path / "a.csv", "prompt,chosen,prompt\na,b,c\n")
    assert "`prompt` is there more than once" in message


# --- tables ----------------------------------------------------------------------------------------------------------


def test_arrow_files(tmp_path) -> None:
    table = pa.Table.from_pylist(ROWS)
    for name, new in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        assert load_rows(str(tmp_path / name), None)[0].rows.to_list() == ROWS
    (tmp_path / "no.arrow").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"no\.arrow` cannot be read"):
        load_rows(str(tmp_path / "no.arrow"), None)


def test_saved_folders(tmp_path) -> None:
    table, folder = Dataset.from_list(ROWS), tmp_path / "table"
    table.save_to_disk(folder)
    assert load_rows(str(folder), None)[0].rows.to_list() == ROWS
    with pytest.raises(DataError, match="is one table, without splits"):
        load_rows(f"{folder}:train", None)
    both = tmp_path / "both"
    DatasetDict(train=table, test=table.select([1])).save_to_disk(both)
    (source,) = load_rows(f"{both}:test", None)
    assert (source.name, source.rows.to_list()) == (f"{both}:test", ROWS[1:])
    for name, words in ((f"{both}", f"`{both}:train`"), (f"{both}:nine", "got `nine`")):
        with pytest.raises(DataError, match="has train, test") as error:
            load_rows(name, None)
        assert words in str(error.value)


def test_a_folder_of_text_files(tmp_path, caplog) -> None:
    """Read as files are, not as `datasets` would."""
    rows = [{"prompt": "2024-01-01", "chosen": '"a"', "rejected": {"x": 1}}, {"prompt": 5, "chosen": 1, "rejected": {}}]
    (tmp_path / "train-0.jsonl").write_text(as_jsonl(rows))
    (tmp_path / "test.jsonl").write_text(as_jsonl(rows[:1]))
    (source,) = load_rows(f"{tmp_path}:train", None)
    assert (source.name, source.rows.to_list()) == (f"{tmp_path}:train", rows)
    (one,) = load_rows(f"{tmp_path}:train[:1]", ["rejected"])  # by `datasets`, which needs another library for `.zst`
    assert len(one.rows) == 1
    (tmp_path / "train-1.jsonl.zst").write_bytes(zst(as_jsonl(rows[1:]).encode()))
    both = load_rows(f"{tmp_path}:train", None)
    assert [one.name for one in both] == [f"{tmp_path}:train, train-{number}" for number in ("0.jsonl", "1.jsonl.zst")]
    assert [one.rows.to_list() for one in both] == [rows, rows[1:]]


def test_a_saved_folder_that_changes_under_its_times(tmp_path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "a")
    (before,) = load_rows(str(tmp_path / "a"), None)
    times = {file.name: file.stat() for file in (tmp_path / "a").iterdir()}
    other = [{**row, "prompt": row["prompt"][::-1]} for row in ROWS]
    Dataset.from_list(other).save_to_disk(tmp_path / "b")
    for file in (tmp_path / "b").iterdir():
        os.replace(file, tmp_path / "a" / file.name)
        if file.name in times:
            os.utime(tmp_path / "a" / file.name, ns=(times[file.name].st_atime_ns, times[file.name].st_mtime_ns))
    (after,) = load_rows(str(tmp_path / "a"), None)
    assert after.rows.to_list() == other
    assert after.content != before.content


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITE)
def test_other_bytes_under_the_same_time(tmp_path, suffix) -> None:
    path, other = tmp_path / f"a{suffix}", [{**row, "chosen": row["chosen"][::-1]} for row in ROWS]
    assert read(path, WRITE[suffix](ROWS)) == ROWS
    before = path.stat()
    path.write_bytes(WRITE[suffix](other).encode())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_rows(str(path), None)[0].rows.to_list() == other


def test_the_second_time_parses_nothing(tmp_path) -> None:
    """Nor does another name of the same bytes."""
    path = tmp_path / "a.jsonl"
    rows = [{"here": 1, **row} for row in ROWS]
    assert read(path, as_jsonl(rows)) == rows

    def written() -> list[int]:
        (source,) = load_rows(str(path), None)
        assert source.rows.to_list() == rows
        return [file.stat().st_ino for file in sorted(source.cache.glob("rows.*"))]

    before = written()
    path = path.rename(tmp_path / "b.jsonl")
    assert written() == before
    assert len(before) == 3, "rows, what they are, and their seal"


def _read_in(cache: Path, path: Path, said: Connection) -> None:
    datasets.config.HF_DATASETS_CACHE = cache
    (source,) = load_rows(str(path), None)
    said.send((len(source.rows), len({row["prompt"] for row in source.rows})))


def test_a_kill_leaves_nothing_half_written_and_two_may_read_at_once(tmp_path) -> None:
    path, cache, rows = tmp_path / "a.jsonl", tmp_path / "cache", 60_000
    with path.open("w") as file:
        file.writelines(f'{{"prompt": "{number}", "chosen": "a", "rejected": "b"}}\n' for number in range(rows))
    context, (here, there) = multiprocessing.get_context("fork"), multiprocessing.Pipe()
    killed, *both = (context.Process(target=_read_in, args=(cache, path, there)) for _ in range(3))
    killed.start()
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in cache.rglob("*.tmp")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert list(cache.rglob("*.tmp"))
    assert not list(cache.rglob("rows.*"))
    for one in both:
        one.start()
    assert [here.recv() for _ in both] == [(rows, rows)] * 2
    for one in both:
        one.join()
        assert one.exitcode == 0
    assert not list(cache.rglob("*.tmp"))
    assert len(list(cache.rglob("rows.*"))) == 3


def test_rows_lie_in_the_cache_of_data(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    read(path, as_jsonl(ROWS))
    assert load_rows(str(path), None)[0].cache.parent == cache_root()
