"""The files of log-probs: what is written is read, by any process, after any accident."""

from __future__ import annotations

import multiprocessing
import shutil
import zlib
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

import tiny
from lit_dpo.references.store import _ENTRY, LogpStore


def _key(number: int) -> bytes:
    return number.to_bytes(4, "big") * 4


def _values(number: int) -> np.ndarray:
    random = np.random.Generator(np.random.PCG64(number))
    return random.standard_normal(2 + number % 5).astype(np.float32)


def _fill(store: LogpStore, numbers) -> None:
    store.put({_key(number): _values(number) for number in numbers})


def _has(store: LogpStore, number: int) -> bool:
    found = store.get(_key(number))
    if found is None:
        return False
    np.testing.assert_array_equal(found, _values(number))
    return True


def test_what_was_put_is_got_now_and_by_the_next_process(tmp_path):
    store = LogpStore(tmp_path / "new")
    assert not _has(store, 0)
    _fill(store, range(10))
    _fill(store, range(10, 12))
    for reader in (store, LogpStore(tmp_path / "new")):
        assert all(_has(reader, number) for number in range(12))
        assert not _has(reader, 12)
        assert len(reader) == 12


def test_nothing_is_written_before_there_is_something(tmp_path):
    LogpStore(tmp_path / "new").get(_key(1))
    assert not (tmp_path / "new").exists()


def test_nothing_put_is_nothing_written(tmp_path):
    store = LogpStore(tmp_path / "store")
    store.put({})
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").iterdir())


def test_ten_thousand_pairs_put_in_batches_are_all_there(tmp_path):
    """More than are kept with the index, so that it is read again in between."""
    store = LogpStore(tmp_path)
    for start in range(0, 10_000, 100):
        _fill(store, range(start, start + 100))
    assert len(store._fresh) < 10_000
    for reader in (store, LogpStore(tmp_path)):
        assert all(_has(reader, number) for number in range(0, 10_000, 7))


def test_what_another_process_adds_is_found(tmp_path):
    one, two = LogpStore(tmp_path), LogpStore(tmp_path)
    _fill(one, range(3))
    two._last = 0.0  # long ago
    assert _has(two, 2)
    _fill(two, range(3, 5))
    one._last = 0.0
    assert _has(one, 4)
    assert len(list(tmp_path.glob("*.index"))) == 2


def test_keys_that_begin_alike_are_told_apart(tmp_path):
    keys = [b"\0" * 8 + bytes([last]) * 8 for last in range(5)]
    store = LogpStore(tmp_path)
    store.put({key: _values(number) for number, key in enumerate(keys)})
    for reader in (store, LogpStore(tmp_path)):
        for number, key in enumerate(keys):
            np.testing.assert_array_equal(reader.get(key), _values(number))
        assert reader.get(b"\0" * 16 if keys[0] != b"\0" * 16 else b"\0" * 8 + b"\xff" * 8) is None


@pytest.mark.parametrize("file", ["logps", "index"])
def test_every_flipped_byte_is_noticed(tmp_path, file):
    """Wherever it is, at most one pair is lost, none is wrong, and putting it again mends it."""
    _fill(LogpStore(tmp_path), range(6))
    (path,) = tmp_path.glob(f"*.{file}")
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        store = LogpStore(tmp_path)
        there = [_has(store, number) for number in range(6)]
        assert there.count(False) == 1, place
        assert store.damaged == 1
    _fill(store, [there.index(False)])
    again = LogpStore(tmp_path)
    assert all(_has(again, number) for number in range(6))


@pytest.mark.parametrize("file", ["logps", "index"])
def test_a_file_that_is_cut_short_loses_its_end_alone(tmp_path, file):
    _fill(LogpStore(tmp_path), range(6))
    (path,) = tmp_path.glob(f"*.{file}")
    content = path.read_bytes()
    before = 0
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        store = LogpStore(tmp_path)
        there = [_has(store, number) for number in range(6)]
        assert there == sorted(there, reverse=True)
        assert there.count(True) >= before
        before = there.count(True)
    assert before == 6


