"""Each promise of SECURITY.md names tests, and these are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def promises() -> list[str]:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    table = text.partition("## What lit_dpo promises")[2].partition("\n## ")[0]
    return [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| promise")]


def test_each_promise_has_a_test_that_is_there():
    assert len(promises()) > 15
    for line in promises():
        named = NAMED.findall(line)
        assert named, line
        for file, name in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert name in there if name else any(one.startswith("test_") for one in there), (file, name)


def test_every_test_of_a_promise_is_named():
    said = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for file in Path(__file__).parent.glob("test_*.py"):
        assert file.name == Path(__file__).name or f"tests/security/{file.name}" in said, file.name
