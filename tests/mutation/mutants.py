"""Small mistakes in Python source, made in its syntax tree: what a test should notice."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_COMPARED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_COMPUTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
}


class Mutant(NamedTuple):
    """One mistake: where, what it was and is, and the whole module with it, in its old lines."""

    file: Path
    line: int
    kind: str
    before: str
    after: str
    tree: ast.AST

    @property
    def name(self) -> str:
        """File, line and change, in one line."""
        return f"{self.file.name}:{self.line} {self.kind}: {_short(self.before)} → {_short(self.after)}"


def mutants(file: Path, count: int, seed: int = 0) -> list[Mutant]:
    """Draw so many mistakes of a file, each another one; all that there are where it has fewer."""
    tree = ast.parse(file.read_text())
    places = [(node, kind, new) for node in _code(tree) for kind, new in _mistakes(node)]
    drawn = random.Random(f"{seed} {file.name}").sample(places, min(count, len(places)))
    return [
        Mutant(
            file,
            getattr(node, "lineno", 0) or node.iter.lineno,
            kind,
            ast.unparse(node),
            ast.unparse(new),
            ast.fix_missing_locations(_Put(node, new).visit(tree)),
        )
        for node, kind, new in drawn
    ]


class _Put(ast.NodeTransformer):
    """Puts one node in the place of another, and copies what is above it."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(copy.copy(node))

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field, value in ast.iter_fields(node):
            if isinstance(value, list):
                setattr(node, field, [self.visit(one) if isinstance(one, ast.AST) else one for one in value])
            elif isinstance(value, ast.AST):
                setattr(node, field, self.visit(value))
        return node


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """What runs and can be wrong: no annotation, text of a message, import, logging, or branch for type checkers."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        if isinstance(node, ast.AnnAssign) and field == "target":
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _only_says(child):
                continue
            if isinstance(child, (ast.expr, ast.stmt, ast.comprehension)):
                yield child
            if not isinstance(child, ast.Raise):
                yield from _code(child)


def _only_says(node: ast.AST) -> bool:
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Expr):
        if isinstance(node.value, ast.Constant):
            return True
        node = node.value
    said = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[0] in ("log", "warnings", "rank_zero_info")
    return said or isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom))


def _mistakes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    def with_(**changes: object) -> ast.AST:
        new = copy.copy(node)
        for name, value in changes.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.Compare(ops=[op, *others]) if type(op) in _COMPARED:
            yield "compare", with_(ops=[_COMPARED[type(op)](), *others])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in _COMPUTED:
            text = isinstance(getattr(node, "left", None), (ast.JoinedStr, ast.Constant)) and "'" in ast.unparse(node)
            if not text:
                yield "compute", with_(op=_COMPUTED[type(op)]())
        case ast.BoolOp(op=op):
            yield "boolean", with_(op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield "removed", node.operand
        case ast.Constant(value=bool() as value):
            yield "constant", with_(value=not value)
        case ast.Constant(value=int() | float() as value):
            yield "constant", with_(value=value + 1)
            yield "constant", with_(value=value - 1)
        case ast.IfExp():
            yield "branch", with_(body=node.orelse, orelse=node.body)
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield "return", with_(value=ast.Constant(None))
        case ast.If() | ast.While():
            yield "condition", with_(test=ast.UnaryOp(ast.Not(), node.test))
        case ast.Call(args=[first, second, *others]) if not isinstance(first, ast.Starred) and _ordered(node):
            yield "swapped", with_(args=[second, first, *others])
        case ast.comprehension(ifs=[_, *others]):
            yield "filter", with_(ifs=others)
    match node:
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.AugAssign() | ast.Delete():
            yield "dropped", ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "dropped", ast.Pass()


def _ordered(call: ast.Call) -> bool:
    """Whether a first and a second argument can be taken for one another."""
    return ast.unparse(call.func) not in ("isinstance", "issubclass", "getattr", "hasattr", "setattr", "cast")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) < 90 else f"{line[:87]}…"
