"""What `lit-dpo inspect` costs beyond encoding, and what the lines at the start of a run do; CPU seconds, one process.

python benchmarks/doctor.py pairs.jsonl --rows 100000

Rows are made of the sentences of a file's texts, put together anew, so that no two are the same; one in fifty is a copy
of an earlier one, and one in fifty a copy with another first sentence.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.data.doctor import brief, examine
from lit_dpo.data.doctor.texts import written
from lit_dpo.data.formats import Preference
from lit_dpo.quickstart import quickstart_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="real preferences, from whose sentences rows are made")
    parser.add_argument("--rows", type=int, default=100_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made.jsonl"
        with made.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(given.file, given.rows))
        data = PreferenceDataModule(str(made), tokenizer=quickstart_tokenizer(), max_length=None)
        timed("encoding, once", lambda: data.setup("fit"))
        table = data.tables["train"]
        lines = timed("the lines at the start of a run", lambda: brief(table, data.loaded_tokenizer))
        found = timed("the doctor", lambda: examine(data.tables, data.loaded_tokenizer, data.comparing))
    print(*lines, sep="\n")
    print(*(f"{one.kind.name}: {one.line}" for one in found.above), sep="\n")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{table.size:,} rows; {most:.2f} GiB at most")


def timed(name: str, work: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = work()
    print(f"{name}: {time.process_time() - start:.1f} s")
    return result


def rows(file: Path, count: int) -> Iterator[dict[str, str]]:
    """Make them."""
    data = PreferenceDataModule(str(file), tokenizer=quickstart_tokenizer(), max_length=None)
    data.setup("fit")
    table, draw = data.tables["train"], random.Random(0)
    texts = [one for row in table.rows.tolist() if isinstance(one := table.preference(row), Preference)]
    prompts = [written(one.prompt) for one in texts]
    answers = [written(side) for one in texts for side in (one.chosen, one.rejected)]
    sentences = [part for text in answers for part in re.findall(r"[^.!?]+[.!?]+\s*", text)]
    lengths = [len(re.findall(r"[.!?]+", text)) or 1 for text in answers]
    made: list[dict[str, str]] = []
    for number in range(count):
        if made and number % 50 == 0:
            yield made[draw.randrange(len(made))]
        elif made and number % 50 == 25:
            row = made[draw.randrange(len(made))]
            yield {**row, "chosen": draw.choice(sentences) + row["chosen"].partition(". ")[2]}
        else:
            sides = ["".join(draw.choices(sentences, k=draw.choice(lengths))) for _ in range(2)]
            made.append({"prompt": f"{draw.choice(prompts)} {number}", "chosen": sides[0], "rejected": sides[1]})
            yield made[-1]


if __name__ == "__main__":
    main()
