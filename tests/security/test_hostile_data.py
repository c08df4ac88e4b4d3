"""Data of strangers: bombs, lies and links."""

from __future__ import annotations

import gzip
import json
import lzma
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from limits import bounded

from lit_dpo.data.sources import load_rows, text
from lit_dpo.errors import DataError

ROW = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Writes a file and reads its rows, within bounds."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def read(name: str, content: bytes) -> list[object]:
        (tmp_path / name).write_bytes(content)
        with bounded(len(content)):
            (source,) = load_rows(str(tmp_path / name), None, keep_bad=True)
            return list(source.rows.each())

    return read


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.csv.gz"])
@pytest.mark.parametrize("what", [b"a", b" "])
def test_a_compressed_file_unpacks_to_what_text_compresses_to(read, name, what):
    content = gzip.compress(ROW + what * (1 << 26))
    with pytest.raises(DataError, match=r"unpacks to more than \d+ times its size"):
        read(name, content)


def test_lines_that_hold_nothing_are_not_read_for_ever(read, monkeypatch):
    monkeypatch.setattr(text, "_MOST_BLANK", 1000)
    with pytest.raises(DataError, match="1001 empty lines in a row"):
        read("rows.jsonl.xz", lzma.compress(ROW + b"\n" * 20_000))
    assert len(read("rows.jsonl", ROW + b"\n" * 900 + ROW)) == 2


def test_a_line_is_not_longer_than_memory_has_room_for(read, monkeypatch):
    monkeypatch.setattr(text, "LONGEST_LINE", 1000)
    with pytest.raises(DataError, match=r"line 2: Expected at most 1000 characters"):
        read("rows.jsonl", ROW + b"a" * 2000)


def test_a_field_of_twenty_megabytes_is_read(read):
    """Of a hundred too, at five times this test's cost."""
    (row,) = read("rows.jsonl", b'{"prompt": "' + b"a" * (20 << 20) + b'", "chosen": "b", "rejected": "c"}\n')
    assert len(row["prompt"]) == 20 << 20


@pytest.mark.parametrize(
    "line",
    [b"[" * 100_000, b'{"a": ' * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 1, "a": 2}', b"\x00" * 1000,
     b'{"a": NaN, "b": Infinity}', b'{"a": 1e999}'],
)  # fmt: skip
def test_a_bomb_of_json_is_a_row_that_cannot_be_read_or_one_that_can(read, line):
    assert len(read("rows.jsonl", ROW + line + b"\n" + ROW)) == 3


def test_a_key_of_its_own_in_each_row_is_not_a_table_of_all_of_them(read):
    with pytest.raises(DataError, match="at most 1000 columns"):
        read("rows.jsonl", b"".join(b'{"k%d": 1}\n' % number for number in range(20_000)))


def test_types_of_an_arrow_file_run_nothing(read, tmp_path):
    """An extension type's description is bytes that old versions of Arrow unpickled."""
    marker = tmp_path / "marker"
    spell = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    for number, kind in enumerate(["arrow.py_extension_type", "datasets.Array2D", "a.b"]):
        metadata = {"ARROW:extension:name": kind, "ARROW:extension:metadata": spell}
        fields = [
            pa.field("prompt", pa.string(), metadata=metadata),
            ("chosen", pa.string()),
            ("rejected", pa.string()),
        ]
        schema, stream = (
            pa.schema(fields, metadata={"huggingface": '{"info": {"features": {"a": 1}}}'}),
            pa.BufferOutputStream(),
        )
        with pa.ipc.new_stream(stream, schema) as writer:
            writer.write_batch(pa.record_batch([["a"], ["b"], ["c"]], schema=schema))
        with suppress(DataError):
            read(f"rows{number}.arrow", stream.getvalue().to_pybytes())
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["relative", "absolute", "saved"])
def test_a_folder_names_no_file_outside_of_it(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "secret.jsonl").write_bytes(ROW * 7)
    folder = tmp_path / "folder"
    folder.mkdir()
    if kind == "saved":
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../secret.arrow"}]}))
        (folder / "dataset_info.json").write_text("{}")
    else:
        place = "../secret.jsonl" if kind == "relative" else tmp_path / "secret.jsonl"
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {place}\n---\n")
    with pytest.raises(DataError):
        load_rows(str(folder), None)


def test_a_link_in_a_folder_leads_to_files_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "secret.jsonl").write_bytes(ROW * 7)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(DataError, match="outside of it"):
        load_rows(str(tmp_path / "folder"), None)


def test_code_in_a_folder_of_data_does_not_run(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "folder.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError):
        load_rows(str(folder), None)
    assert not Path(tmp_path / "ran").exists()
