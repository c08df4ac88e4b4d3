"""Cached rows are those of these bytes, read by this code; and are found again wherever the same bytes lie."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lit_dpo import PreferenceDataModule
from lit_dpo.data.digests import code_digest

FORMAT = """
from dataclasses import dataclass
from lit_dpo.data.formats import Preference, PreferenceFormat
import cleaning

PREFIX = "Q: "

@dataclass(frozen=True)
class Mine(PreferenceFormat):
    @property
    def columns(self):
        return ("prompt", "chosen", "rejected")

    def read(self, row):
        return Preference(PREFIX + cleaning.clean(row["prompt"]), row["chosen"], row["rejected"])
"""
CLEANING = """
SIGN = "."
def clean(text):
    return _strip(text) + SIGN
def _strip(text):
    return text.strip()
"""


def _rows(word: str) -> str:
    return json.dumps({"prompt": word, "chosen": " yes", "rejected": " no"}) + "\n"


def _text(source: str, tokenizer_folder: str, **options) -> str:
    """The first prompt as it is trained on."""
    pairs = PreferenceDataModule(train=source, tokenizer=tokenizer_folder, **options)
    pairs.setup("fit")
    return pairs.loaded_tokenizer.decode(pairs.prompts("train", 1)[0][1])


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A format and what it uses, in files; `lab(file, old, new)` edits one and gives the format as it then is."""
    (tmp_path / "lab_format.py").write_text(FORMAT)
    (tmp_path / "cleaning.py").write_text(CLEANING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def edit(file: str, old: str, new: str):
        path = tmp_path / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        return load()

    def load():
        for name in ("cleaning", "lab_format"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("lab_format").Mine()

    yield edit, load
    for name in ("cleaning", "lab_format"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("file", "old", "new", "then"),
    [
        ("lab_format.py", '"Q: "', '"A: "', "A: hello."),
        ("lab_format.py", 'row["prompt"])', 'row["prompt"]).upper()', "Q: HELLO."),
        ("cleaning.py", '"."', '"?"', "Q: hello?"),
        ("cleaning.py", "text.strip()", "text.strip() * 2", "Q: hellohello."),
    ],
)
def test_an_edited_format_reads_anew(lab, jsonl, tmp_path, tokenizer_folder, file, old, new, then):
    edit, load = lab
    (tmp_path / "pairs.jsonl").write_text(_rows("hello"))
    source = str(tmp_path / "pairs.jsonl")
    assert _text(source, tokenizer_folder, format=load()) == "Q: hello."
    assert _text(source, tokenizer_folder, format=edit(file, old, new)) == then


def test_a_file_that_is_edited_but_not_loaded_does_not_name_the_old_reading(lab, tmp_path, tokenizer_folder):
    """As in a notebook: the next process, which loads it, must not find what this one read."""
    _, load = lab
    (tmp_path / "pairs.jsonl").write_text(_rows("hello"))
    source, format = str(tmp_path / "pairs.jsonl"), load()
    new = FORMAT.replace('"Q: "', '"N: "')
    (tmp_path / "lab_format.py").write_text(new)
    assert _text(source, tokenizer_folder, format=format) == "Q: hello."
    assert _text(source, tokenizer_folder, format=load()) == "N: hello."


def test_code_has_the_same_digest_in_every_process(lab, tmp_path):
    """Sets have another order in each, and nothing of memory may count."""
    edit, _ = lab
    edit("cleaning.py", "return text.strip()", 'return text.strip() if text not in {"a", "b", "c", "d"} else ""')
    code = (
        "from lit_dpo.data.digests import code_digest\nfrom lit_dpo.data.formats import Triples\n"
        "import lab_format\nprint(code_digest(Triples, own=[lab_format.Mine]))"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
    assert len(said.pop()) > 20


def _make(code: str) -> ModuleType:
    made = ModuleType("__main__")
    exec(code, made.__dict__)
    return made


@pytest.mark.parametrize(
    "change",
    [
        ("'x'", "'y'"),
        ("one=1", "one=2"),
        ("key=3", "key=4"),
        ("[a-z]" + "q" * 300, "[a-z]" + "q" * 300 + "r"),
        ("TABLE = {'a': 1}", "TABLE = {'a': 2}"),
        ("return 'base'", "return 'other'"),
        ("fixed + 1", "fixed + 2"),
        ("partial(int, base=2)", "partial(int, base=3)"),
        ("'lazy'", "'eager'"),
        ("limit = 5", "limit = 6"),
    ],
    ids=lambda change: change[1][-20:],
)
def test_whatever_a_class_computes_with_counts(change):
    pattern = "[a-z]" + "q" * 300
    code = f"""
import re
from functools import cached_property, partial
WORD = re.compile("{pattern}")
TABLE = {{'a': 1}}
parse = partial(int, base=2)
class Settings:
    def __init__(self):
        self.limit = 5
settings = Settings()
def outer(fixed):
    def inner(n):
        return fixed + 1 + n
    return inner
class Base:
    @staticmethod
    def name():
        return 'base'
class Mine(Base):
    add = outer(1)
    @cached_property
    def late(self):
        return 'lazy'
    def read(self, one=1, *, key=3):
        return WORD, TABLE, parse, 'x', self.name(), [self.add(n) for n in (one, key)], settings.limit
"""
    assert change[0] in code
    assert code_digest(_make(code).Mine) == code_digest(_make("\n\n" + code).Mine)
    assert code_digest(_make(code).Mine) != code_digest(_make(code.replace(*change)).Mine)


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "folder"])
def test_other_bytes_under_the_same_path_size_and_time_are_read_anew(tmp_path, tokenizer_folder, suffix):
    source = file = tmp_path / f"pairs.{suffix}"
    if suffix == "folder":
        source.mkdir()
        file = source / "train.jsonl"

    def write(word: str) -> None:
        if suffix == "csv":
            file.write_text(f"prompt,chosen,rejected\n{word}, yes, no\n")
        elif suffix == "parquet":
            from datasets import Dataset

            Dataset.from_list([json.loads(_rows(word))]).to_parquet(file)
        else:
            file.write_text(_rows(word))

    write("hello")
    before = file.stat()
    assert _text(str(source), tokenizer_folder) == "hello"
    write("world")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert _text(str(source), tokenizer_folder) == "world"


def test_the_same_bytes_are_encoded_once_wherever_they_lie(tmp_path, jsonl, tokenizer_folder, monkeypatch):
    """Seen in the files: the second finds the first's, and makes none."""
    first = jsonl("pairs.jsonl", [json.loads(_rows(str(n))) for n in range(5)])
    (tmp_path / "copy").mkdir()
    shutil.copy(first, tmp_path / "copy" / "other_name.jsonl")
    found = []
    for source in (first, first, str(tmp_path / "copy" / "other_name.jsonl")):
        pairs = PreferenceDataModule(train=source, tokenizer=tokenizer_folder)
        pairs.setup("fit")
        (file,) = (Path(file["filename"]) for file in pairs._tables["train"].encoded.cache_files)
        found.append((file, file.stat().st_mtime_ns))
    assert len(set(found)) == 1
    other = PreferenceDataModule(train=first, tokenizer=tokenizer_folder, max_length=20)
    other.setup("fit")
    assert other._tables["train"].encoded.cache_files[0]["filename"] != str(found[0][0])
    assert torch.equal(other._tables["train"].batch([0]).input_ids, pairs._tables["train"].batch([0]).input_ids)


def test_errors_name_the_file_that_was_given_and_not_its_twin(tmp_path, jsonl, tokenizer_folder):
    for name in ("a.jsonl", "b.jsonl"):
        pairs = PreferenceDataModule(train=jsonl(name, [json.loads(_rows("hello"))]), tokenizer=tokenizer_folder)
        pairs.setup("fit")
        assert pairs._tables["train"].sources[0].name == str(tmp_path / name)
