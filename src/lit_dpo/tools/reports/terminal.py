"""The report on a terminal. Texts of the data are never read as markup, nor steer the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lit_dpo.data.doctor import Examined, Finding
from lit_dpo.data.doctor.examine import Decoded
from lit_dpo.data.doctor.findings import percent
from lit_dpo.tools.reports.record import Inspected, excerpt, file_name, noted, saved, shortened, visible

_COLOURS = {"chosen": "green", "rejected": "red"}
_SHOWN = ("p5", "p50", "p95", "p99", "p100")


def show(given: Inspected, console: Console) -> None:
    """Print the report."""
    for one in _parts(given):
        console.print(one)
        console.print()


def _parts(given: Inspected) -> Iterator[RenderableType]:
    examined = given.examined
    yield _head(given)
    yield _splits(examined)
    yield _lengths(examined)
    yield _facts(given)
    yield _findings(examined)
    yield _shortcuts(examined)
    if examined.frequent:
        yield _frequent(examined)
    for one in examined.examples:
        yield _example(one)
    yield _end(examined)


def _head(given: Inspected) -> Text:
    lines = [Text(visible(given.data), style="bold"), Text(f"lengths are in tokens of {visible(given.tokenizer)}")]
    lines += [Text(f"note: {visible(note)}", style="yellow") for note in given.notes]
    return Text("\n").join(lines)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(Text(column, style="dim"), justify="right" if number else "left", no_wrap=number == 0)
    return table


def _splits(examined: Examined) -> Group:
    table = _table("Rows", "split", "read", "kept", "prompts", "completions", "comparisons")
    dropped = []
    for one in examined.splits:
        numbers = (one.rows, one.kept, one.prompts, one.completions, one.comparisons)
        table.add_row(Text(visible(one.name)), *(f"{number:,}" for number in numbers))
        dropped += [Text(visible(f"{one.name}: {count:,} dropped: {why}")) for why, count in one.dropped.items()]
    return Group(table, *dropped)


def _lengths(examined: Examined) -> Table:
    table = _table("Tokens", "part", "5 %", "median", "95 %", "99 %", "longest")
    for part, those in examined.lengths.percentiles.items():
        table.add_row(part, *(f"{those[name]:,}" for name in _SHOWN))
    return table


def _facts(given: Inspected) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, said in facts(given):
        table.add_row(name, Text(visible(said)))
    return table


def facts(given: Inspected) -> Iterator[tuple[str, str]]:
    """Go through what else is known: a name, and what is said of it."""
    examined = given.examined
    total, tokens = examined.splits[0].rows, examined.tokens
    yield "columns", ", ".join(f"{name} ({count:,} of {total:,} rows)" for name, count in examined.columns.items())
    yield (
        "a pass",
        f"{tokens.row:,} tokens; {percent(saved(tokens.row, tokens.pairs))} fewer than as pairs, for a prompt is "
        f"computed once; with --data.group_by_prompt {percent(saved(tokens.grouped, tokens.pairs))} fewer",
    )
    counts = examined.completions_per_prompt
    yield "completions", ", ".join(f"{number} for {count:,} prompts" for number, count in counts.items())
    if given.steps is not None:
        steps, epochs = given.steps
        yield "steps", f"{steps:,} on one device, {epochs:.3g} epoch{'' if epochs == 1 else 's'}"
    if given.plan:
        yield "plan", given.plan


def _findings(examined: Examined) -> Group:
    above = examined.above
    fine = ", ".join(one.kind.name for one in examined.findings if not one.above)
    title = f"{len(above)} finding{'' if len(above) == 1 else 's'} above the threshold"
    parts: list[RenderableType] = [Text(title, style="bold")]
    parts += [_finding(one) for one in above]
    return Group(*parts, Text.assemble(("below: ", "dim"), fine))


def _finding(one: Finding) -> Group:
    head = Text.assemble((one.kind.name, "bold yellow"), f"  {visible(one.line)}")
    lines = [
        Text(visible(f"{file_name(example.place)}: {noted(example)}"), style="dim") for example in one.examples[:3]
    ]
    remedy = Text.assemble(("→ ", "cyan"), one.kind.remedy, (f" (threshold {percent(one.kind.threshold)})", "dim"))
    return Group(head, Padding(Group(remedy, *lines), (0, 0, 0, 2)))


def _shortcuts(examined: Examined) -> Table:
    table = _table("Told by one feature alone, on unseen prompts", "feature", "right", "95 % interval", "pairs")
    table.add_column(Text("sign", style="dim"))
    for one in examined.shortcuts:
        interval = f"{percent(one.low)} to {percent(one.high)}"
        sign = Text(visible(one.sign))
        table.add_row(one.name, percent(one.accuracy), interval, f"{one.comparisons:,}", sign)
    return table


def _frequent(examined: Examined) -> Table:
    table = _table("Most frequent completions", "times")
    table.add_column()
    for one in examined.frequent:
        table.add_row(f"{one.times:,}", Text(visible(shortened(one.text))))
    return table


def _example(one: Decoded) -> Group:
    """Dim what is only read, colour what is trained on."""
    parts = [Text(visible(file_name(one.place)), style="bold"), Text(visible(excerpt(one.prompt)), style="dim")]
    for role, text in one.completions:
        colour = _COLOURS.get(role, "blue")
        parts.append(Text.assemble((f" {role} ", f"reverse {colour}"), (f" {visible(excerpt(text))}", colour)))
    return Group(*parts)


def _end(examined: Examined) -> Text:
    above = [one.kind.name for one in examined.above]
    if not above:
        return Text("Nothing is above its threshold.", style="green")
    return Text(f"Above the threshold: {', '.join(above)}.", style="yellow")
