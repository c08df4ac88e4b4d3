"""Chat templates within bounds: a template is a stranger's program, and ends in bounded time and memory.

transformers renders in Jinja's sandbox, which keeps a template from what it should not read, but lets it loop for years
and fill the memory with one expression. `bound` puts a sandbox into its place that counts. Whatever repeats or grows is
asked first: loops, macros, operators, literals, calls, filters. No signal and no second thread are needed, so that it
holds in worker processes and in notebooks too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

from jinja2 import Template, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from lit_dpo.data.bounds import (
    BUDGET,
    Budget,
    OutOfBounds,
    budget_of,
    charged,
    charged_text,
    check_call,
    check_operator,
    checked_filter,
    deep_size,
)

LONGEST_TEMPLATE = 200_000
"""Characters of a template; those of models have at most some thirty thousand."""

_NEVER = ("lipsum", "pprint", "random", "urlize", "wordwrap", "xmlattr")  # of no use here, and slow or not bounded


class _Bounded(Template):
    """Renders with a budget of its own."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        given = deep_size([args, *kwargs.values()], most=sys.maxsize)
        token = BUDGET.set(Budget(given))
        try:
            return super().render(*args, **kwargs)
        finally:
            BUDGET.reset(token)


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a template also cannot take more time and memory than it may."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})
    template_class = _Bounded

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimized = False  # what is computed while compiling is counted by nobody, and infinity is no Python name
        self.concat = _concat  # type: ignore[method-assign]
        for name in _NEVER:
            self.filters.pop(name, None)
            self.globals.pop(name, None)
        self.check_filters()

    def check_filters(self) -> None:
        """Let each filter look at sizes, those too that were put in since."""
        self.filters = {
            name: checked_filter(name, one) for name, one in self.filters.items() if name not in _OWN_FILTERS
        }
        self.filters |= _OWN_FILTERS

    def from_string(self, source: Any, globals: Any = None, template_class: Any = None) -> Template:
        """Compile a template, with a count in each loop and macro.

        Raises:
            OutOfBounds: if it is longer than any template is, or nested deeper than Python can go.
        """
        if len(source) > LONGEST_TEMPLATE:
            raise OutOfBounds(f"the chat template has more than {LONGEST_TEMPLATE} characters")
        self.check_filters()
        token = BUDGET.set(Budget())
        try:
            tree = self.parse(source)
            code = self.compile(_Counting().visit(tree))
        except (RecursionError, MemoryError):  # Python's own compiler raises either for what is nested too deep
            raise OutOfBounds("the chat template is nested too deep") from None
        finally:
            BUDGET.reset(token)
        made: Template = self.template_class.from_code(self, code, self.make_globals(globals))
        return made

    def tick(self, steps: int) -> str:
        """Count what is about to run; a call of this stands in each loop and macro."""
        budget_of().step(steps)
        return ""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute, if the result may be as large as it would be.

        Raises:
            OutOfBounds: if it may not.
        """
        check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call, if the result may be as large as it would be.

        Raises:
            OutOfBounds: if it may not.
        """
        if function == self.tick:
            return self.tick(*args)
        budget_of().step(1)
        check_call(function, args, kwargs)
        return charged(super().call(context, function, *args, **kwargs))


def bound() -> None:
    """Let transformers render chat templates in the bounded sandbox, in this process, from now on."""
    from transformers.utils import chat_template_utils

    # a public name of Jinja's, of which transformers makes an environment for each template
    chat_template_utils.ImmutableSandboxedEnvironment = BoundedSandbox


def apply_template(tokenizer: Any, messages: Any, **options: Any) -> Any:
    """Do what a tokenizer's `apply_chat_template` does, within bounds."""
    bound()
    return tokenizer.apply_chat_template(messages, **options)


# --- what is put into a template -------------------------------------------------------------------------------------


class _Counting(NodeTransformer):
    """Lets loops and macros count, and texts be joined and lists be made by filters, which look at their sizes."""

    def visit_For(self, node: nodes.For) -> Any:  # noqa: N802 - as Jinja names them
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> Any:  # noqa: N802
        return self._counted(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> Any:  # noqa: N802
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes).set_lineno(node.lineno), "joined")

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802
        if isinstance(node.value, float) and not math.isfinite(node.value):
            raise OutOfBounds("the chat template has a number in it that is larger than a float can be")
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        return self._sized(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        return node if node.ctx == "store" else self._sized(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        return self._sized(node)

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> nodes.Node:  # noqa: N802
        raise OutOfBounds("the chat template escapes text for HTML, which makes other text of it")

    def _sized(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "sized")

    def _counted(self, node: Any) -> Any:
        steps = 1 + sum(1 for _ in node.find_all(nodes.Stmt))
        self.generic_visit(node)
        call = nodes.Call(nodes.EnvironmentAttribute("tick"), [nodes.Const(steps)], [], None, None)
        node.body.insert(0, nodes.Output([call]).set_lineno(node.lineno, override=True))
        return node


def _filtered(node: Any, name: str) -> nodes.Node:
    return nodes.Filter(node, name, [], [], None, None).set_lineno(node.lineno)


def _joined(pieces: list[Any]) -> str:
    """Do what `~` does."""
    return _concat(str(charged_text(piece)) for piece in pieces)


def _sized(value: Any) -> Any:
    """Let a list, tuple or object be made, unless its parts are too many: `[a, a]` over and over has 2^n of them."""
    budget_of().make(deep_size(value))
    return value


_OWN_FILTERS = {"joined": _joined, "sized": _sized}


def _concat(pieces: Iterable[str]) -> str:
    """Join what was written, unless it is too much."""
    found, budget = [], budget_of()
    for piece in pieces:
        found.append(piece)
        budget.make(len(piece))
    return "".join(found)
