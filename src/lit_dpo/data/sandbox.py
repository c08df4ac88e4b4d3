"""Chat templates within bounds: a template is a stranger's program, and ends in bounded time and memory.

transformers renders in Jinja's sandbox, which keeps a template from what it should not read, but lets it loop for years
and fill the memory with one expression. `bound` puts a sandbox into its place that counts. Whatever repeats or grows is
asked first: loops, macros, operators, literals, calls, filters. No signal and no second thread are needed, so that it
holds in worker processes and in notebooks too.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

BYTES = 100_000_000
"""Of texts and lists that a template may make in one rendering, besides ten times what it is given."""

STEPS = 1_000_000
"""Rounds of loops, calls, and what these write, in one rendering."""

SECONDS = 3.0
"""Of this thread's processor time, in one rendering."""

LONGEST_TEMPLATE = 200_000
"""Characters of a template; those of models have at most some thirty thousand."""

_LARGEST_ARGUMENT = 1_000_000
_LARGEST_NUMBER = 128  # bits
_MOST_PARTS = 300_000  # of one list with all that is in it
_LOOKED_AFTER = 16  # steps: to ask for the time costs more than one
_OF_ELEMENT = 40  # bytes of a place in a list, and of what is small there
_NUMBERS = re.compile(r"\d+")
_NEVER = ("lipsum", "pprint", "random", "urlize", "wordwrap", "xmlattr")  # of no use here, and slow or not bounded


class OutOfBounds(SecurityError):  # noqa: N818 - said of a template, as `StopIteration` of a loop
    """A template that takes more than it may."""


class _Budget:
    """What one rendering may still use.

    Args:
        given: bytes of what the template is given.
    """

    def __init__(self, given: int = 0) -> None:
        self.steps, self.bytes = STEPS, BYTES + 10 * given
        self.until, self.looked = time.thread_time() + SECONDS, self.steps

    def step(self, count: int) -> None:
        self.steps -= count
        if self.steps < 0:
            raise OutOfBounds(f"the chat template takes more than {STEPS} steps")
        if self.looked - self.steps < _LOOKED_AFTER:
            return
        self.looked = self.steps
        if time.thread_time() > self.until:
            raise OutOfBounds(f"the chat template takes longer than {SECONDS:g} seconds")

    def make(self, size: float) -> None:
        self.bytes -= int(min(size, 1 << 62))
        if self.bytes < 0:
            raise OutOfBounds("the chat template makes texts or lists that are far longer than what it is given")


_BUDGET: ContextVar[_Budget] = ContextVar("budget")


def _budget() -> _Budget:
    return _BUDGET.get(None) or _Budget()


