"""The report of an ablation as one page: nothing is fetched, nothing is run, and all text of others is text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_dpo import __version__
from lit_dpo.tools.ablate.records import Summary
from lit_dpo.tools.reports.ablation import curves, frontier, margins, paired, tables, texts
from lit_dpo.tools.reports.ablation.vocabulary import Arm, arms, axis, listed
from lit_dpo.tools.reports.html import Html, document, element, told


def page(summary: Summary) -> str:
    """Write the page.

    Args:
        summary: of one arm or many; what was not measured is left out, or a dash.

    Returns:
        HTML, whole; it needs no network and no JavaScript.

    Example:
        >>> page(Summary([], [], [], [], [], {}, 0, 0))[:15]
        '<!doctype html>'
    """
    those = arms(summary)
    return document(f"{_title(those)} · lit-dpo ablate", *_sections(summary, those), class_="report wide")


def _sections(summary: Summary, those: Sequence[Arm]) -> Iterator[Html]:
    yield element(
        "header",
        element("p", "lit-dpo ablate", class_="eyebrow"),
        told(_title(those), "h1"),
        element("p", _ran(summary, those), " ", paired.verdict(summary, those), class_="verdict"),
    )
    if those:
        yield from tables.overview(those)
    yield from texts.failures(summary.failed)
    yield from paired.section(summary, those)
    yield from frontier.section(those)
    yield from frontier.response(those)
    yield from curves.section(those)
    yield from margins.section(summary.margins, those)
    yield from tables.matrix(summary, those)
    yield from tables.groups(those)
    yield from texts.completions(those)
    yield from texts.definitions()
    yield element("footer", f"lit_dpo {__version__}. The page is one file; it loads nothing and runs nothing.")


def _title(those: Sequence[Arm]) -> str:
    varied = dict.fromkeys(axis(name) for one in those for name in one.summary.axes)
    return f"Ablation of {listed(varied)}" if varied else "Ablation"


def _ran(summary: Summary, those: Sequence[Arm]) -> str:
    seeds = {seed for one in those for seed in one.summary.seeds}
    over = f"{_some(len(those), 'arm')} over {_some(len(seeds), 'seed')}"
    failed = f" ({len(summary.failed)} more failed)" if summary.failed else ""
    pairs = f"{_some(summary.pairs, 'held-out pair')} of {_some(summary.prompts, 'prompt')}"
    return f"{_some(len(summary.runs), 'run')}, {over}{failed}, measured on the same {pairs}."


def _some(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
