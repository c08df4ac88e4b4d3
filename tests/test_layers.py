"""Imports point only down, and light names stay light."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lit_dpo

PACKAGE = Path(lit_dpo.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up; the longest name that fits decides. Rooms of one layer may import each other in one direction.
LAYERS = {
    "lit_dpo.errors": 0,
    "lit_dpo.aliases": 0,
    "lit_dpo.environment": 0,
    "lit_dpo.commands": 0,
    "lit_dpo.config_files": 0,
    "lit_dpo.compat": 0,
    "lit_dpo.hub": 0,
    "lit_dpo.names": 0,
    "lit_dpo.progress": 0,
    "lit_dpo.quiet": 0,
    "lit_dpo.seals": 0,
    "lit_dpo.shipped": 0,
    "lit_dpo.versions": 0,
    "lit_dpo.writing": 0,
    "lit_dpo.quickstart": 0,  # needs nothing of the package; imported inside functions only
    "lit_dpo.policy": 1,
    "lit_dpo.data": 1,
    "lit_dpo.logps": 2,
    "lit_dpo.checkpoint": 2,
    "lit_dpo.losses": 3,
    "lit_dpo.metrics": 3,
    "lit_dpo.references": 3,
    "lit_dpo.memory": 3,
    "lit_dpo.requirements": 4,
    "lit_dpo.passes": 4,
    "lit_dpo.window": 4,
    "lit_dpo.schedules": 4,
    "lit_dpo.callbacks": 5,
    "lit_dpo.module": 6,
    "lit_dpo.plan": 7,
    "lit_dpo.mistakes": 8,
    "lit_dpo.parser": 8,
    "lit_dpo.cli": 8,
    "lit_dpo.lightning_cli": 8,
    "lit_dpo.tools": 8,
    "lit_dpo.__main__": 9,
}


def _name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(file) for file in FILES}


def _layer(module: str) -> int:
    name = module
    while name not in LAYERS:
        assert "." in name, f"{module} has no layer: give it one in this test and in the design"
        name = name.rpartition(".")[0]
    return LAYERS[name]


@functools.cache
def _imports(file: Path, inside_functions: bool = True) -> frozenset[str]:
    """Full names of what a file imports, submodules resolved."""
    found, todo = set(), list(ast.parse(file.read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue  # names for types: nothing is imported when it runs
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: imports are absolute"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES else str(node.module))
        if inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += ast.iter_child_nodes(node)
    return frozenset(found)


def _own(imports: frozenset[str]) -> set[str]:
    """Those of the package, without the package itself (`__version__`)."""
    return {name for name in imports if name.startswith("lit_dpo.")}


@pytest.mark.parametrize("file", [file for file in FILES if _name(file) != "lit_dpo"], ids=_name)
def test_imports_point_only_down(file):
    mine = _name(file)
    up = [other for other in _own(_imports(file)) if _layer(other) > _layer(mine)]
    assert not up, f"{mine} imports {up} from above"


def _room(module: str) -> str:
    """The directory that a module is in, or the module itself at the top."""
    return ".".join(module.split(".")[:2])


def _arrows() -> dict[str, set[str]]:
    """Which rooms each room imports."""
    files = [file for file in FILES if _name(file) not in ("lit_dpo", "lit_dpo.__main__")]  # names load on first use
    found = {_room(_name(file)): set[str]() for file in files}
    for file in files:
        found[_room(_name(file))] |= {_room(one) for one in _own(_imports(file))} - {_room(_name(file))}
    return found


def test_rooms_do_not_import_in_circles():
    """A room whose imports lead back to it cannot be understood, or replaced, without the others."""
    left = _arrows()
    while free := [room for room, to in left.items() if not to & left.keys()]:
        for room in free:
            del left[room]
    assert not left, f"circles among {sorted(left)}"


def test_the_picture_of_the_rooms_is_true():
    """It leaves out what follows from it: an arrow to where other arrows lead anyway."""
    arrows = _arrows()

    def below(room: str) -> set[str]:
        return arrows[room].union(*(below(one) for one in arrows[room]))

    needed = {
        f"{room} --> {to}".replace("lit_dpo.", "")
        for room, tos in arrows.items()
        for to in tos
        if not any(to in below(other) for other in tos - {to})
    }
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    (picture,) = re.findall(r"```mermaid\n(.*?)```", page, re.DOTALL)
    assert {line.strip() for line in picture.splitlines() if "-->" in line} == needed


def test_the_files_of_a_batchs_way_are_there():
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    files = re.findall(r"^\d\. `([\w/]+\.py)`", page, re.MULTILINE)
    assert 1 < len(files) <= 8
    assert all((PACKAGE / file).is_file() for file in files)


def test_the_module_and_the_data_never_import_each_other():
    for file in FILES:
        name, imports = _name(file), _own(_imports(file))
        if name == "lit_dpo.module":
            assert not {one for one in imports if one.startswith("lit_dpo.data") and one != "lit_dpo.data.batch"}
        if name.startswith("lit_dpo.data"):
            assert "lit_dpo.module" not in imports


def test_the_quickstart_is_imported_inside_functions_only():
    assert not [
        file
        for file in FILES
        if any(one.startswith("lit_dpo.quickstart") for one in _imports(file, inside_functions=False))
        and "quickstart" not in file.parts
    ]


def test_only_the_policy_knows_bitsandbytes():
    users = {_name(file) for file in FILES if any(one.split(".")[0] == "bitsandbytes" for one in _imports(file))}
    assert users == {"lit_dpo.policy.checks", "lit_dpo.plan.skeleton", "lit_dpo.policy.sliced"}


def test_pytorch_lightning_is_imported_nowhere():
    """It is another package than `lightning.pytorch`, and its classes fail the subclass checks of this one."""
    wrong = {"pytorch_lightning", "lightning_fabric"}
    files = [*FILES, *Path(__file__).parent.rglob("*.py")]
    files = [file for file in files if any(name in file.read_text(encoding="utf-8") for name in wrong)]
    assert Path(__file__) in files, "as text"
    assert not [file for file in files if any(one.split(".")[0] in wrong for one in _imports(file))]


ABSENT = {
    "import lit_dpo": {"torch", "transformers", "lightning", "peft", "datasets", "bitsandbytes", "torchmetrics"},
    "import lit_dpo.errors": {"torch", "transformers", "lightning", "peft"},
    "import lit_dpo.compat": {"torch", "transformers", "lightning", "peft", "datasets", "jsonargparse"},
    "import lit_dpo.policy": {"transformers", "lightning", "peft", "datasets", "bitsandbytes", "torch"},
    "import torch": {"lit_dpo"},  # those below may have it, and are forked from what has
    "import lit_dpo.losses": {"transformers", "lightning", "peft", "datasets", "bitsandbytes", "torchmetrics"},
    "from lit_dpo import DPOLoss": {"transformers", "lightning", "peft", "datasets", "bitsandbytes"},
    "import lit_dpo.references": {"transformers", "lightning", "peft", "datasets", "bitsandbytes"},
}
# Each statement is the first of ours in a fresh interpreter, or a fork of one.
EACH_ALONE = """
import os, sys
for statement in sys.argv[1:]:
    if statement == "import torch":
        exec(statement)
    if not os.fork():
        exec(statement)
        print(statement, *sorted({name.split(".")[0] for name in sys.modules}), sep=",", flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, statement
"""


@pytest.fixture(scope="module")
def imported():
    """What each statement has imported."""
    command = [sys.executable, "-c", EACH_ALONE, *ABSENT]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()
    return {line.split(",")[0]: set(line.split(",")[1:]) for line in lines}


@pytest.mark.parametrize("statement", ABSENT)
def test_an_import_takes_nothing_heavy(imported, statement):
    assert not ABSENT[statement] & imported[statement]
    assert ("lit_dpo" in imported[statement]) == ("lit_dpo" in statement)


def test_every_public_name_is_where_it_is_said_to_be():
    for name in lit_dpo.__all__:
        assert getattr(lit_dpo, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        lit_dpo.no_such_name  # noqa: B018