class _Bounded(Template):
    """Renders with a budget of its own."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        given = _deep_size([args, *kwargs.values()], most=sys.maxsize)
        token = _BUDGET.set(_Budget(given))
        try:
            return super().render(*args, **kwargs)
        finally:
            _BUDGET.reset(token)


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
        self.filters = {name: _checked(name, one) for name, one in self.filters.items()} | _OWN_FILTERS

    def from_string(self, source: Any, globals: Any = None, template_class: Any = None) -> Template:
        """Compile a template, with a count in each loop and macro.

        Raises:
            OutOfBounds: if it is longer than any template is, or nested deeper than Python can go.
        """
        if len(source) > LONGEST_TEMPLATE:
            raise OutOfBounds(f"the chat template has more than {LONGEST_TEMPLATE} characters")
        self.check_filters()
        token = _BUDGET.set(_Budget())
        try:
            tree = self.parse(source)
            code = self.compile(_Counting().visit(tree))
        except (RecursionError, MemoryError):  # Python's own compiler raises either for what is nested too deep
            raise OutOfBounds("the chat template is nested too deep") from None
        finally:
            _BUDGET.reset(token)
        made: Template = self.template_class.from_code(self, code, self.make_globals(globals))
        return made

    def tick(self, steps: int) -> str:
        """Count what is about to run; a call of this stands in each loop and macro."""
        _budget().step(steps)
        return ""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute, if the result may be as large as it would be.

        Raises:
            OutOfBounds: if it may not.
        """
        _check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call, if the result may be as large as it would be.

        Raises:
            OutOfBounds: if it may not.
        """
        if function == self.tick:
            return self.tick(*args)
        _budget().step(1)
        _check_call(function, args, kwargs)
        return _made(super().call(context, function, *args, **kwargs))


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
    return _concat(str(_printed(piece)) for piece in pieces)


def _sized(value: Any) -> Any:
    """Let a list, tuple or object be made, unless its parts are too many: `[a, a]` over and over has 2^n of them."""
    _budget().make(_deep_size(value))
    return value


_OWN_FILTERS = {"joined": _joined, "sized": _sized}


def _concat(pieces: Iterable[str]) -> str:
    """Join what was written, unless it is too much."""
    found, budget = [], _budget()
    for piece in pieces:
        found.append(piece)
        budget.make(len(piece))
    return "".join(found)


# --- sizes -----------------------------------------------------------------------------------------------------------


def _deep_size(value: Any, most: int = _MOST_PARTS) -> int:
    """Bytes of a value with all that is in it, each as often as it is there; of too many more than any limit."""
    if isinstance(value, str):
        return sys.getsizeof(value)
    size, parts, todo = 0, 0, [value]
    while todo:
        one, parts = todo.pop(), parts + 1
        if parts > most:
            return 1 << 60
        size += sys.getsizeof(one) if isinstance(one, str | int) else _OF_ELEMENT
        if isinstance(one, Mapping):
            todo.extend(one.values())
            size += _OF_ELEMENT * len(one)
        elif isinstance(one, list | tuple | set):
            todo.extend(one)
    return size


def _printed(value: Any) -> Any:
    """Charge for what becomes text by being written: of a list all that is in it."""
    if not isinstance(value, str):
        _budget().make(_deep_size(value))
    return value


def _made(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict):
        _budget().make(sys.getsizeof(value) if isinstance(value, str) else _OF_ELEMENT * len(value))
    return value


def _check_operator(operator: str, left: Any, right: Any) -> None:
    make = _budget().make
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_number(left.bit_length() * max(right, 0))
    elif operator == "%" and isinstance(left, str):
        make(_formatted(left, right if isinstance(right, tuple) else (right,)))
    elif operator == "*" and isinstance(left, int) and isinstance(right, int):
        _check_number(left.bit_length() + right.bit_length())
    elif operator == "*":
        for one, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(one, str | list | tuple):
                make(max(times, 0) * _deep_size(one))
    elif operator == "+" and isinstance(left, str | list | tuple):
        make(_deep_size(left) + _deep_size(right))


def _check_number(bits: int) -> None:
    if bits > _LARGEST_NUMBER:
        raise OutOfBounds(f"the chat template computes a number of more than {_LARGEST_NUMBER} bits")


def _check_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    _check_arguments(args, kwargs)
    function = getattr(function, "__wrapped__", function)  # what Jinja makes of `str.format`
    name, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
    if name == "strftime_now":
        _budget().make(_formatted(str(args[0]) if args else "", ()))
    elif isinstance(owner, str):
        _check_method(name, owner, args, kwargs)
    elif kwargs and isinstance(function, type):  # a namespace, which may hold another one
        _budget().make(_OF_ELEMENT * len(kwargs))


def _check_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    for one in (*args, *kwargs.values()):
        if isinstance(one, int | float) and abs(one) > _LARGEST_ARGUMENT:
            raise OutOfBounds(f"the chat template gives a number above {_LARGEST_ARGUMENT} to a function")
        if isinstance(one, int):
            _budget().make(abs(one) * _OF_ELEMENT)


def _check_method(name: str, owner: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    make = _budget().make
    if name == "replace" and len(args) > 1:
        make(_replaced(owner, args[0], args[1]))
    elif name == "join" and args and isinstance(args[0], list | tuple | dict | str):
        make(_deep_size(args[0]) + len(args[0]) * len(owner))
    elif name == "join" and args:  # of what is computed as it is asked for, and how much of that is not known
        raise OutOfBounds("the chat template joins what is no list: write `|list` after it")
    elif name in ("format", "format_map"):
        values = tuple(args) + tuple(kwargs.values())
        make(_formatted(owner, values))
    elif name == "translate" and args:
        longest = max((len(one) for one in dict(args[0]).values() if isinstance(one, str)), default=1)
        make(len(owner) * longest)
    elif name == "expandtabs":
        tab = next((one for one in (*args, *kwargs.values()) if isinstance(one, int)), 8)
        make(len(owner) + owner.count("\t") * abs(tab))
    else:
        make(len(owner) if name in ("split", "rsplit", "splitlines") else 0)


def _replaced(text: Any, old: Any, new: Any) -> float:
    text, old, new = str(text), str(old), str(new)
    times = text.count(old) if len(new) > len(old) else 0
    return (len(text) + times * (len(new) - len(old))) * (1 if (text + new[:1]).isascii() else 4)


def _formatted(text: str, values: Sequence[Any]) -> float:
    """At most so much comes of a format: widths, and each value in each of its places."""
    widths = sum(int(one) if len(one) < 10 else 1 << 60 for one in _NUMBERS.findall(text))
    places = text.count("%") + text.count("{")
    stars = sum(abs(one) for one in values if isinstance(one, int)) * text.count("*")
    return float(len(text) + widths + stars + places * sum(map(_deep_size, values)))


def _checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a filter that looks at what it is given, and counts what it gives."""
    if name in _OWN_FILTERS or hasattr(function, "unchecked"):
        return function
    at = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context, or the like, stands first

    @wraps(function)  # with the mark that says what stands first
    def checked(*args: Any, **kwargs: Any) -> Any:
        _budget().step(1)
        value, rest = (args[at] if len(args) > at else None), args[at + 1 :]
        _check_arguments(rest, kwargs)
        if name in ("replace", "join", "format", "indent", "tojson", "string", "upper", "lower", "escape", "e"):
            args = (*args[:at], value := _known(value), *rest)
            _budget().make(_filtered_size(name, value, rest, kwargs))
        return _made(function(*args, **kwargs))

    checked.unchecked = function  # type: ignore[attr-defined]
    return checked


def _known(value: Any) -> Any:
    """Make a list of what is computed as it is asked for, so that its size is known."""
    return value if hasattr(value, "__len__") or not hasattr(value, "__next__") else _made(list(value))


def _filtered_size(name: str, value: Any, rest: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    size, more = _deep_size(value), [*rest, *kwargs.values()]
    if name == "replace" and len(more) > 1:
        return _replaced(value, more[0], more[1])
    if name == "format":
        return _formatted(str(value), more)
    longest = max((len(one) for one in more if isinstance(one, str)), default=0)
    widest = max((abs(one) for one in more if isinstance(one, int)), default=0)
    if name == "join":
        return size + longest * (len(value) if hasattr(value, "__len__") else 1)
    if name == "indent":
        return size + (longest + widest) * (1 + str(value).count("\n"))
    if name == "tojson":  # each element on a line of its own, as far in as it is deep
        return size * (1 + (longest + widest) * math.log2(2 + size) if more else 1)
    return size
