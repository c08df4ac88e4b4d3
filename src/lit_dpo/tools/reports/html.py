"""Elements of a page. What is no element is text, and text is always escaped: there is no other way in."""

from __future__ import annotations

from html import escape
from typing import NamedTuple, TypeAlias

from lit_dpo.tools.reports.record import visible

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


def _text(given: str | float) -> str:
    return escape(visible(given) if isinstance(given, str) else f"{given:g}", quote=True)
