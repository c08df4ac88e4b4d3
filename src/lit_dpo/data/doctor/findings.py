"""What can be found in preference data: each kind by name, with its threshold and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lit_dpo.errors import DataError

EXAMPLES = 5
"""Rows that a finding names."""


class Kind(NamedTuple):
    """A kind of finding.

    Attributes:
        name: in kebab case.
        what: is counted, in words that follow a number.
        threshold: largest share that is nothing to speak of; of a shortcut, largest accuracy.
        remedy: what to do, with options where there are some.
    """

    name: str
    what: str
    threshold: float
    remedy: str


class Example(NamedTuple):
    """A row that a finding is about.

    Attributes:
        place: its file, and its number there.
        note: what is to be seen in it.
        other: the place of another row that the note ends with; empty if there is none.
    """

    place: str
    note: str
    other: str = ""


class Finding(NamedTuple):
    """What was found of one kind.

    Attributes:
        kind: with its threshold.
        counted: how many there are.
        of: of how many that were looked at.
        share: of these; of a shortcut its accuracy, in [0, 1].
        low: what is compared with the threshold: the share, or of a shortcut the lower end of its interval.
        examples: a few rows.
        detail: more numbers, in words; empty if there are none.
    """

    kind: Kind
    counted: int
    of: int
    share: float
    low: float
    examples: Sequence[Example] = ()
    detail: str = ""

    @property
    def above(self) -> bool:
        """Whether it is worth doing something about."""
        return self.low > self.kind.threshold

    @property
    def line(self) -> str:
        """All of it in a sentence."""
        said = f"{self.counted:,} of {self.of:,} {self.kind.what}"
        return f"{said} ({percent(self.share)})" + (f"; {self.detail}" if self.detail else "")


_TEXT = "Take it out of the text"

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("bad-rows", "rows cannot be used", 0.0, "Mend them; or `--data.on_bad_row drop` leaves them out."),
        Kind("duplicates", "rows say what an earlier row says", 0.0, "`--data.deduplicate true` leaves them out."),
        Kind(
            "near-duplicates",
            "rows share four fifths of the phrases of an earlier row",
            0.01,
            "They count several times: take them out, or train for fewer epochs (`--trainer.max_epochs 1`).",
        ),
        Kind(
            "repeated-prompts",
            "rows have the prompt of an earlier row",
            0.1,
            "`--data.group_by_prompt 8` computes the prompt once for them all.",
        ),
        Kind(
            "contradictions",
            "comparisons are turned around by another row of the same prompt",
            0.0,
            "Give the share of votes as `--data.format.probability` and train with `--model.loss SoftDPOLoss`; "
            "without votes, `CDPOLoss` or `RobustDPOLoss`.",
        ),
        Kind(
            "both-roles",
            "different completions are chosen for one prompt and rejected for another",
            0.01,
            "If it is an answer to anything, take it out; if labels are noisy, `CDPOLoss` or `RobustDPOLoss`.",
        ),
        Kind(
            "equal-sides",
            "comparisons have two equal completions",
            0.0,
            "They teach nothing and cost time: take them out.",
        ),
        Kind("empty-completions", "rows have an empty completion", 0.0, "They are left out; see to what wrote them."),
        Kind(
            "one-word-completions",
            "completions are one word or less",
            0.05,
            "A sum of log-probs says little of one word: `IPOLoss`, or `SimPOLoss`, which take the mean.",
        ),
        Kind(
            "ties",
            "pairs of ranked completions tie",
            0.05,
            "They are not compared; `--data.ties half` with `--model.loss SoftDPOLoss` learns from them.",
        ),
        Kind(
            "shared-prompts-val",
            "prompts of val are in train too",
            0.0,
            "Take them out, or hold out by prompt: `--data.val_split 0.1`.",
        ),
        Kind("shared-prompts-test", "prompts of test are in train too", 0.0, "Take them out of train."),
        Kind(
            "control-tokens",
            "rows have a control token as text",
            0.0,
            f"{_TEXT}: whoever writes it can end a turn. Rendered conversations are better given as messages.",
        ),
        Kind(
            "doubled-ends",
            "completions end twice",
            0.0,
            f"{_TEXT}: each completion gets its end by itself.",
        ),
        Kind(
            "missing-ends",
            "completions have no end",
            0.0,
            "The model never learns to stop there: `--data.truncation drop`, or a larger `--data.max_length`.",
        ),
        Kind(
            "boundary-merges",
            "completions begin in the middle of a token",
            0.01,
            "The tokenizer would merge across the boundary: move the blank from the prompt's end to the completions' "
            "start.",
        ),
        Kind(
            "outer-blanks",
            "comparisons have a blank at the outside of one completion only",
            0.02,
            "Strip both sides, or neither.",
        ),
        Kind(
            "early-parting",
            "rows have sides that differ before the last turn",
            0.0,
            "What differs is trained as part of the completion; give the shared turns as the prompt.",
        ),
        Kind(
            "replacement-characters",
            "rows have U+FFFD, a character that was lost",
            0.0,
            "The text was decoded wrongly: write the file anew from its source, as UTF-8.",
        ),
        Kind(
            "mixed-scripts",
            "completions have a fifth of their letters in a script that the prompt has none of",
            0.05,
            "See whether the model shall answer so.",
        ),
        Kind(
            "frequent-completions",
            "completions are the most frequent one",
            0.01,
            "It is learned by heart: take some out, or weigh them down with `--data.format.weight`.",
        ),
        Kind(
            "too-long",
            "rows are dropped or lose completions because they are too long",
            0.05,
            "`--data.max_length`, or another `--data.truncation`.",
        ),
        Kind(
            "length-bias",
            "comparisons are told by length",
            0.6,
            "`LDDPOLoss`, `RDPOLoss` or `SimPOLoss` take length out of what is learned.",
        ),
        *(
            Kind(
                f"shortcut-{name}",
                f"comparisons are told by {what}",
                0.65,
                f"The model can learn this and nothing else: {remedy}.",
            )
            for name, what, remedy in (
                ("first-word", "the first word of a completion", "write the sides in the same manner"),
                ("last-character", "the last character of a completion", "see whether one side is cut off"),
                ("outer-blank", "a blank around a completion", "strip both sides"),
                ("script", "the script of a completion", "take both sides from the same language"),
                ("refusal", "a phrase of refusal", "have refusals on both sides"),
            )
        ),
    )
}


def found(
    name: str, count: int, of: int, examples: Iterable[Example] = (), *, low: float | None = None, detail: str = ""
) -> Finding:
    """Make a finding of a kind, by its name.

    Args:
        name: of the kind.
        count: how many there are.
        of: of how many.
        examples: of which the first few are kept.
        low: what is compared with the threshold. None: the share.
        detail: more numbers, in words.
    """
    share = count / of if of else 0.0
    kept = [one for one, _ in zip(examples, range(EXAMPLES), strict=False)]
    return Finding(KINDS[name], count, of, share, share if low is None else low, kept, detail)


def with_thresholds(findings: Iterable[Finding], thresholds: Mapping[str, float]) -> list[Finding]:
    """Put other thresholds in place of the usual ones.

    Raises:
        DataError: for a name that no kind has.
    """
    if unknown := [name for name in thresholds if name not in KINDS]:
        raise DataError(f"Expected the name of a finding, one of {', '.join(KINDS)}, but got {', '.join(unknown)}.")
    return [
        one._replace(kind=one.kind._replace(threshold=thresholds.get(one.kind.name, one.kind.threshold)))
        for one in findings
    ]


def percent(share: float) -> str:
    """Write a share for reading; what is not nothing is not 0 %.

    Example:
        >>> percent(0.5), percent(0.0123), percent(0.00004), percent(0)
        ('50 %', '1.2 %', '< 0.1 %', '0 %')
    """
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.1f}".removesuffix(".0") + " %"
