"""Imports point only down, and light names stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lit_dpo

PACKAGE = Path(lit_dpo.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up; the longest name that fits decides. Files of one layer may import each other.
LAYERS = {
    "lit_dpo.errors": 0,
    "lit_dpo.devices": 0,
    "lit_dpo.fingerprints": 0,
    "lit_dpo.kernels": 0,
    "lit_dpo.hub": 0,
    "lit_dpo.writing": 0,
    "lit_dpo.settings": 0,
    "lit_dpo.quickstart": 0,  # needs nothing of the package; imported inside functions only
    "lit_dpo.quickstart_text": 0,
    "lit_dpo.logps": 1,
    "lit_dpo.data.batch": 1,
    "lit_dpo.adapter_checks": 2,
    "lit_dpo.policy": 2,
    "lit_dpo.policy_checks": 2,
    "lit_dpo.references": 2,
    "lit_dpo.losses": 2,
    "lit_dpo.metrics": 2,
    "lit_dpo.callbacks": 2,
    "lit_dpo.checkpoint": 2,
    "lit_dpo.limits": 2,
    "lit_dpo.heap": 0,
    "lit_dpo.memory": 2,
    "lit_dpo.plan": 3,
    "lit_dpo.skeleton": 2,
    "lit_dpo.sliced": 1,
    "lit_dpo.requirements": 2,
    "lit_dpo.rows": 2,
    "lit_dpo.window": 2,
    "lit_dpo.module": 3,
    "lit_dpo.data": 3,
    "lit_dpo.parser": 4,
    "lit_dpo.cli": 4,
    "lit_dpo.lightning_cli": 4,
    "lit_dpo.tools": 4,
    "lit_dpo.__main__": 5,
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


def _imports(file: Path, inside_functions: bool = True) -> set[str]:
    """Full names of what a file imports, submodules resolved."""
    found, todo = set(), list(ast.parse(file.read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: imports are absolute"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES else str(node.module))
        if inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += ast.iter_child_nodes(node)
    return found


def _own(imports: set[str]) -> set[str]:
    """Those of the package, without the package itself (`__version__`)."""
    return {name for name in imports if name.startswith("lit_dpo.")}


@pytest.mark.parametrize("file", [file for file in FILES if _name(file) != "lit_dpo"], ids=_name)
def test_imports_point_only_down(file):
    mine = _name(file)
    if mine == "lit_dpo.data":  # runs before `lit_dpo.data.batch`, and so belongs to the lower layer
        assert _own(_imports(file)) <= {"lit_dpo.data.batch"}
        return
    up = [other for other in _own(_imports(file)) if _layer(other) > _layer(mine)]
    assert not up, f"{mine} imports {up} from above"


def test_the_module_and_the_data_never_import_each_other():
    for file in FILES:
        name, imports = _name(file), _own(_imports(file))
        if name == "lit_dpo.module":
            assert not {one for one in imports if one.startswith("lit_dpo.data") and one != "lit_dpo.data.batch"}
        if name.startswith("lit_dpo.data"):
            assert "lit_dpo.module" not in imports


def test_the_quickstart_is_imported_inside_functions_only():
    assert not [file for file in FILES if "lit_dpo.quickstart" in _imports(file, inside_functions=False)]


def test_only_the_policy_knows_bitsandbytes():
    users = {_name(file) for file in FILES if any(one.split(".")[0] == "bitsandbytes" for one in _imports(file))}
    assert users == {"lit_dpo.policy_checks", "lit_dpo.skeleton", "lit_dpo.sliced"}


def test_pytorch_lightning_is_imported_nowhere():
    """It is another package than `lightning.pytorch`, and its classes fail the subclass checks of this one."""
    files = [*FILES, *Path(__file__).parent.rglob("*.py")]
    wrong = {"pytorch_lightning", "lightning_fabric"}
    assert not [file for file in files if any(one.split(".")[0] in wrong for one in _imports(file))]


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import lit_dpo", {"torch", "transformers", "lightning", "peft", "datasets", "bitsandbytes", "torchmetrics"}),
        ("import lit_dpo.errors", {"torch", "transformers", "lightning", "peft"}),
        ("import lit_dpo.losses", {"transformers", "lightning", "peft", "datasets", "bitsandbytes", "torchmetrics"}),
        ("from lit_dpo import DPOLoss", {"transformers", "lightning", "peft", "datasets", "bitsandbytes"}),
        ("import lit_dpo.policy", {"transformers", "lightning", "peft", "datasets", "bitsandbytes", "torch"}),
        ("import lit_dpo.references", {"transformers", "lightning", "peft", "datasets", "bitsandbytes"}),
    ],
)
def test_an_import_takes_nothing_heavy(statement, absent):
    code = f"{statement}; import sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert not absent & set(done.stdout.split())


def test_every_public_name_is_where_it_is_said_to_be():
    for name in lit_dpo.__all__:
        assert getattr(lit_dpo, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        lit_dpo.no_such_name  # noqa: B018
