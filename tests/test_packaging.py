"""What is released holds what it needs, and what runs elsewhere says what is said here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import lit_dpo
from lit_dpo.cli import main

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _built(source: Path, out: Path) -> tuple[Path, Path]:
    """The sdist and the wheel of a tree."""
    _run(sys.executable, "-m", "hatchling", "build", "-d", out, cwd=source)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return _built(ROOT, tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(built[0]) as file:
        file.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


# ---- wheel and sdist ----


def test_the_sdist_holds_every_tracked_file(unpacked):
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what is tracked is not known")
    tracked = _run("git", "ls-files", "-z", cwd=ROOT).rstrip("\0").split("\0")
    assert {".ci/run", ".github/workflows/tests.yml", "docs/index.md", "LICENSE"} <= {*tracked}
    there = [name for name in tracked if (ROOT / name).exists()]  # what is being removed is tracked, too
    assert not [name for name in there if not (unpacked / name).is_file()]


def test_the_sdist_builds_the_same_wheel(built, unpacked, tmp_path):
    _, wheel = _built(unpacked, tmp_path)
    assert _contents(wheel) == _contents(built[1])


def test_the_wheel_holds_the_package_and_the_configurations_alone(built):
    names = {name for name in _contents(built[1]) if ".dist-info/" not in name}
    package = {f"lit_dpo/{path.relative_to(ROOT / 'src' / 'lit_dpo')}" for path in (ROOT / "src").rglob("*.py")}
    assert names == package | {"lit_dpo/py.typed"} | {f"lit_dpo/{name}" for name in CONFIGS}


def test_an_editable_install_copies_nothing(tmp_path):
    build = f"import hatchling.build as build; print(build.build_editable({str(tmp_path)!r}))"
    _run(sys.executable, "-c", build, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    (path,) = [name for name in _contents(wheel) if ".dist-info/" not in name]
    assert path.endswith(".pth")


def test_an_installed_wheel_brings_its_configurations_along(built, tmp_path):
    """Elsewhere, without the checkout: list them, copy them, start a run from the copy."""
    home = tmp_path / "home"
    install = ["install", "-q", "--no-deps", "--no-index", "--target", str(home), str(built[1])]
    _run(sys.executable, "-m", "pip", *install, cwd=tmp_path)
    command, path = home / "bin" / "lit-dpo", str(home)
    listed = _listed(_run(command, "configs", cwd=tmp_path, PYTHONPATH=path))
    assert sorted(map(str, listed)) == [str(home / "lit_dpo" / name) for name in CONFIGS]
    said = _run(command, "configs", "copy", cwd=tmp_path, PYTHONPATH=path)
    assert said == f"lit-dpo fit --config {Path('configs', 'quickstart.yaml')}\n"
    printed = _run(command, *said.split()[1:], "--print_config", cwd=tmp_path, PYTHONPATH=path)
    assert yaml.safe_load(printed)["model"]["init_args"]["policy"]["init_args"]["model"] == "lit-dpo/quickstart"


# ---- lit-dpo configs ----


def _listed(text: str) -> list[Path]:
    """The files of a listing: the folder, then a name and what it is on each line."""
    folder, *lines = text.splitlines()
    return [Path(folder, line.split()[0]) for line in lines]


def test_configs_are_listed_with_whole_runs_first_and_each_can_be_read(capsys):
    main(["configs"])
    listed = _listed(capsys.readouterr().out)
    assert sorted(str(path.relative_to(ROOT)) for path in listed) == CONFIGS
    whole = [path for path in listed if path.parent == ROOT / "configs"]
    assert listed[: len(whole)] == whole


def test_configs_are_copied_whole_and_over_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["configs", "copy"])
    main(["configs", "copy", "lab/mine"])
    for copy in (tmp_path / "configs", tmp_path / "lab" / "mine"):
        found = {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*.yaml")}
        assert found == {Path(name).relative_to("configs"): (ROOT / name).read_bytes() for name in CONFIGS}
    (tmp_path / "configs" / "quickstart.yaml").write_text("mine")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["configs", "copy"])
    assert stopped.value.code == 1
    assert "Expected a new folder to copy `configs` to but configs is there" in capsys.readouterr().err
    assert (tmp_path / "configs" / "quickstart.yaml").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configs", "lab"]


def test_configs_need_no_heavy_import():
    code = "import sys; from lit_dpo.cli import main; main(['configs']); print(*sys.modules)"
    loaded = _run(sys.executable, "-c", code, cwd=ROOT).splitlines()[-1].split()
    assert not {"torch", "lightning", "transformers", "peft"} & {*loaded}


# ---- what is said in several places ----


def test_one_version_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert lit_dpo.__version__ == PROJECT["version"] == cited["version"]
    assert cited["license"] == PROJECT["license"]
    assert cited["repository-code"] == PROJECT["urls"]["Repository"]
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()


def _workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))


def _steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_workflows_test_every_python_that_is_named_and_the_lowest_versions():
    jobs = _workflow("tests.yml")["jobs"]
    named = re.findall(r"Python :: (\d+\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert jobs["newest"]["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"
    (lowest,) = [step["with"]["python-version"] for step in jobs["lowest"]["steps"] if "with" in step]
    assert lowest == named[0]


def test_workflows_run_the_commands_of_the_documents():
    jobs = _workflow("tests.yml")["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    (tests,) = re.findall(r'^pip install -e "\.\[test\]".*$', (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands["newest"] == [tests]
    assert commands["lowest"] == [".ci/lowest"]
    assert os.access(ROOT / ".ci" / "lowest", os.X_OK)
    assert commands["lint"][-1] in (ROOT / "CONTRIBUTING.md").read_text().splitlines()


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / ".github" / "workflows").iterdir()))
def test_workflows_may_only_read_and_pin_what_they_use(name):
    workflow = _workflow(name)
    assert workflow["permissions"] == {"contents": "read"}
    more = {job: given["permissions"] for job, given in workflow["jobs"].items() if "permissions" in given}
    assert more == ({"publish": {"id-token": "write"}} if name == "release.yml" else {})
    used = [step["uses"] for step in _steps(workflow) if "uses" in step]
    assert not [action for action in used if not re.fullmatch(r"actions/[\w-]+@v\d+|[\w/-]+@release/v\d+", action)]
    assert all(job["timeout-minutes"] <= 60 for job in workflow["jobs"].values())


def test_the_lowest_versions_are_read_and_not_typed():
    script = (ROOT / ".ci" / "lowest").read_text()
    names = {re.split(r"\W", requirement)[0] for requirement in PROJECT["dependencies"]}
    assert not [name for name in names if re.search(rf"{name}\s*[=<>]", script)]
    assert all(re.search(r">=\d", requirement) for requirement in PROJECT["dependencies"])
