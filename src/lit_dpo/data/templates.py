"""Chat templates before they render: read from a file, and asked for the arguments that they know."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_dpo.errors import DataError

if TYPE_CHECKING:
    from jinja2 import Environment
    from transformers import PreTrainedTokenizerBase

# what a template is given anyway, by transformers
_GIVEN = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}


def read_template(path: str) -> str:
    """Return the chat template that a file holds.

    Raises:
        DataError: if there is none, or one that is no Jinja.
    """
    from jinja2 import TemplateSyntaxError

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no UTF-8"
        raise DataError(f"Expected a file in `chat_template` but {path!r} cannot be read: {why}.") from None
    try:
        known = _variables(text)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except TemplateSyntaxError as error:
        raise DataError(f"{path}, line {error.lineno}: Expected a chat template in Jinja but {error.message}") from None
    if "messages" not in known:
        raise DataError(f"{path}: Expected a chat template but it does not read `messages`.")
    return text


def check_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> None:
    """See that a tokenizer's chat template reads what `chat_template_kwargs` gives it.

    Raises:
        DataError: for an argument that it does not name, with the nearest that it does.
    """
    if arguments and not tokenizer.chat_template:
        raise DataError(
            f"Expected no `chat_template_kwargs` but got {_quoted(arguments)}: the tokenizer "
            f"`{tokenizer.name_or_path}` has no chat template. Name a file with one in `chat_template`."
        )
    for name in arguments:
        if said := unread(tokenizer, name, arguments, every=True):
            raise DataError(f"Expected other `chat_template_kwargs` for `{tokenizer.name_or_path}`: {said}.")


def unread(
    tokenizer: PreTrainedTokenizerBase, name: str, arguments: Mapping[str, Any], *, every: bool = False
) -> str | None:
    """Say why the chat template does not read an argument; None if it does.

    Args:
        tokenizer: has the template, or several by name.
        name: of the argument.
        arguments: all: with `tools` among them a tokenizer may take another template.
        every: whether it is given to all rows, of which each may take another of the tokenizer's templates.
    """
    if name == "chat_template":
        return "`chat_template` is no argument of a template; `--data.chat_template FILE` sets one, and exports it too"
    if name in _GIVEN or name in _calls():
        return f"`{name}` is no argument of a template, and is set for each row as it has to be"
    known = _known(tokenizer, "tools" in arguments, every)
    if name in known:
        return None
    close = difflib.get_close_matches(name, sorted(known - _GIVEN - tokenizer.special_tokens_map.keys()), n=2)
    whose = "" if every else "the row's "
    return f"the chat template does not read {whose}`{name}`" + (f", but {_quoted(close)}" if close else "")


def _known(tokenizer: PreTrainedTokenizerBase, has_tools: bool, every: bool) -> frozenset[str]:
    """Variables of the templates that rows may be rendered by."""
    template: Any = tokenizer.chat_template
    if not isinstance(template, dict):
        return _variables(str(template))
    if every:
        return frozenset().union(*map(_variables, map(str, template.values())))
    return _variables(tokenizer.get_chat_template(tools=[] if has_tools else None))


@lru_cache
def _variables(template: str) -> frozenset[str]:
    """Name what a template reads that it does not set first."""
    from jinja2.meta import find_undeclared_variables

    from lit_dpo.data.sandbox import LONGEST_TEMPLATE

    if len(template) > LONGEST_TEMPLATE:
        raise DataError(f"Expected a chat template of at most {LONGEST_TEMPLATE} characters but got {len(template)}.")
    try:
        return frozenset(find_undeclared_variables(_environment().parse(template)))
    except RecursionError:
        raise DataError("Expected a chat template that can be read, but it is nested too deep.") from None


@lru_cache
def _environment() -> Environment:
    """Return one that can read all that transformers can: its `{% generation %}` too."""
    from jinja2.ext import Extension
    from jinja2.nodes import Node
    from jinja2.parser import Parser

    from lit_dpo.data.sandbox import BoundedSandbox

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as in Jinja

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    # nothing is rendered; but what is constant in a template is computed where its variables are looked for
    return BoundedSandbox(extensions=[Generation, "jinja2.ext.loopcontrols"])


@lru_cache
def _calls() -> frozenset[str]:
    """Name what `apply_chat_template` itself takes, and does not hand on."""
    from transformers import PreTrainedTokenizerBase

    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset(own) - {"self", "tools", "documents", "kwargs"}


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer with another chat template; the one that was given may be someone's."""
    import copy

    found = copy.copy(tokenizer)
    found.chat_template = template
    return found


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
