"""What token ids show: lengths, ends, boundaries; and the few checks that every run can afford."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_dpo.data.doctor.findings import Example, Finding, found
from lit_dpo.data.sameness import completion_ids, prompt_ids, sides
from lit_dpo.data.table import PromptTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
_END = 4
"""Tokens at the end of a completion among which its end token is; a template may write a newline after it."""
_AROUND = 8  # tokens on each side of a boundary
_BOUNDARIES = 5_000  # that are looked at, evenly spaced


class Lengths(NamedTuple):
    """Tokens of what is used: `(N,)` of prompts, `(B,)` of each comparison's two completions."""

    prompt: NDArray[np.int64]
    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]

    @property
    def percentiles(self) -> dict[str, dict[str, int]]:
        """By part, tokens at some percentiles."""
        return {
            part: {f"p{n}": int(v) for n, v in zip(PERCENTILES, np.percentile(those, PERCENTILES), strict=True)}
            for part, those in self._asdict().items()
            if len(those)
        }


def lengths(table: PromptTable) -> Lengths:
    """Measure what is used."""
    chosen, rejected = sides(table)
    of = table.completion_lengths
    return Lengths(table.prompt_lengths, of[chosen], of[rejected])


class Tokens(NamedTuple):
    """Tokens of a pass over the data.

    Attributes:
        row: as they are computed: each prompt once, and its completions.
        pairs: as pairs of two whole sequences, the prompt in each.
        grouped: as rows of `row`, if equal prompts of several rows were computed once, too.
    """

    row: int
    pairs: int
    grouped: int


def tokens(table: PromptTable) -> Tokens:
    """Count them."""
    measured = lengths(table)
    pairs = int((measured.prompt * table.comparisons_per_prompt).sum() * 2)
    pairs += int(measured.chosen.sum() + measured.rejected.sum())
    row = int(table.lengths.sum())
    _, first = np.unique(table.prompt_keys, return_index=True)
    return Tokens(row, pairs, row - int(measured.prompt.sum() - measured.prompt[first].sum()))


def ends(table: PromptTable, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Find completions without an end, and with two."""
    special = _special_ids(tokenizer)
    last = completion_ids(table).last(_END)
    is_special = np.isin(last, special) & (last >= 0)
    missing = np.flatnonzero(~is_special.any(axis=1)) if len(last) else np.zeros(0, np.int64)
    ordered = np.sort(np.where(is_special, last, -1 - np.arange(_END)), axis=1)
    doubled = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
    example_of = np.repeat(np.arange(table.size), table.completions_per_prompt)
    for name, those in (("doubled-ends", doubled), ("missing-ends", missing)):
        places = (table.place(table.first_row(int(example_of[place]))) for place in those.tolist())
        examples = (Example(place, f"…{_shown(tokenizer, last[n])}") for place, n in zip(places, those, strict=True))
        yield found(name, len(those), len(last), examples)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    added = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return sorted({*added, *tokenizer.all_special_ids})


def _shown(tokenizer: PreTrainedTokenizerBase, ids: NDArray[Any]) -> str:
    return repr(str(tokenizer.decode([one for one in ids.tolist() if one >= 0])))


def boundary_merges(table: PromptTable, tokenizer: PreTrainedTokenizerBase) -> Finding:
    """Find completions whose first token the tokenizer would merge with the prompt's last; of many, a sample."""
    prompts, completions = prompt_ids(table), completion_ids(table)
    example_of = np.repeat(np.arange(table.size), table.completions_per_prompt)
    looked = np.unique(np.linspace(0, len(example_of) - 1, min(len(example_of), _BOUNDARIES)).astype(np.int64))
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], bool] = {}
    merged = []
    for place in looked.tolist():
        around = (
            tuple(prompts.of(example_of[place])[-_AROUND:].tolist()),
            tuple(completions.of(place)[:_AROUND].tolist()),
        )
        if around not in seen:
            seen[around] = _merges(tokenizer, *around)
        if seen[around]:
            merged.append(place)
    places = (table.place(table.first_row(int(example_of[place]))) for place in merged)
    notes = (_around(tokenizer, prompts.of(example_of[place]), completions.of(place)) for place in merged)
    return found("boundary-merges", len(merged), len(looked), map(Example, places, notes))


def _merges(tokenizer: PreTrainedTokenizerBase, prompt: tuple[int, ...], completion: tuple[int, ...]) -> bool:
    before, after = (str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in (prompt, completion))
    alone, together = (
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in (before, before + after)
    )
    return bool(together[: len(alone)] != alone)


def _around(tokenizer: PreTrainedTokenizerBase, prompt: NDArray[np.int32], completion: NDArray[np.int32]) -> str:
    return f"…{_shown(tokenizer, prompt[-4:])} | {_shown(tokenizer, completion[:4])}…"


def bad_rows(table: PromptTable) -> Finding:
    """Count the rows that cannot be used, with what is wrong with some."""
    bad = table.bad
    examples = (Example(table.place(row), reason) for row, reason in bad)
    return found("bad-rows", len(bad), sum(len(source.rows) for source in table.sources), examples)


def too_long(table: PromptTable) -> Finding:
    """Count what the limits take away; cut ones are used, and counted by `missing-ends`."""
    dropped = sum(count for reason, count in table.dropped.items() if "longer than max_" in reason)
    examples: list[Example] = []
    if dropped and not table.is_merged:
        reasons = table.facts("dropped")
        numbers = (number for number, reason in enumerate(reasons) if "longer than max_" in reason)
        examples = [Example(table.place(n), reasons[n]) for n, _ in zip(numbers, range(8), strict=False)]
    lost = f"{table.lost:,} completions of other rows too" if table.lost else ""
    return found("too-long", dropped, table.total, examples, detail=lost)
