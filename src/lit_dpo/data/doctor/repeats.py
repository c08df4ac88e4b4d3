"""What is there several times: rows, prompts, completions; and what contradicts itself."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lit_dpo.data.doctor.findings import Example, Finding, found, percent
from lit_dpo.data.doctor.rows import Facts, RowFacts
from lit_dpo.data.table import PromptTable

_AT_LEAST = 5  # times, below which nothing is frequent


def repeats(facts: Facts) -> Iterator[Finding]:
    """Find rows, prompts and completions that are there several times."""
    yield _duplicates(facts)
    if facts.near is not None:
        pairs = facts.near
        examples = (Example(facts.table.place(one), "like", facts.table.place(other)) for one, other in pairs)
        yield found("near-duplicates", len(pairs), len(facts.rows), examples)
    yield _repeated_prompts(facts)
    yield _contradictions(facts)
    yield _both_roles(facts)
    yield _frequent(facts)


def _duplicates(facts: Facts) -> Finding:
    again = _repeated([row.says for row in facts.rows])
    examples = (Example(facts.place(row), "as", facts.place(first)) for row, first in again)
    return found("duplicates", len(again), len(facts.rows), examples)


def _repeated_prompts(facts: Facts) -> Finding:
    again = _repeated([row.prompt for row in facts.rows])
    examples = (Example(facts.place(row), "as", facts.place(first)) for row, first in again)
    distinct = len(facts.rows) - len(again)
    return found("repeated-prompts", len(again), len(facts.rows), examples, detail=f"{distinct:,} different prompts")


def _repeated(keys: Sequence[int]) -> list[tuple[int, int]]:
    """Return the places of keys that were there before, each with the first place of its key."""
    first: dict[int, int] = {}
    return [(place, first[one]) for place, one in enumerate(keys) if first.setdefault(one, place) != place]


def _contradictions(facts: Facts) -> Finding:
    """Find comparisons of one prompt that stand the other way round in another row."""
    seen: dict[tuple[int, int, int], int] = {}
    turned = []
    keys = [one.key for one in facts.completions]
    by_comparison = zip(facts.row_of_comparison.tolist(), facts.chosen.tolist(), facts.rejected.tolist(), strict=True)
    for row, chosen, rejected in by_comparison:
        prompt, better, worse = facts.rows[row].prompt, keys[chosen], keys[rejected]
        if better == worse:
            continue
        seen.setdefault((prompt, better, worse), row)
        if (other := seen.get((prompt, worse, better))) is not None:
            turned.append((row, other))
    examples = (Example(facts.place(row), "turned around in", facts.place(other)) for row, other in turned)
    return found("contradictions", len(turned), len(facts.chosen), examples)


def _both_roles(facts: Facts) -> Finding:
    """Find completions that are chosen for one prompt and rejected for another; of one prompt that is a chain."""
    roles: dict[int, tuple[set[int], set[int]]] = defaultdict(lambda: (set(), set()))
    first: dict[int, int] = {}
    rows = facts.row_of_comparison.tolist()
    for place, those in enumerate((facts.chosen.tolist(), facts.rejected.tolist())):
        for row, completion in zip(rows, those, strict=True):
            key = facts.completions[completion].key
            roles[key][place].add(facts.rows[row].prompt)
            first.setdefault(key, row)
    both = [key for key, (better, worse) in roles.items() if better and worse and len(better | worse) > 1]
    examples = (Example(facts.place(first[key]), "chosen here, rejected elsewhere") for key in both)
    return found("both-roles", len(both), len(roles), examples)


def _frequent(facts: Facts) -> Finding:
    """Find the completion that most comparisons have on one side, by row."""
    (key, count), of = most_frequent(facts, 1)[0] if facts.completions else (0, 0), len(facts.completions)
    rows = [row for row, one in zip(facts.row_of.tolist(), facts.completions, strict=True) if one.key == key]
    count = count if count >= _AT_LEAST else 0
    examples = (Example(facts.place(row), "has it") for row in rows) if count else ()
    return found("frequent-completions", count, of, examples)


def most_frequent(facts: Facts, most: int) -> list[tuple[int, int]]:
    """Return the hashes of the most frequent completions, and how often they are there."""
    counts = Counter(one.key for one in facts.completions)
    return counts.most_common(most)  # of equal ones the first


def shared_prompts(name: str, facts: Facts, split: str, table: PromptTable, others: Sequence[RowFacts]) -> Finding:
    """Find prompts of another split that are in this one too, whatever their case, blanks and punctuation.

    Args:
        name: of the finding.
        facts: of the training data.
        split: that is compared, as it is called.
        table: of that split.
        others: its rows.
    """
    here = {row.normal: place for place, row in reversed([*enumerate(facts.rows)])}
    exact = {row.prompt for row in facts.rows}
    different = {row.normal: row for row in reversed(others)}
    shared = [row for normal, row in reversed([*different.items()]) if normal in here]
    alike = sum(row.prompt not in exact for row in shared)
    examples = (Example(table.place(row.number), "as", facts.place(here[row.normal])) for row in shared)
    detail = f"{alike:,} of them but for case, blanks or punctuation" if alike else ""
    finding = found(name, len(shared), len(different), examples, detail=detail)
    kind = finding.kind._replace(what=f"prompts of {split} are in train too")
    return finding._replace(kind=kind)


def outcome_counts(values: NDArray[np.int64]) -> str:
    """Write how often each number is there, for reading.

    Example:
        >>> outcome_counts(np.array([2, 2, 4]))
        '2: 67 %, 4: 33 %'
    """
    numbers, counts = np.unique(values, return_counts=True)
    return ", ".join(f"{n}: {percent(round(c / len(values), 2))}" for n, c in zip(numbers, counts, strict=True))
