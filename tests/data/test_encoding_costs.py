"""What encoding asks for besides its result: no memory that grows with the rows, and no digest that nobody needs."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from datasets import Dataset

from lit_dpo.data.encode import PromptEncoder
from lit_dpo.data.encoding import encode_table
from lit_dpo.data.formats import Triples
from lit_dpo.data.sources import load_rows
from toy_tokenizers import byte_level

ROWS = [{"prompt": f"duck {number}", "chosen": " yes", "rejected": " no"} for number in range(8)]


class Unasked(PromptEncoder):
    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        raise AssertionError("asked for a key of the cache")


@pytest.mark.parametrize("merged", [None, 4])
def test_rows_in_memory_are_not_hashed(merged: int | None) -> None:
    """No file is kept of them."""
    table = encode_table(load_rows(ROWS, None), Triples(), Unasked(byte_level()), group_by_prompt=merged)
    assert table.size == len(ROWS)


def test_rows_of_files_are(jsonl, tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "rows")
    for source in (jsonl("pairs.jsonl", ROWS), Dataset.load_from_disk(tmp_path / "rows")):
        with pytest.raises(AssertionError, match="asked"):
            encode_table(load_rows(source, None), Triples(), Unasked(byte_level()))


@pytest.mark.parametrize("merged", [None, 4])
def test_a_second_start_takes_next_to_nothing(tmp_path: Path, merged: int | None) -> None:
    file = _many(tmp_path, 3000)
    seconds, found = [], []
    for _ in range(2):
        start = time.process_time()
        found.append(
            encode_table(load_rows(file, None), Triples(), PromptEncoder(byte_level()), group_by_prompt=merged)
        )
        seconds.append(time.process_time() - start)
    assert found[0].digest == found[1].digest
    assert seconds[1] < min(0.5, seconds[0] / 2)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Rows, ids and facts are in files; what is held is a batch."""
    held = []
    for count in (5_000, 50_000):
        sources = load_rows(_many(tmp_path, count), None)
        before = _anonymous()
        table = encode_table(sources, Triples(), PromptEncoder(byte_level()))
        assert table.size == count
        held.append(_anonymous() - before)
    assert held[1] < held[0] + 16  # the 45,000 more, kept as lists, take 30 MiB


def _many(folder: Path, count: int) -> str:
    file = folder / f"{count}.jsonl"
    rows = ({"prompt": f"{number} ducks", "chosen": " yes", "rejected": " no"} for number in range(count))
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def _anonymous() -> float:
    """MiB of this process that no file backs."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10
