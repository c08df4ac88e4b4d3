"""Examples run: those in docstrings and those in the README."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
from pathlib import Path

import pytest

import lit_dpo
import ranks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MODULES = sorted(
    found.name for found in pkgutil.walk_packages(lit_dpo.__path__, "lit_dpo.") if not found.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name, request):
    if name == "lit_dpo.quickstart.model":
        request.getfixturevalue("quickstart")
    module = importlib.import_module(name)
    if ">>>" in Path(module.__file__).read_text():  # else there is none to look for
        assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def _run(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python script.py`, but for a process of its own."""
    monkeypatch.chdir(folder)
    (folder / "script.py").write_text(script)
    runpy.run_path("script.py", run_name="__main__")


def test_the_python_example_trains(quickstart, tmp_path, monkeypatch):
    (example,) = [block for block in _blocks("python") if "Trainer(max_epochs=1)" in block]
    example = example.replace("Trainer(max_epochs=1)", "Trainer(max_steps=2, logger=False, enable_checkpointing=False)")
    _run(example, tmp_path, monkeypatch)


def test_the_subclassing_example_trains_through_the_command(quickstart, tmp_path):
    (example,) = [block for block in _blocks("python") if "class HingeLoss" in block]
    (tmp_path / "my_lab.py").write_text(example)
    (command,) = [block for block in _blocks("bash") if "my_lab.Calm" in block]
    arguments = command.split()[1:]
    arguments[arguments.index("configs/quickstart.yaml")] = str(ROOT / "configs" / "quickstart.yaml")
    short = ["--trainer.max_steps=2", "--trainer.callbacks=[]", "--trainer.limit_val_batches=0"]
    running = ranks.command([*arguments, *short], log=tmp_path / "log.txt", cwd=tmp_path)
    assert running.wait() == 0, running.output()[-3000:]
    assert (tmp_path / "runs" / "version_0" / "adapter").is_dir()


def test_the_extensions_in_the_docs_train(quickstart, tmp_path, monkeypatch):
    """All blocks of one page, one after another, and then a run with what they define."""
    page = (ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 8
    run_all = """
import functools
from lightning.pytorch import Trainer
from lit_dpo import PreferenceDataModule
loss = MixtureLoss(losses=(FocalDPO(beta=0.3), SFTLoss()), weights=(1.0, 0.2))
module = Watched(FrozenA("lit-dpo/quickstart", a_scale=2.0), loss=loss, reference=HalfReference())
data = PreferenceDataModule(train="lit-dpo/quickstart", val="lit-dpo/quickstart")
options = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 1}
trainer = Trainer(max_epochs=1, limit_train_batches=2, **options)
trainer.fit(module, data)
assert {"val/length_gap", "grad_2.0_norm_total"} <= trainer.callback_metrics.keys()
assert all("lora_B" in name for name, p in module.model.named_parameters() if p.requires_grad)
assert Ranked().read({"question": "2 + 2?", "answers": [" 5", " 4"], "stars": [1, 5]}).chosen == " 4"
assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6]]
"""
    _run("\n".join([*blocks, run_all]), tmp_path, monkeypatch)


def test_every_loss_is_in_the_docs_with_the_source_of_its_docstring():
    import lit_dpo.losses as losses

    page = (ROOT / "docs" / "losses.md").read_text()
    for name in set(losses.__all__) - {"PreferenceLoss", "MixtureLoss"}:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
        source = re.search(r"\d{4}\.\d{5}", row)
        assert source is None or source[0] in getattr(losses, name).__doc__, name
    assert "`MixtureLoss`" in page


def test_every_layout_is_in_the_docs():
    from lit_dpo.data.formats.recognition import LAYOUTS

    page = (ROOT / "docs" / "data.md").read_text()
    assert not [name for name in {type(one).__name__ for one in LAYOUTS} if f"`{name}`" not in page]
    assert f"{len(LAYOUTS)} layouts" in (ROOT / "docs" / "index.md").read_text()


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))])
def test_every_file_that_a_page_names_is_there(page):
    text = (ROOT / page).read_text()
    for name in re.findall(r"configs/[\w./-]+", text):
        assert (ROOT / name.rstrip(".")).exists(), name
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert ((ROOT / page).parent / link).is_file(), link


FORMER = re.compile(
    r"\bbeside\b|QLoRAPolicy|\brow_tokens\b|needs_reference|SampleAnswers|truncate_response|\bpair_logps\(model"
)


def test_each_thing_has_one_word():
    """What was called otherwise before is not called so anywhere; the changelog says what is what now."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    files += [one for folder in ("src", "docs", "configs", "benchmarks") for one in (ROOT / folder).rglob("*.*")]
    texts = [one for one in files if one.suffix in (".py", ".md", ".yaml")]
    assert not [f"{one.relative_to(ROOT)}: {found[0]}" for one in texts if (found := FORMER.search(one.read_text()))]


def test_the_readme_is_short():
    assert len(README.split()) <= 900


def test_the_configuration_of_the_readme_is_one(tmp_path, pairs_file, capsys, monkeypatch):
    from lit_dpo.cli import main

    (block,) = _blocks("yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(block)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "run.yaml", "--print_config"])
    assert not end.value.code
    printed = capsys.readouterr().out
    for name in ("lit_dpo.IPOLoss", "lit_dpo.CachedReference", "directory: cache", "max_tokens: 8192"):
        assert name in printed


def test_ci_runs_the_readme_s_test_command():
    assert len(re.findall(r'^pip install -e "\.\[test\]"', README, re.MULTILINE)) == 1
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
