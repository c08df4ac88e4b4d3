"""What is wrong with single rows: nothing said, control tokens, blanks, lost characters, ties."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lit_dpo.data.doctor.findings import Example, Finding, found
from lit_dpo.data.doctor.rows import Facts
from lit_dpo.data.doctor.texts import TextFacts


def content(facts: Facts) -> Iterator[Finding]:
    """Find rows and completions that are odd by themselves."""
    yield _equal_sides(facts)
    yield _empty(facts)
    yield _of_completions(facts, "one-word-completions", lambda one: one.words <= 1, lambda one: repr(one.first))
    yield _ties(facts)
    yield _control(facts)
    yield _outer_blanks(facts)
    early = [place for place, row in enumerate(facts.rows) if row.early]
    examples = (Example(facts.place(place), "an earlier turn differs") for place in early)
    yield found("early-parting", len(early), len(facts.rows), examples)
    yield _replaced(facts)
    yield _of_completions(facts, "mixed-scripts", lambda one: bool(one.foreign), lambda one: one.foreign)


def _of_completions(
    facts: Facts, name: str, holds: Callable[[TextFacts], bool], note: Callable[[TextFacts], str]
) -> Finding:
    those = [place for place, one in enumerate(facts.completions) if holds(one)]
    examples = (Example(facts.place(facts.row_of[place]), note(facts.completions[place])) for place in those)
    return found(name, len(those), len(facts.completions), examples)


def _equal_sides(facts: Facts) -> Finding:
    pairs = zip(facts.row_of_comparison.tolist(), facts.chosen.tolist(), facts.rejected.tolist(), strict=True)
    keys = [one.key for one in facts.completions]
    rows = [row for row, chosen, rejected in pairs if keys[chosen] == keys[rejected]]
    examples = (Example(facts.place(row), "chosen is rejected") for row in rows)
    return found("equal-sides", len(rows), len(facts.chosen), examples)


def _empty(facts: Facts) -> Finding:
    """Count those that the format leaves out, and those that are kept but say nothing."""
    dropped = sum(count for reason, count in facts.table.dropped.items() if "empty" in reason)
    blank = {facts.row_of[place] for place, one in enumerate(facts.completions) if not one.last}
    examples = [Example(facts.place(row), "only blanks") for row in sorted(blank)]
    if dropped and not facts.table.is_merged:
        places = (number for number, reason in enumerate(facts.table.facts("dropped")) if "empty" in reason)
        examples += [Example(facts.table.place(number), "left out") for number in places]
    return found("empty-completions", dropped + len(blank), len(facts.rows) + dropped, examples)


def _ties(facts: Facts) -> Finding:
    ranked = sum(row.ranked for row in facts.rows)
    examples = (Example(facts.place(n), f"{row.tied} of its pairs") for n, row in enumerate(facts.rows) if row.tied)
    return found("ties", sum(row.tied for row in facts.rows), ranked, examples)


def _control(facts: Facts) -> Finding:
    """Count rows, whichever of their texts it is in."""
    notes = {place: f"{row.control} in the prompt" for place, row in enumerate(facts.rows) if row.control}
    for place, one in enumerate(facts.completions):
        if one.control:
            notes.setdefault(int(facts.row_of[place]), f"{one.control} in a completion")
    examples = (Example(facts.place(row), note) for row, note in sorted(notes.items()))
    return found("control-tokens", len(notes), len(facts.rows), examples)


def _replaced(facts: Facts) -> Finding:
    notes = {place: "in the prompt" for place, row in enumerate(facts.rows) if row.replaced}
    for place, one in enumerate(facts.completions):
        if one.replaced:
            notes.setdefault(int(facts.row_of[place]), "in a completion")
    examples = (Example(facts.place(row), note) for row, note in sorted(notes.items()))
    return found("replacement-characters", len(notes), len(facts.rows), examples)


def _outer_blanks(facts: Facts) -> Finding:
    blanks = [one.blank for one in facts.completions]
    pairs = zip(facts.row_of_comparison.tolist(), facts.chosen.tolist(), facts.rejected.tolist(), strict=True)
    notes = [
        (row, f"blanks of the chosen side: {blanks[chosen] or 'none'}; of the other: {blanks[rejected] or 'none'}")
        for row, chosen, rejected in pairs
        if blanks[chosen] != blanks[rejected]
    ]
    examples = (Example(facts.place(row), note) for row, note in notes)
    return found("outer-blanks", len(notes), len(facts.chosen), examples)
