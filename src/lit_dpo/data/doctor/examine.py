"""All that is known of the data of a run, as one record, which is printed, or written as JSON and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lit_dpo.data.comparisons import Comparing
from lit_dpo.data.doctor.content import content
from lit_dpo.data.doctor.encoded import Lengths, Tokens, bad_rows, boundary_merges, ends, lengths, tokens, too_long
from lit_dpo.data.doctor.findings import Finding, with_thresholds
from lit_dpo.data.doctor.near import NearDuplicates
from lit_dpo.data.doctor.repeats import most_frequent, repeats, shared_prompts
from lit_dpo.data.doctor.rows import Facts, read, read_prompts
from lit_dpo.data.doctor.shortcuts import Shortcut, shortcut_findings, shortcuts
from lit_dpo.data.doctor.texts import Reader, written
from lit_dpo.data.formats.base import Preference
from lit_dpo.data.sameness import completion_ids, prompt_ids
from lit_dpo.data.table import PromptTable
from lit_dpo.errors import DataError, LitDPOError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FREQUENT = 5


class Split(NamedTuple):
    """Counts of a split.

    Attributes:
        name: `train`, `val`, `val/NAME`, `test`.
        rows: read.
        kept: examples that are used.
        dropped: how many are not, by reason.
        prompts: different ones, of what is used.
        completions: that are used.
        comparisons: likewise.
    """

    name: str
    rows: int
    kept: int
    dropped: dict[str, int]
    prompts: int
    completions: int
    comparisons: int


class Decoded(NamedTuple):
    """A prompt as it is trained on, from its token ids.

    Attributes:
        place: its file, and its number there.
        prompt: text of the ids that are read and not trained on.
        completions: role (`chosen`, `rejected`, or a place among many) and text of the ids that are trained on.
    """

    place: str
    prompt: str
    completions: list[tuple[str, str]]


class Frequent(NamedTuple):
    """A completion that is there several times."""

    text: str
    times: int


class Examined(NamedTuple):
    """What was found.

    Attributes:
        splits: that were read, `train` first.
        columns: of the training data, each with the number of rows in which it holds something.
        findings: of all kinds that were looked for.
        shortcuts: how well each feature alone tells the sides.
        lengths: of the training data.
        tokens: of a pass over them.
        completions_per_prompt: how many prompts have how many completions.
        frequent: the most frequent completions.
        examples: decoded.
        notes: what was not looked at, or otherwise than a run would.
    """

    splits: list[Split]
    columns: dict[str, int]
    findings: list[Finding]
    shortcuts: list[Shortcut]
    lengths: Lengths
    tokens: Tokens
    completions_per_prompt: dict[int, int]
    frequent: list[Frequent]
    examples: list[Decoded]
    notes: list[str]

    @property
    def above(self) -> list[Finding]:
        """Findings that are above their thresholds."""
        return [one for one in self.findings if one.above]


def examine(
    tables: Mapping[str, PromptTable],
    tokenizer: PreTrainedTokenizerBase,
    comparing: Comparing,
    thresholds: Mapping[str, float] | None = None,
    examples: int = 3,
) -> Examined:
    """Look at the training data of a run, and at what others share with them.

    Args:
        tables: by split; `train`, and those there are of `val`, `val/NAME`, `test`.
        tokenizer: that encoded them.
        comparing: which completions are compared.
        thresholds: of findings by name, in place of the usual ones.
        examples: how many are decoded.

    Raises:
        DataError: for a threshold of no finding; if there are no training data.
    """
    with_thresholds([], thresholds or {})  # before the work
    if (table := tables.get("train")) is None:
        raise DataError("Expected training data to inspect: name a file with `--data.train`.")
    near, notes = _near()
    facts = read(table, comparing, Reader(_special_tokens(tokenizer)), near)
    if near is not None and near.full:
        notes.append("the data are large: near duplicates of some later rows were not looked for")
    measured = shortcuts(facts)
    findings = [*_findings(facts, tables, tokenizer), *shortcut_findings(facts, measured)]
    return Examined(
        splits=[_split(name, one) for name, one in tables.items()],
        columns={name: facts.filled[name] for source in table.sources[:1] for name in source.rows.column_names},
        findings=with_thresholds(findings, thresholds or {}),
        shortcuts=measured,
        lengths=lengths(table),
        tokens=tokens(table),
        completions_per_prompt=_counts(table),
        frequent=_frequent(facts),
        examples=[_decoded(table, tokenizer, place) for place in _spread(table.size, examples)],
        notes=notes,
    )


def _near() -> tuple[NearDuplicates | None, list[str]]:
    try:
        return NearDuplicates(), []
    except LitDPOError as error:
        return None, [f"near duplicates were not looked for: {error}"]


def _findings(facts: Facts, tables: Mapping[str, PromptTable], tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    table = facts.table
    yield bad_rows(table)
    yield from repeats(facts)
    for split, other in tables.items():
        kind = split.partition("/")[0]
        if kind in ("val", "test"):
            yield shared_prompts(f"shared-prompts-{kind}", facts, split, other, read_prompts(other))
    yield from content(facts)
    yield from ends(table, tokenizer)
    yield boundary_merges(table, tokenizer)
    yield too_long(table)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return {*added, *tokenizer.all_special_tokens}


def _split(name: str, table: PromptTable) -> Split:
    return Split(
        name=name,
        rows=sum(len(source.rows) for source in table.sources),
        kept=table.size,
        dropped=dict(table.dropped.most_common()),
        prompts=len(np.unique(table.prompt_keys)),
        completions=len(table.completion_lengths),
        comparisons=table.comparisons_count,
    )


def _counts(table: PromptTable) -> dict[int, int]:
    numbers, counts = np.unique(table.completions_per_prompt, return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def _frequent(facts: Facts) -> list[Frequent]:
    """Look the texts up: of all others only a hash is kept."""
    place = {one.key: n for n, one in reversed([*enumerate(facts.completions)])}
    found = []
    for key, count in most_frequent(facts, _FREQUENT):
        if count < 2:
            break
        row = int(facts.row_of[place[key]])
        inside = place[key] - int(np.searchsorted(facts.row_of, row))
        said = facts.table.preference(facts.rows[row].number)
        completions = (said.chosen, said.rejected) if isinstance(said, Preference) else said.completions
        found.append(Frequent(written(completions[inside]), count))
    return found


def _spread(size: int, wanted: int) -> Sequence[int]:
    """Choose places from the beginning to the end."""
    count = min(size, wanted)
    return [place * size // count for place in range(count)]


def _decoded(table: PromptTable, tokenizer: PreTrainedTokenizerBase, place: int) -> Decoded:
    ends = table.completions_per_prompt.cumsum()
    first, last = int(ends[place] - table.completions_per_prompt[place]), int(ends[place])
    prompts, completions = prompt_ids(table), completion_ids(table)
    names = [str(n + 1) for n in range(last - first)]
    if len(names) == 2:
        (chosen, rejected), *_ = table.comparisons[table.comparisons_per_prompt[:place].sum() :].tolist()
        names[chosen], names[rejected] = "chosen", "rejected"
    texts = [tokenizer.decode(completions.of(n).tolist()) for n in range(first, last)]
    return Decoded(
        place=table.place(table.first_row(place)),
        prompt=str(tokenizer.decode(prompts.of(place).tolist())),
        completions=[(name, str(text)) for name, text in zip(names, texts, strict=True)],
    )
