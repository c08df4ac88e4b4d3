"""Mistakes are made where code runs, each another one, and the same ones again."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mutants import mutants
from related import ROOT, related

SOURCE = '''
def double(given: int = 2, *, wide: bool = False) -> int:
    """Says 3."""
    if given < 0 and not wide:
        raise ValueError(f"Expected {given + 1} >= 0")
    log.info("%s", given - 1)
    return max(given * 2, 1)
'''


def test_every_mistake_compiles_differs_and_is_made_again(tmp_path):
    file = tmp_path / "double.py"
    file.write_text(SOURCE)
    made = mutants(file, 100)
    texts = {ast.unparse(one.tree) for one in made}
    assert len(texts) == len(made)
    assert ast.unparse(ast.parse(SOURCE)) not in texts
    assert {one.kind for one in made} == {
        *("compare", "boolean", "removed", "constant", "condition", "dropped", "compute", "return", "swapped")
    }
    assert not [one for one in made if one.line in (3, 6)], "what it says is not what it does"
    for one in made:
        compile(one.tree, str(file), "exec")
    assert [one.name for one in mutants(file, 5)] == [one.name for one in mutants(file, 5)]
    assert file.read_text() == SOURCE


@pytest.mark.parametrize("room", ["losses", "logps", "references", "metrics", "checkpoint"])
def test_every_module_of_a_room_has_tests(room):
    for file in (ROOT / "src" / "lit_dpo" / room).glob("*.py"):
        for wide in (False, True):
            for session in related(file.relative_to(ROOT / "src" / "lit_dpo"), wide=wide):
                assert session[0].startswith("tests/"), file
