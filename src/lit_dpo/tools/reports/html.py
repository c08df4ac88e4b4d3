"""Elements of a page. What is no element is text, and text is always escaped: there is no other way in."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import NamedTuple, TypeAlias

from lit_dpo.tools.reports.record import visible
from lit_dpo.tools.reports.style import STYLE

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_VOID = ("meta", "rect", "line", "circle")


class Html(NamedTuple):
    """A piece of a page, whole."""

    source: str


Child: TypeAlias = Html | str


def element(tag: str, /, *children: Child, **attributes: str | float) -> Html:
    """Make an element.

    Args:
        tag: its name.
        children: elements, and texts.
        attributes: by name; an underscore at the end is left out, one inside is a hyphen.

    Example:
        >>> element("p", "1 < 2 ", element("b", "<script>"), class_="fine").source
        '<p class="fine">1 &lt; 2 <b>&lt;script&gt;</b></p>'
    """
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"' for key, value in attributes.items())
    if tag in _VOID:
        return Html(f"<{tag}{given}>" if tag == "meta" else f"<{tag}{given}/>")
    return Html(f"<{tag}{given}>{joined(*children).source}</{tag}>")


def joined(*children: Child) -> Html:
    """Put elements and texts one after another."""
    return Html("".join(one.source if isinstance(one, Html) else _text(one) for one in children))


def told(text: str, tag: str = "span", **attributes: str | float) -> Html:
    """Make an element of a text of the data: it cannot turn around what stands next to it."""
    return element(tag, text, dir="auto", **attributes)


def marked(text: str) -> Html:
    """Make what stands in back-ticks code.

    Example:
        >>> marked("Set `--data.train`.").source
        'Set <code>--data.train</code>.'
    """
    parts = text.split("`")
    return joined(*(element("code", part) if number % 2 else part for number, part in enumerate(parts)))


def document(title: str, *sections: Html, class_: str = "report") -> str:
    """Write a whole page: it fetches nothing, runs nothing, and looks like all pages of ours.

    Args:
        title: in the browser's tab.
        sections: from top to bottom.
        class_: of all of it, for the style.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", title),
        Html(f"<style>{STYLE}</style>"),  # ours, a constant
    )
    body = element("body", element("main", *sections, class_=class_))
    return f"<!doctype html>\n{element('html', head, body, lang='en').source}\n"


def table(columns: Iterable[Child], rows: Iterable[Iterable[Child]], numbers: bool = False) -> Html:
    """Make a table that scrolls by itself where it is too wide.

    Args:
        columns: their titles; may be empty.
        rows: what stands in them; a cell that is a `td` already is taken as it is.
        numbers: whether all columns but the first hold numbers.
    """

    def cells(name: str, row: Iterable[Child]) -> Html:
        return element("tr", *(_cell(name, cell, numbers and place > 0) for place, cell in enumerate(row)))

    columns = [*columns]
    head = element("thead", cells("th", columns)) if columns else joined()
    return element(
        "div", element("table", head, element("tbody", *(cells("td", row) for row in rows))), class_="scroll"
    )


def _cell(name: str, cell: Child, number: bool) -> Html:
    if isinstance(cell, Html) and cell.source.startswith((f"<{name}>", f"<{name} ")):
        return cell
    return element(name, cell, **({"class_": "number"} if number else {}))


def _text(given: str | float) -> str:
    return escape(visible(given) if isinstance(given, str) else f"{given:g}", quote=True)
