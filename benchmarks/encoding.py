"""How many pairs a second of CPU time encodes, next to the plain way and to TRL's, and in how much memory.

python benchmarks/encoding.py                                    # made pairs of 370 tokens, and a million short ones
python benchmarks/encoding.py --data pairs.json --tokenizer DIR  # pairs per second of these

Every way reads the same pairs with the same tokenizer, one after another in each of `--repeat` rounds; figures are
medians. The plain way gives the same ids: a prompt alone, and again before each of its completions. TRL's is left out
where `trl` is not installed. Memory and the second start are those of processes of their own, for `--rows` rows and for
a tenth of them: what they differ by is what a row costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from material import TEMPLATE, made_conversations, read_pairs, train_tokenizer

SHORT = "12,8"
# In a process of its own: the data module's work alone, and the memory that is not a file's, at its highest.
PREPARE = """
import json, re, resource, sys, threading, time
from pathlib import Path
import datasets, torch, transformers
from lit_dpo import PreferenceDataModule
datasets.disable_progress_bars()
file, tokenizer, cache, merged = sys.argv[1:]
datasets.config.HF_DATASETS_CACHE = cache
highest = 0
def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
def watch():
    global highest
    while True:
        highest = max(highest, held())
        time.sleep(0.02)
module = PreferenceDataModule(train=file, tokenizer=tokenizer, group_by_prompt=int(merged) or None)
module.loaded_tokenizer
before = held()
threading.Thread(target=watch, daemon=True).start()
cpu, wall = time.process_time(), time.perf_counter()
module.prepare_data()
module.setup("fit")
seconds = time.process_time() - cpu, time.perf_counter() - wall
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps([*seconds, highest - before, peak, module.train_dataloader().dataset.table.total]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a file of pairs; needs --tokenizer")
    parser.add_argument("--tokenizer", help="its tokenizer's folder")
    parser.add_argument("--pairs", type=int, default=1000, help="made pairs, and how many are read of a file")
    parser.add_argument("--rows", type=int, default=1_000_000, help="made rows to measure memory with; 0: none")
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    if bool(given.data) != bool(given.tokenizer):
        parser.error("--data and --tokenizer go together")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = given.tokenizer or folder
        pairs = read_pairs(Path(given.data)) if given.data else made_conversations("90,140", given.pairs)
        if not given.data:
            train_tokenizer(pairs, Path(tokenizer))
        print_speed(tokenizer, pairs[: given.pairs], given.repeat)
        if given.rows and not given.data:
            print_memory(tokenizer, given.rows)


# --- pairs per second -----------------------------------------------------------------------------------------------


def print_speed(folder: str, pairs: list[dict[str, Any]], repeat: int) -> None:
    import datasets
    from transformers import AutoTokenizer, logging

    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        tokenizer.chat_template = TEMPLATE
    print("pairs per CPU second     tokens  lit_dpo    plain      TRL  of plain    of TRL")
    for kind in ("text", "conversations"):
        print_kind(kind, tokenizer, pairs if kind == "conversations" else [as_text(pair) for pair in pairs], repeat)


def as_text(pair: dict[str, Any]) -> dict[str, str]:
    """The pair with completions that begin with a space, as they have to where a tokenizer merges it with a word."""
    texts = {key: pair[key][0]["content"] for key in pair}
    return texts | {side: f" {texts[side].lstrip()}" for side in ("chosen", "rejected")}


def print_kind(kind: str, tokenizer: Any, rows: list[dict[str, Any]], repeat: int) -> None:
    ways: dict[str, Callable[[], float]] = {
        "lit_dpo": lambda: ours(tokenizer, rows),
        "plain": lambda: ours(tokenizer, rows, False),
    }
    if find_spec("trl"):
        ways["TRL"] = lambda: trl(tokenizer, rows)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeat + 1):
        for name, way in ways.items():
            start = time.process_time()
            tokens = way()
            if turn:  # the first one fills caches
                found[name].append(len(rows) / (time.process_time() - start))
    speed = {name: statistics.median(those) for name, those in found.items()}
    of = {
        name: statistics.median(mine / other for mine, other in zip(found["lit_dpo"], those, strict=True))
        for name, those in found.items()
    }
    print(
        f"{kind:24} {tokens:6.0f} "
        + " ".join(f"{speed[name]:8,.0f}" if name in speed else f"{'—':>8}" for name in ("lit_dpo", "plain", "TRL"))
        + " "
        + " ".join(f"{of[name]:9.2f}" if name in of else f"{'—':>9}" for name in ("plain", "TRL"))
    )


def ours(tokenizer: Any, rows: list[dict[str, Any]], with_cuts: bool = True) -> float:
    """Encode rows as a data module does; the tokens of a pair."""
    from lit_dpo.data.encode import PromptEncoder
    from lit_dpo.data.encoding import encode_table
    from lit_dpo.data.formats import Triples
    from lit_dpo.data.sources import load_rows
    from lit_dpo.data.tokens import Tokens

    encoder = PromptEncoder(tokenizer, max_length=None)
    if not with_cuts:
        vars(encoder)["_tokens"] = Tokens(tokenizer, with_cuts=False)
    table = encode_table(load_rows(rows, None), Triples(), encoder)
    return float(table.lengths.mean())


def trl(tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Have TRL prepare the rows; the tokens of a pair."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    trainer = object.__new__(DPOTrainer)  # no model: only its way with rows is asked for
    trainer._tokenizer = tokenizer
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(folder, max_length=None, bf16=False, use_cpu=True, report_to=[])
        made = trainer._prepare_dataset(Dataset.from_list(rows), tokenizer, config, "train")
    return sum(len(row[part]) for row in made for part in ("prompt_ids", "chosen_ids", "rejected_ids")) / len(rows)


# --- memory ---------------------------------------------------------------------------------------------------------


def print_memory(folder: str, rows: int) -> None:
    print("\n     rows merged   start   CPU s  wall s  pairs/CPU s  held MiB  peak MiB")
    for count in (rows // 10, rows):
        with tempfile.TemporaryDirectory() as cache:
            file = Path(cache, "pairs.jsonl")
            write(file, count)
            for merged in (0, 16):
                for start in ("first", "second"):
                    cpu, wall, held, peak, total = prepare(file, folder, cache, merged)
                    print(
                        f"{count:9,} {merged or '—':>6} {start:>7} {cpu:7.2f} {wall:7.1f} {total / cpu:12,.0f} "
                        f"{held * 1024:9.0f} {peak * 1024:9.0f}",
                        flush=True,
                    )


def write(file: Path, count: int) -> None:
    """Short pairs, no two of them alike."""
    made = made_conversations(SHORT, 1000)
    with file.open("w") as out:
        for number in range(count):
            pair = made[number % len(made)]
            texts = {key: f"{value[0]['content']} {number}" for key, value in pair.items()}
            out.write(json.dumps(texts) + "\n")


def prepare(file: Path, tokenizer: str, cache: str, merged: int) -> list[float]:
    command = [sys.executable, "-c", PREPARE, str(file), tokenizer, cache, str(merged)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
