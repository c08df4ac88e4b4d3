"""What is short as a file and without end when it is read: YAML that repeats itself, folders with packed files."""

from __future__ import annotations

import gzip
import zipfile

import pytest
from limits import bounded

from lit_dpo.aliases import repeats_endlessly
from lit_dpo.cli import main
from lit_dpo.data.sources import load_rows
from lit_dpo.data.sources.named import stream_named
from lit_dpo.data.sources.text import check_packed
from lit_dpo.errors import DataError

ROW = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
TIMES = "a0: &a0 [" + ", ".join("x" * 10) + "]\n"
BOMB = TIMES + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_values_are_counted_with_what_repeats_them():
    shared = "x-common: &common {lr: 1e-4, beta: [0.9, 0.99]}\n" + "".join(f"a{n}: *common\n" for n in range(1000))
    assert not repeats_endlessly(shared)
    assert not repeats_endlessly("a & b * c: [")
    assert not repeats_endlessly("# & and *\n")
    assert repeats_endlessly(BOMB)
    assert repeats_endlessly("a: &a\n  - *a\n")


@pytest.mark.parametrize("option", ["--config", "--trainer", "--config="])
@pytest.mark.parametrize(
    "text", [BOMB + "trainer: {max_epochs: *a9}\n", "trainer: &a\n  - *a\n"], ids=["many", "itself"]
)
def test_a_configuration_that_repeats_itself_is_a_sentence(tmp_path, capsys, text, option):
    file = tmp_path / "bomb.yaml"
    file.write_text(text)
    given = [f"{option}{file}"] if option.endswith("=") else [option, str(file)]
    with bounded(len(text)), pytest.raises(SystemExit) as stopped:
        main(["fit", *given])
    assert stopped.value.code == 2
    assert f"in {file} aliases repeat without end" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--config", "--trainer"])
def test_so_is_one_by_another_name(tmp_path, capsys, option):
    """A file of any name is read as YAML."""
    file = tmp_path / "bomb.conf"
    file.write_text(BOMB + {"--config": "trainer: {max_epochs: *a9}\n", "--trainer": "max_epochs: *a9\n"}[option])
    with bounded(file.stat().st_size), pytest.raises(SystemExit) as stopped:
        main(["fit", option, str(file)])
    assert stopped.value.code == 2
    assert "aliases repeat without end" in capsys.readouterr().err


def test_axes_of_an_ablation_that_repeat_themselves_are_a_sentence(tmp_path, capsys):
    file = tmp_path / "axes.yaml"
    for text, said in ((BOMB + "beta: *a9\n", "its aliases"), ("beta: [\xe9]", "utf-8")):
        file.write_text(text, encoding="latin-1")
        with bounded(len(text)), pytest.raises(SystemExit) as stopped:
            main(["ablate", "--axes", str(file)])
        assert stopped.value.code == 1
        assert f"Cannot read the axes in {file}: " in (err := capsys.readouterr().err)
        assert said in err


def test_so_is_one_that_another_one_names(tmp_path, capsys):
    (tmp_path / "bomb.yaml").write_text(BOMB)
    (tmp_path / "run.yaml").write_text("trainer: bomb.yaml\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "run.yaml")])
    assert "bomb.yaml aliases repeat without end" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_folders_description_that_repeats_itself_is_a_sentence(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(ROW)
    text = BOMB + "configs:\n- config_name: default\n  data_files: *a9\n"
    (folder / name).write_text(f"---\n{text}---\n# Pairs\n" if name == "README.md" else text)
    for read in (lambda: load_rows(str(folder), None), lambda: stream_named(str(folder))):
        with bounded(len(text)), pytest.raises(DataError, match=rf"{name}` cannot be read: its aliases"):
            read()


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "packed"
    made.mkdir()
    return made


def _zip(folder, rows):
    with zipfile.ZipFile(folder / "train.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("train.jsonl", rows)


def test_an_archive_in_a_folder_unpacks_to_what_text_compresses_to(folder):
    _zip(folder, ROW * 1_500_000)
    for read in (lambda: load_rows(str(folder), None), lambda: stream_named(str(folder))):
        with bounded(1 << 20), pytest.raises(DataError, match=r"train\.zip` unpacks to more than 100 times its size"):
            read()


def test_an_honest_one_is_read(folder):
    _zip(folder, ROW * 3)
    (source,) = load_rows(str(folder), None)
    assert len(list(source.rows.each())) == 3


def test_a_compressed_file_that_the_folder_says_how_to_read_is_bounded_too(folder):
    """With options, `datasets` unpacks it, and not we."""
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: train.csv.gz\n  sep: ';'\n---\n"
    )
    (folder / "train.csv.gz").write_bytes(gzip.compress(b"prompt;chosen;rejected\n" + b"a;b;c\n" * (1 << 23)))
    with bounded(1 << 20), pytest.raises(DataError, match=r"train\.csv\.gz` unpacks to more than 100 times its size"):
        load_rows(str(folder), None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train.zip", "is damaged, or not what its name says"),
        ("train.jsonl.gz", "is damaged, or not what its name says"),
        ("train.7z", "not in an archive but got"),
        ("train.tar.gz", "not in an archive but got"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(folder, name, said):
    (folder / name).write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(DataError, match=said):
        check_packed(folder / name, whole=True)
