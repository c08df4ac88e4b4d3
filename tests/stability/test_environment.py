"""`environment.json` says what a run was made with: the truth, nothing secret, and at no cost for the run."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger

from lit_dpo import environment
from lit_dpo.callbacks import LastCheckpoint
from lit_dpo.callbacks.environment import FILE, starts
from lit_dpo.environment import code, hidden, variables, without_secrets
from training import data, module, trainer

SECRET = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"


def _git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=me", "-c", "user.email=me@here", "-c", "commit.gpgsign=false")
    ran = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return ran.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("there is no Git")
    folder = tmp_path / "lab"
    folder.mkdir()
    _git(folder, "init", "-q")
    (folder / "lab.py").write_text("x = 1\n")
    _git(folder, "add", "lab.py")
    _git(folder, "commit", "-qm", "first")
    return folder


@pytest.fixture(scope="module")
def fitted(tiny_model, pairs_file, tmp_path_factory):
    """A run of a step, and another one that goes on from it, in a directory of its own."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--logger.api_key", SECRET, "--beta=0.2"])
        patch.setenv("HF_TOKEN", SECRET)
        patch.setenv("NVIDIA_API_KEY", SECRET)
        patch.setenv("NCCL_DEBUG", "INFO")
        first = trainer(root, logger=CSVLogger(root, name=""), max_steps=1, callbacks=[LastCheckpoint()])
        first.fit(module(tiny_model), data(pairs_file))
        again = trainer(root, logger=CSVLogger(root, name=""), max_steps=2)
        again.fit(module(tiny_model), data(pairs_file), ckpt_path=root / "version_0" / "last.ckpt")
    return root


def test_it_says_what_the_run_was_made_with(fitted):
    (found,) = starts(fitted / "version_0")
    assert found["stage"] == "fit"
    assert found["command"] == ["train.py", "--logger.api_key", "…", "--beta=0.2"]
    assert found["checkpoint"] is None
    assert abs(datetime.fromisoformat(found["time"]) - datetime.now(UTC)).total_seconds() < 600
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    for name in ("torch", "lightning", "transformers", "peft", "bitsandbytes", "torchmetrics", "jsonargparse"):
        assert found["packages"][name] == version(name)
    assert found["lit_dpo"]["version"] == version("lit_dpo")
    said = json.loads((fitted / "version_0" / "adapter" / "lit_dpo.json").read_text())
    assert found["base"] == said["base"]
    assert found["data"] == {"digest": said["training"]["data"], **said["data"]}
    assert found["precision"]["trainer"] == "32-true"
    assert found["hardware"]["ranks"] == 1
    assert found["hardware"]["memory_gib"] > 0
    assert found["variables"]["NCCL_DEBUG"] == "INFO"


def test_a_run_that_goes_on_adds_to_what_was_said(fitted):
    first, again = starts(fitted / "version_1")
    assert [first] == starts(fitted / "version_0")
    assert again["checkpoint"].endswith("version_0/last.ckpt")
    assert again["base"] == first["base"]


def test_no_secret_is_in_it(fitted):
    assert not [path for path in fitted.rglob(FILE) if SECRET in path.read_text()]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hub_token", "abc", "--x", "1"], ["--hub_token", "…", "--x", "1"]),
        (["--wandb.api-key=abc"], ["--wandb.api-key=…"]),
        (['{"password": "a b", "n": 3}'], ['{"password": …, "n": 3}']),
        ([f"--x={SECRET}"], ["--x=…"]),
        (["https://me:abc@host/x"], ["https://…@host/x"]),
        (["--data.max_tokens", "512", "--data.tokenizer", "x"], ["--data.max_tokens", "512", "--data.tokenizer", "x"]),
        (["--hub_token", "--x", "1"], ["--hub_token", "--x", "1"]),
    ],
)
def test_what_looks_like_a_secret_is_left_out(words, said):
    assert without_secrets(words) == said