def test_a_part_without_its_values_is_missing(tmp_path):
    _fill(LogpStore(tmp_path), range(2))
    next(tmp_path.glob("*.logps")).unlink()
    assert not _has(LogpStore(tmp_path), 0)


def _fill_without_end(folder: Path, end: Connection) -> None:
    store = LogpStore(folder)
    for number in range(10**6):
        _fill(store, [number])
        end.send(number)


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_process_that_is_killed_leaves_what_it_has_put(tmp_path):
    context, (here, there) = multiprocessing.get_context("fork"), multiprocessing.Pipe()
    process = context.Process(target=_fill_without_end, args=(tmp_path, there))
    process.start()
    while here.recv() < 50:
        pass
    process.kill()
    process.join()
    store = LogpStore(tmp_path)
    assert all(_has(store, number) for number in range(51))
    assert store.damaged == 0
    _fill(store, [10**7])
    assert _has(LogpStore(tmp_path), 10**7)


def test_an_entry_is_forty_eight_bytes():
    assert _ENTRY.itemsize == 48


def _rewrite(path, change) -> None:
    """Change entries as somebody would who knows the format: their own checksums are right."""
    entries = np.frombuffer(path.read_bytes(), _ENTRY).copy()
    change(entries)
    for entry in entries:
        entry["own_checksum"] = zlib.crc32(entry.tobytes()[:-4])
    path.write_bytes(entries.tobytes())


@pytest.mark.parametrize("way", ["values", "swapped", "renamed", "another model", "shorter"])
def test_what_is_put_in_its_place_is_found(tmp_path, way):
    """Other values, those of other tokens, of another reference, and a part of them: nothing of it is got."""
    for seal in (b"one", b"two"):
        store = LogpStore(tmp_path / seal.decode(), seal)
        store.put({_key(number): _values(number) + len(seal) * (seal == b"two") for number in range(4)})
    (index,), (values,) = ((tmp_path / "one").glob(f"*.{kind}") for kind in ("index", "logps"))
    if way == "values":
        values.write_bytes((np.frombuffer(values.read_bytes(), "<f4") + 1).tobytes())
    elif way == "swapped":
        _rewrite(index, lambda entries: entries.__setitem__("offset", np.roll(entries["offset"], 1)))
    elif way == "renamed":
        _rewrite(index, lambda entries: entries.__setitem__("key", np.roll(entries["key"], 1)))
    elif way == "shorter":
        _rewrite(index, lambda entries: entries.__setitem__("length", entries["length"] - 1))
    else:
        for path in (index, values):
            (other,) = (tmp_path / "two").glob(f"*{path.suffix}")
            path.write_bytes(other.read_bytes())
    store = LogpStore(tmp_path / "one", b"one")
    assert not any(_has(store, number) for number in range(4))
    assert store.damaged == 4
    _fill(store, range(4))
    again = LogpStore(tmp_path / "one", b"one")
    assert all(_has(again, number) for number in range(4))


def test_a_folder_that_is_removed_in_use_is_made_again(tmp_path):
    store = LogpStore(tmp_path / "cache")
    _fill(store, range(3))
    shutil.rmtree(tmp_path / "cache")
    with tiny.records("lit_dpo.references.store") as lines:
        for numbers in ((3, 4), (5, 6)):
            _fill(store, numbers)
    assert [line.getMessage() for line in lines] == [
        f"Files of {tmp_path / 'cache'} were removed while it was in use; what they held is computed again."
    ]
    reader = LogpStore(tmp_path / "cache")
    assert [_has(reader, number) for number in range(7)] == [False] * 3 + [True] * 4


def test_what_is_put_again_replaces_what_was_there(tmp_path):
    store = LogpStore(tmp_path)
    for number in (1, 2):
        store.put({_key(0): _values(number)})
        store.refresh()
    for reader in (store, LogpStore(tmp_path)):
        np.testing.assert_array_equal(reader.get(_key(0)), _values(2))


def test_something_else_in_the_folder_is_left_alone(tmp_path):
    (tmp_path / "x.index").mkdir()
    store = LogpStore(tmp_path)
    _fill(store, range(2))
    assert _has(LogpStore(tmp_path), 1)
