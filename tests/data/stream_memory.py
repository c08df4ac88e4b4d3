"""Resident memory while a stream is read: `python stream_memory.py ROWS TRAINED` prints MiB at the middle and the end.

The first number is of rows that are read and shuffled, the second of those that are also encoded and batched.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lit_dpo.data.comparisons import Comparing
from lit_dpo.data.encode import PromptEncoder
from lit_dpo.data.formats import Triples
from lit_dpo.data.stream import PromptStream
from lit_dpo.data.stream_loader import StepLimits, StreamLoader
from lit_dpo.data.stream_order import StreamOrder
from lit_dpo.data.streaming import open_stream
from toy_tokenizers import byte_level


def resident() -> float:
    """MiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def halves(items: Iterator[object], count: int) -> list[float]:
    """Memory after half of the items, and after all."""
    found = []
    for _ in range(2):
        for _ in islice(items, count // 2):
            pass
        found.append(resident())
    return found


def measured(rows: int, trained: int) -> dict[str, list[float]]:
    """Memory while rows are read, and while they are batched."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w") as file:
            for i in range(rows):
                row = {"prompt": f"question {i} " + "so " * 30, "chosen": " yes" * (i % 5 + 1), "rejected": " no"}
                file.write(json.dumps(row) + "\n")
        columns = ("prompt", "chosen", "rejected")
        sources = [one._replace(columns=columns) for one in open_stream(str(path))]
        order = StreamOrder(sources, [Triples()], [[0]], [1.0], shuffle_buffer=2000)
        stream = PromptStream(order, PromptEncoder(byte_level()), Comparing())
        loader = StreamLoader(stream, StepLimits(prompts=8), batch_size=None)
        return {
            "file": [path.stat().st_size / 2**20],
            "read": halves(order.items(0), rows),
            "batched": halves(iter(loader), trained // 8),
        }


if __name__ == "__main__":
    print(json.dumps(measured(*map(int, sys.argv[1:]))))