def test_variables_are_those_that_matter():
    given = {
        "OMP_NUM_THREADS": "1",
        "HF_TOKEN": "a",
        "HF_HOME": "/x",
        "HOME": "/me",
        "CUDA_API_KEY": "b",
        "WORLD_SIZE": "2",
    }
    assert variables(given) == {"HF_HOME": "/x", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=200))
def test_hiding_twice_is_hiding_once(text):
    assert hidden(hidden(text)) == hidden(text)


def test_a_commit_is_that_of_git_and_changes_are_of_files_that_it_knows(repository):
    assert code(repository) == {"commit": _git(repository, "rev-parse", "HEAD"), "changed": False}
    (repository / "new.py").write_text("not tracked\n")
    assert code(repository)["changed"] is False
    (repository / "lab.py").write_text("x = 2\n")
    assert code(repository)["changed"] is True
    inner = repository / "inner"
    inner.mkdir()
    assert code(inner)["changed"] is True


def test_no_repository_no_git_and_no_commit_are_nothing(tmp_path, monkeypatch):
    nothing = {"commit": None, "changed": None}
    assert code(tmp_path) == nothing
    assert environment._names_programs(tmp_path), "of settings that cannot be read the worst is assumed"
    monkeypatch.setenv("PATH", "")
    assert code(Path(__file__).parent) == nothing


@pytest.mark.parametrize(
    "setting", ["core.fsmonitor", "filter.x.clean", "filter.x.process", "core.hooksPath", "include.path"]
)
def test_a_repository_of_a_stranger_runs_nothing(repository, setting):
    """`git status` in a folder runs what its settings name: a proof that it would, and that it does not here."""
    told = repository.parent / "told"
    program = repository.parent / "program"
    program.write_text(f"#!/bin/sh\ntouch {told}\ncat\n")
    program.chmod(0o755)
    value = str(program)
    if setting == "include.path":
        value = str(repository.parent / "more")
        Path(value).write_text(f'[filter "x"]\n\tclean = {program}\n')
    _git(repository, "config", setting, value)
    (repository / ".gitattributes").write_text("*.py filter=x\n")
    (repository / "lab.py").write_text("x = 3\n")
    found = code(repository)
    assert not told.exists()
    assert found["changed"] is None
    assert found["commit"]
    if setting in ("core.fsmonitor", "filter.x.clean", "include.path"):
        subprocess.run(["git", "status", "--porcelain"], cwd=repository, capture_output=True, check=False)
        assert told.exists(), "or the test proves nothing"


def test_the_package_of_an_environment_inside_a_repository_is_not_taken_for_a_checkout(repository, monkeypatch):
    place = repository / "venv" / "lib" / "python3" / "site-packages" / "lit_dpo" / "environment.py"
    place.parent.mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(place))
    environment.own_code.cache_clear()
    try:
        assert environment.own_code()["commit"] is None
    finally:
        environment.own_code.cache_clear()


@pytest.mark.parametrize("there", ["{", '{"version": 2, "starts": []}'])
def test_what_is_in_the_way_costs_a_line_and_no_run(tiny_model, pairs_file, tmp_path, caplog, there):
    run = tmp_path / "run"
    run.mkdir()
    (run / FILE).write_text(there)
    fit = trainer(tmp_path, logger=CSVLogger(tmp_path, name="run", version=""), max_steps=1)
    with caplog.at_level(logging.WARNING, "lit_dpo"):
        fit.fit(module(tiny_model), data(pairs_file))
    assert fit.global_step == 1
    (line,) = [one for one in caplog.messages if FILE in one]
    assert line.startswith(f"{FILE} failed, and the run goes on without it")
    assert (run / FILE).read_text() == there
    assert not list(run.glob(".*"))


def test_a_run_without_a_directory_writes_none(tiny_model, pairs_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer(tmp_path, max_steps=1).fit(module(tiny_model), data(pairs_file))
    assert not list(tmp_path.rglob(FILE))


def test_gpus_are_those_of_this_machine_and_of_a_run_that_uses_them():
    assert environment.gpus("cpu") == {}
    found = environment.gpus("cuda")
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["cuda"] == torch.version.cuda
