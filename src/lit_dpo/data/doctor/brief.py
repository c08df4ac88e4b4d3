"""What is said of the training data at the start of each run: from token ids alone, within a second."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lit_dpo.data.digests import code_digest
from lit_dpo.data.doctor.encoded import ends, lengths, tokens
from lit_dpo.data.doctor.findings import Example, Finding, found, percent
from lit_dpo.data.doctor.shortcuts import rank_correlation, wilson
from lit_dpo.data.sameness import completion_ids, same_examples, sides
from lit_dpo.data.table import PromptTable
from lit_dpo.seals import is_sealed, seal
from lit_dpo.writing import written_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LINES = 5
MOST = 1_000_000
"""Examples that are looked at: four seconds, and a quarter of a gigabyte."""


def brief(table: PromptTable, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Say in a few lines what is above its threshold, and what to do; nothing of data that are well.

    Args:
        table: of the training data.
        tokenizer: that encoded them.
    """
    looked = table if table.size <= MOST else table._replace(rows=table.rows[:MOST])
    above = [one for one in _findings(looked, tokenizer) if one.above]
    lines = [f"{one.line}. {one.kind.remedy}" for one in above[:LINES]]
    first = "" if looked is table else f" Only the first {MOST:,} were looked at."
    return [*lines, f"`lit-dpo inspect`, with the same options, shows which rows, and more.{first}"] if lines else []


def remembered(table: PromptTable, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """As `brief`, but once for the same rows: what is said of those of files is kept next to their token ids."""
    files = [Path(one["filename"]) for one in table.encoded.cache_files]
    if not files or not all(source.content for source in table.sources):
        return brief(table, tokenizer)
    # the names are keys of all that the token ids depend on
    key = hashlib.blake2b(table.rows.tobytes(), digest_size=16)
    key.update(json.dumps([code_digest(brief), *(file.name for file in files)]).encode())
    path = files[0].with_name(f"brief-{key.hexdigest()}.json")
    if is_sealed([path], path.stem):  # what somebody else wrote there is not said
        with suppress(OSError, ValueError):
            kept: list[str] = json.loads(path.read_text(encoding="utf-8"))
            return kept
    lines = brief(table, tokenizer)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(lines), encoding="utf-8")
    seal([path], path.stem)
    return lines


def _findings(table: PromptTable, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    yield encoded_duplicates(table)
    yield _contradictions(table)
    yield from ends(table, tokenizer)
    yield length_bias(table)
    yield _repeated_prompts(table)


def encoded_duplicates(table: PromptTable) -> Finding:
    """Find examples that say what an earlier one says, to the token."""
    same = same_examples(table)
    again = np.flatnonzero(same != np.arange(table.size)).tolist()
    examples = (Example(_place(table, one), "as", _place(table, int(same[one]))) for one in again)
    return found("duplicates", len(again), table.size, examples)


def _contradictions(table: PromptTable) -> Finding:
    prompts = table.prompt_keys.repeat(table.comparisons_per_prompt)
    _, codes, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    several = np.flatnonzero(counts[codes] > 1)
    better, worse = sides(table)[:, several]
    ids = completion_ids(table)
    turned, seen = 0, set()
    for prompt, *places in zip(prompts[several].tolist(), better.tolist(), worse.tolist(), strict=True):
        chosen, rejected = (ids.of(place).tobytes() for place in places)
        seen.add((prompt, chosen, rejected))
        turned += chosen != rejected and (prompt, rejected, chosen) in seen
    return found("contradictions", turned, len(prompts))


def length_bias(table: PromptTable) -> Finding:
    """Say how well the number of tokens alone tells the sides."""
    measured = lengths(table)
    longer = np.sign(measured.chosen - measured.rejected)
    right, of = max((longer > 0).sum(), (longer < 0).sum()) + 0.5 * (longer == 0).sum(), len(longer)
    said = f"the chosen one is longer in {percent(float((longer > 0).mean()) if of else 0.0)}"
    detail = f"{said}, rank correlation {rank_correlation(measured.chosen, measured.rejected):+.2f}"
    return found("length-bias", round(right), of, low=wilson(float(right), of)[0], detail=detail)


def _repeated_prompts(table: PromptTable) -> Finding:
    again = table.size - len(np.unique(table.prompt_keys))
    counted = tokens(table)
    detail = f"{percent(1 - counted.grouped / counted.row)} of the tokens" if again else ""
    return found("repeated-prompts", again, table.size, detail=detail)


def _place(table: PromptTable, example: int) -> str:
    return table.place(table.first_row(example))
