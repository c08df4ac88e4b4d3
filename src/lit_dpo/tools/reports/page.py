"""The report as one page: nothing is fetched, nothing is run, and all text of the data is text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lit_dpo import __version__
from lit_dpo.data.doctor import Examined, Finding
from lit_dpo.data.doctor.examine import Decoded, Frequent
from lit_dpo.data.doctor.findings import percent
from lit_dpo.data.doctor.shortcuts import Shortcut
from lit_dpo.tools.reports.charts import bar, histogram, interval
from lit_dpo.tools.reports.html import Child, Html, document, element, marked, table, told
from lit_dpo.tools.reports.record import Inspected, excerpt, file_name, noted, saved
from lit_dpo.tools.reports.terminal import facts

_PARTS = {"chosen": "c", "rejected": "r"}
_LONGEST = 4_000  # characters of a decoded text


def page(given: Inspected) -> str:
    """Write the page."""
    title = f"{file_name(given.data)} · lit-dpo inspect"
    return document(title, *_sections(given))


def _sections(given: Inspected) -> Iterator[Html]:
    examined = given.examined
    yield _head(given)
    yield _tiles(examined)
    yield from _findings(examined)
    yield from _lengths(examined)
    yield from _shortcuts(examined.shortcuts, examined.findings)
    yield from _rows(given)
    if examined.frequent:
        yield from _frequent(examined.frequent)
    if examined.examples:
        yield element("h2", "Examples, as they are trained on")
        yield element(
            "p",
            "From the token ids. The prompt is read only; chosen and rejected, to their end tokens, are trained on.",
            class_="soft small",
        )
        yield from map(_example, examined.examples)
    yield element("footer", f"lit_dpo {__version__}. The page is one file; it loads nothing and runs nothing.")


def _head(given: Inspected) -> Html:
    return element(
        "header",
        element("p", "lit-dpo inspect", class_="eyebrow"),
        told(file_name(given.data), "h1"),
        element("p", told(given.data), class_="soft small wrap"),
        element(
            "p",
            "Lengths are in tokens of ",
            element("span", marked(given.tokenizer), dir="auto"),
            ".",
            class_="soft small",
        ),
        *(element("p", marked(note), class_="note") for note in given.notes),
    )


def _tiles(examined: Examined) -> Html:
    first, above = examined.splits[0], len(examined.above)
    tiles = [
        (f"{above}", f"finding{'' if above == 1 else 's'} above the threshold", "warn" if above else "fine"),
        (f"{first.rows:,}", "rows read", ""),
        (f"{first.kept:,}", "kept", ""),
        (f"{first.prompts:,}", "different prompts", ""),
        (f"{first.comparisons:,}", "comparisons", ""),
        (f"{examined.tokens.row:,}", "tokens a pass", ""),
    ]
    return element(
        "div",
        *(
            element("div", element("b", number), element("span", what, class_="soft small"), class_=f"tile {kind}")
            for number, what, kind in tiles
        ),
        class_="tiles",
    )


def _findings(examined: Examined) -> Iterator[Html]:
    yield element("h2", "What to do" if examined.above else "Nothing is above its threshold")
    yield from map(_finding, examined.above)
    below = [one for one in examined.findings if not one.above]
    rows = [
        element(
            "li", element("code", one.kind.name), " ", marked(one.line), f", threshold {percent(one.kind.threshold)}"
        )
        for one in below
    ]
    summary = element("summary", f"{len(below)} others are below their thresholds")
    yield element("details", summary, element("ul", *rows, class_="small"), class_="card")


def _finding(one: Finding) -> Html:
    examples = [
        element("li", told(file_name(example.place), "b"), " ", told(noted(example)), class_="small")
        for example in one.examples
    ]
    said = f"{one.counted:,} of {one.of:,} {one.kind.what}" + (f"; {one.detail}" if one.detail else "") + "."
    parts: list[Child] = [
        element(
            "header",
            element("h3", element("code", one.kind.name)),
            element("span", percent(one.share), class_="share"),
        ),
        element("p", marked(said), class_="wrap"),
        element("p", marked(one.kind.remedy), class_="remedy"),
    ]
    if examples:
        parts.append(element("details", element("summary", "Which rows"), element("ul", *examples)))
    return element("section", *parts, class_="card finding")


def _lengths(examined: Examined) -> Iterator[Html]:
    lengths = examined.lengths
    if not len(lengths.prompt):
        return
    sides = {"chosen": lengths.chosen, "rejected": lengths.rejected}
    prompts, prompt_end = histogram({"prompt": lengths.prompt}, "tokens of the prompts")
    completions, completion_end = histogram(sides, "tokens of the chosen and the rejected completions")
    legend = element(
        "span",
        element("span", class_="key c"),
        "chosen",
        element("span", class_="key r"),
        "rejected",
        class_="small soft",
    )
    yield element("h2", "Lengths in tokens")
    yield element(
        "div",
        element("section", element("h3", "Prompts"), prompts, _axis(prompt_end), class_="card"),
        element("section", element("h3", "Completions", legend), completions, _axis(completion_end), class_="card"),
        class_="two",
    )
    names = {"p0": "shortest", "p5": "5 %", "p25": "25 %", "p50": "median", "p75": "75 %", "p95": "95 %", "p99": "99 %"}
    names["p100"] = "longest"
    rows = [(part, *(f"{those[name]:,}" for name in names)) for part, those in lengths.percentiles.items()]
    yield element("section", table(("", *names.values()), rows, numbers=True), class_="card")


def _axis(end: int) -> Html:
    return element(
        "div",
        element("span", "0"),
        element("span", f"{end // 2:,}"),
        element("span", f"{end:,} and more"),
        class_="axis",
    )


def _shortcuts(measured: Iterable[Shortcut], findings: Iterable[Finding]) -> Iterator[Html]:
    thresholds = {one.kind.name.removeprefix("shortcut-"): one.kind.threshold for one in findings}
    yield element("h2", "Can one feature alone tell the sides?")
    yield element(
        "p",
        "How often a classifier of one feature tells the chosen completion on prompts that it has not seen. "
        "50 % is chance; from 40 % to 100 %, with the 95 % interval.",
        element("span", class_="key h"),
        "chance",
        element("span", class_="key t"),
        "threshold of the interval's lower end",
        class_="soft small",
    )
    yield element(
        "section",
        *(_feature(one, thresholds["length-bias" if one.name == "length" else one.name]) for one in measured),
        class_="card",
        style="margin-top:12px",
    )


def _feature(one: Shortcut, threshold: float) -> Html:
    said = f"{percent(one.low)} to {percent(one.high)}, {one.comparisons:,} comparisons" + (
        f"; {one.sign}" if one.sign else ""
    )
    return element(
        "div",
        element("span", one.name.replace("-", " ")),
        interval(one.low, one.accuracy, one.high, threshold, f"{one.name}: {percent(one.accuracy)}"),
        element("b", percent(one.accuracy), class_="right"),
        element("span", marked(said), class_="sign soft small wrap"),
        class_="feature",
    )


def _rows(given: Inspected) -> Iterator[Html]:
    examined = given.examined
    yield element("h2", "Rows and tokens")
    columns = ("split", "read", "kept", "prompts", "completions", "comparisons")
    rows: list[tuple[Child, ...]] = [
        (told(one.name), *(f"{n:,}" for n in (one.rows, one.kept, one.prompts, one.completions, one.comparisons)))
        for one in examined.splits
    ]
    dropped = [
        element("li", told(one.name), f": {count:,} dropped: ", told(why), class_="small")
        for one in examined.splits
        for why, count in one.dropped.items()
    ]
    left_out = [element("ul", *dropped)] if dropped else []
    yield element("section", table(columns, rows, numbers=True), *left_out, class_="card")
    tokens = examined.tokens
    bars = [
        ("as pairs, the prompt in each", tokens.pairs),
        ("as computed, each prompt once", tokens.row),
        ("with --data.group_by_prompt", tokens.grouped),
    ]
    yield element("section", *(_bar(name, count, tokens.pairs) for name, count in bars), class_="card")
    said: list[tuple[Child, ...]] = [
        (name, told(text, style="white-space:pre-wrap")) for name, text in facts(given) if name != "a pass"
    ]
    yield element("section", table((), said), class_="card")


def _bar(name: str, count: int, most: int) -> Html:
    fewer = saved(count, most)
    note = f", {percent(fewer)} fewer" if fewer > 0 else ""
    label = element("p", f"{name}: ", element("b", f"{count:,}"), f" tokens{note}", class_="small")
    return element("div", label, bar(count / max(most, 1), name), style="margin:8px 0")


def _frequent(frequent: Iterable[Frequent]) -> Iterator[Html]:
    yield element("h2", "Most frequent completions")
    rows: list[tuple[Child, ...]] = [
        (told(excerpt(one.text, 240), class_="wrap"), f"{one.times:,}") for one in frequent
    ]
    yield element("section", table(("completion", "times"), rows, numbers=True), class_="card")


def _example(one: Decoded) -> Html:
    parts: list[Child] = [told(file_name(one.place), "h3", class_="wrap")]
    parts += [element("p", "prompt", class_="role"), told(excerpt(one.prompt, _LONGEST), "div", class_="part p")]
    for role, text in one.completions:
        parts.append(element("p", role, class_="role"))
        parts.append(told(excerpt(text, _LONGEST), "div", class_=f"part {_PARTS.get(role, 'o')}"))
    return element("section", *parts, class_="card", style="margin-top:12px")
