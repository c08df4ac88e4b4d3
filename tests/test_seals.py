"""What is in a cache is what was put there, or is made again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tiny
from lit_dpo import PreferenceDataModule
from lit_dpo.data.sources.base import cache_root
from lit_dpo.errors import TrainingError
from lit_dpo.seals import is_sealed, key_of, seal

WAYS = ("a bit", "a copy of another", "no seal", "a seal of another", "gone")


def _spoil(file: Path, other: Path, way: str) -> None:
    sealed = file.with_name(f"{file.name}.seal")
    if way == "a bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif way == "a copy of another":  # with its seal
        file.write_bytes(other.read_bytes())
        sealed.write_bytes(other.with_name(f"{other.name}.seal").read_bytes())
    elif way == "a seal of another":
        sealed.write_bytes(other.with_name(f"{other.name}.seal").read_bytes())
    else:
        (sealed if way == "no seal" else file).unlink()


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_was_changed_is_not_sealed(tmp_path, way):
    one, other = tmp_path / "one", tmp_path / "other"
    for file in (one, other):
        file.write_text(f"content of {file.name}")
        seal([file], file.name)
        assert is_sealed([file], file.name)
    _spoil(one, other, way)
    with tiny.records("lit_dpo.seals") as lines:
        assert not is_sealed([one], "one")
    assert [line.getMessage() for line in lines] == (
        [] if way in ("no seal", "gone") else [f"{one} is not what was written there; it is made again."]
    )


def test_a_secret_keeps_out_who_does_not_have_it(tmp_path, monkeypatch):
    file, secret = tmp_path / "rows", tmp_path / "key"
    file.write_text("rows")
    seal([file], "rows")
    monkeypatch.setenv("LIT_DPO_CACHE_KEY", str(secret))
    for content, message in ((None, "No such file"), (b"short", "16 bytes or more"), (bytes(32), "chmod o= ")):
        if content:
            secret.write_bytes(content)
            secret.chmod(0o644)
        with pytest.raises(TrainingError, match=message):
            key_of("rows")
    secret.chmod(0o600)
    assert not is_sealed([file], "rows"), "made by somebody without it"
    seal([file], "rows")
    assert is_sealed([file], "rows")
    secret.write_bytes(os.urandom(32))
    assert not is_sealed([file], "rows")


@pytest.mark.parametrize("grouped", [False, True])
def test_rows_in_the_cache_that_were_changed_are_made_again(tiny_model, pairs_file, tmp_path, monkeypatch, grouped):
    """Those of a text file, their token ids, and what was merged of these: a line says which was changed."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)

    def ids() -> list[list[int]]:
        data = PreferenceDataModule(
            train=str(pairs_file), tokenizer=str(tiny_model), group_by_prompt=4 if grouped else None
        )
        data.prepare_data()
        data.setup("fit")
        return [batch.input_ids.tolist() for batch in data.train_dataloader()]

    expected = ids()
    files = sorted(cache_root().rglob("*.arrow"))
    assert len(files) == 2 + grouped
    for file in files:
        content = bytearray(file.read_bytes())
        place = len(content) // 2
        content[place : place + 8] = b"poisoned"
        file.write_bytes(content)
        with tiny.records("lit_dpo.seals") as lines:
            assert ids() == expected
        assert {line.getMessage() for line in lines} == {f"{file} is not what was written there; it is made again."}
        with tiny.records("lit_dpo.seals") as lines:
            assert ids() == expected
        assert not lines
