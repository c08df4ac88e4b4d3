"""What users build on stays, or the changelog says so; what an earlier version wrote loads."""

from __future__ import annotations

import json
import logging
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import surface
import torch
import walk
from safetensors.torch import load_file
from walk import CHECKPOINT, KEPT, command

from lit_dpo import CachedReference, DPOModule, LoRAPolicy, versions
from lit_dpo.callbacks.environment import starts
from lit_dpo.checkpoint import KEY, RECORD, read_checkpoint
from lit_dpo.data.batch import EncodedPrompt, collate
from lit_dpo.errors import LitDPOError, VersionError
from lit_dpo.logps.choice import choose_layout
from lit_dpo.references.store import LogpStore
from lit_dpo.seals import key_of
from lit_dpo.tools.ablate.preparing import Options, Prepared
from lit_dpo.tools.ablate.records import Layout
from lit_dpo.tools.ablate.running import _remember
from lit_dpo.tools.audit.dynamics import Dynamics

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    return walk.walk(tmp_path_factory.mktemp("walked"))


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The kept files, in the working directory: their paths are relative."""
    monkeypatch.chdir(shutil.copytree(KEPT, tmp_path / "kept"))


# ---- what is public ----


def test_what_users_build_on_is_what_the_file_says(walked):
    found = surface.differences(surface.FILE.read_text(encoding="utf-8"), surface.text(walked))
    assert not found, (
        "what users build on has changed. If that is meant, run `python tests/stability/surface.py`, and say it in "
        "CHANGELOG.md; what goes needs a warning first, see docs/stability.md:\n" + "\n".join(found)
    )


def _since() -> str:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return text.partition(f"## [{walk.VERSION}]")[0]


def test_what_is_gone_since_a_release_is_in_the_changelog():
    before, now = ((one / "public_api.txt").read_text(encoding="utf-8") for one in (KEPT, surface.HERE))
    assert len(surface.things(now)) > 1000
    assert surface.unsaid(before, now, _since()) == []


LIST = """
## names and arguments

lit_dpo.Loss of PreferenceLoss
lit_dpo.Loss(beta: dict[str, float] | None = None)
lit_dpo.Loss.parts(pairs: PairLogps, *, of: Literal['a', 'b'] = 'a') -> Tensor
lit_dpo.other(one, *two: int, **three: Any)
"""


@pytest.mark.parametrize(
    ("old", "new", "gone"),
    [
        ("float = 0.1", "int = 2", []),
        ("(pairs: PairLogps, *, ", "(pairs: PairLogps, more: int = 1, *, ", []),
        ("of: Literal['a', 'b'] = 'a'", "by: int = 1", ["names and arguments: lit_dpo.Loss.parts(of)"]),
        ("(beta: dict", "(alpha: dict", ["names and arguments: lit_dpo.Loss(beta)"]),
        ("lit_dpo.Loss", "lit_dpo.New", ["names and arguments: lit_dpo.Loss"]),
        ("lit_dpo.other(one", "lit_dpo.other(first", ["names and arguments: lit_dpo.other(one)"]),
    ],
)
def test_a_removal_that_the_changelog_does_not_name_is_found(old, new, gone):
    now = LIST.replace(old, new)
    assert surface.unsaid(LIST, now, "") == gone
    said = (
        "## [Unreleased]\n\n### Removed\n\n- `Loss` and its `beta`; `parts` has no `of`; `other`, `one`.\n\n### Fixed\n"
    )
    assert surface.unsaid(LIST, now, said) == []
    assert surface.unsaid(LIST, now, said.replace("Removed", "Added")) == gone


def test_what_the_documentation_names_is_public():
    names = {line.partition("(")[0].split(" ")[0] for line in surface.names()}
    modules = set(surface.MODULES) | set(surface.SINGLE)
    texts = [path.read_text(encoding="utf-8") for path in (*ROOT.glob("docs/*.md"), ROOT / "README.md")]
    texts += [path.read_text(encoding="utf-8") for path in ROOT.glob("configs/**/*.yaml")]
    imported = {
        f"{module}.{name.strip()}"
        for text in texts
        for module, several in re.findall(r"from (lit_dpo[\w.]*) import ([\w, ]+)", text)
        for name in several.split(",")
    }
    paths = {path for text in texts for path in re.findall(r"\blit_dpo(?:\.[a-z_]+)*\.[A-Z]\w*", text)}
    named = imported | paths
    assert len(named) > 60
    of = {name.rpartition(".")[2] for name in names}
    unknown = {one for one in named - names - modules if one.rpartition(".")[2] not in of}
    assert not unknown


# ---- what was kept ----


def _rows(path: Path) -> pd.DataFrame:
    """By step, without what depends on the machine."""
    read = pd.read_csv(path).groupby("step").first()
    kept = [name for name in read if re.search(r"_(reward|logps|accuracy|margin)$|/(loss|kl|learning_rate)$", name)]
    return read[kept]


def test_the_kept_checkpoint_goes_on_to_the_numbers_of_the_straight_run(walked):
    straight, again = _rows(KEPT / "run" / "metrics.csv"), _rows(walked.run / "metrics.csv")
    assert list(again.index) == list(range(5, 12)), "from the row of the last step before the checkpoint"
    assert len(again.columns) == 17
    pd.testing.assert_frame_equal(again.loc[6:], straight.loc[6:, again.columns], rtol=1e-5, atol=1e-5)
    pd.testing.assert_frame_equal(
        pd.read_parquet(walked.run / "dynamics.parquet"),
        pd.read_parquet(KEPT / "run" / "dynamics.parquet"),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_kept_checkpoint_measures_what_it_measured(walked):
    kept, now = (
        pd.read_json(folder / "predicted" / "predictions.jsonl", lines=True) for folder in (KEPT, walked.folder)
    )
    assert len(now) == 21
    pd.testing.assert_frame_equal(now, kept, rtol=1e-6, atol=1e-5)


def test_every_command_reads_the_kept_run(walked):
    kept, exported = (
        load_file(one / "adapter_model.safetensors") for one in (KEPT / "run/adapter", walked.folder / "exported")
    )
    assert kept.keys() == exported.keys()
    assert all(kept[name].equal(exported[name]) for name in kept)
    card = (walked.folder / "exported" / "README.md").read_text(encoding="utf-8")
    assert "BCOLoss" in card
    assert "12 optimizer steps" in card
    made = starts(KEPT / "run")[0]
    assert f"Trained with Python {made['python']}, lit\\_dpo 0.1.0 (commit {made['lit_dpo']['commit']:.12}" in card
    assert walked.said["generate"].startswith("X")
    assert "frequent-completions" in walked.said["inspect"]
    assert len(pq.read_table(walked.folder / "audited" / "scores.parquet")) == 21


def test_the_kept_adapter_is_continued(kept):
    module = DPOModule(LoRAPolicy("model", quantization="none", r=2, adapter_path="run/adapter"))
    module.configure_model()
    there = load_file("run/adapter/adapter_model.safetensors")
    here = {name: p for name, p in module.model.named_parameters() if ".default." in name}
    assert len(here) == len(there) == 28
    assert all(p.equal(there[name.replace(".default.", ".")]) for name, p in here.items())


def _opened(folder: Path) -> LogpStore:
    """As `CachedReference` does: its seal is of what the folder belongs to."""
    return LogpStore(folder, key_of((folder / "reference.json").read_text(encoding="utf-8").removesuffix("\n")))


def test_the_kept_cache_is_read_where_its_versions_are_those_of_here(walked):
    root = walked.folder / "reference-cache"
    (name,) = (path.name for path in (KEPT / "reference-cache").iterdir())
    said = json.loads((root / name / "reference.json").read_text())["compute"]
    same = all(said[one] == version(one) for one in ("torch", "transformers", "peft", "bitsandbytes"))
    folders = {path.name for path in root.iterdir()}
    assert folders == {name} if same else len(folders) == 2
    before = _opened(KEPT / "reference-cache" / name)
    now = _opened(next(root / one for one in folders if same or one != name))
    assert len(before) == len(now) == 42, "nothing was computed that was there"
    keys = [entry["key"].tobytes() for entry in before._entries]
    assert all(now.get(key) == pytest.approx(before.get(key), rel=1e-6, abs=1e-5) for key in keys)
    assert not before.damaged + now.damaged


def test_a_cache_of_other_versions_is_said_and_not_read(kept, caplog):
    (there,) = Path("reference-cache").iterdir()
    said = json.loads((there / "reference.json").read_text())
    said["compute"]["torch"] = "2.1.0"
    (there / "reference.json").write_text(json.dumps(said))
    there.rename(there.with_name("of-2.1.0"))
    policy, reference = LoRAPolicy("model", quantization="none", r=2), CachedReference(directory="reference-cache")
    model = policy.load()
    reference.attach(model, policy)
    choose_layout(model)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        reference.logps(model, collate([EncodedPrompt([2, 3], [[4], [5, 6]])]))
    (line,) = [one for one in caplog.messages if "reference cache" in one]
    assert "reference cache: 0 completions in" in line
    assert "reference-cache/of-2.1.0 is of " in line
    assert f"torch 2.1.0 (here {version('torch')})" in line
    assert "is not read" in line


# ---- newer formats ----


def _checkpoint(value: object) -> None:
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    checkpoint[KEY]["version"] = value
    torch.save(checkpoint, CHECKPOINT)


def _dynamics(value: object) -> None:
    table = pq.read_table("run/dynamics.parquet")
    said = json.loads(table.schema.metadata[b"lit_dpo"])
    pq.write_table(
        pa.table(table.columns, schema=table.schema.with_metadata({"lit_dpo": json.dumps({**said, "version": value})})),
        "run/dynamics.parquet",
    )


def _json(path: str):
    def change(value: object) -> None:
        said = (
            json.loads(Path(path).read_text()) if Path(path).exists() else {"options": Options()._asdict(), "runs": {}}
        )
        Path(path).write_text(json.dumps({**said, "version": value}))

    return change


def _adapter(path: str):
    def read() -> None:
        command(["generate", path, "--prompt", "x"])

    return read


READERS = [
    ("CHECKPOINT", CHECKPOINT, _checkpoint, lambda: DPOModule.load_from_checkpoint(CHECKPOINT)),
    ("CHECKPOINT", CHECKPOINT, _checkpoint, lambda: read_checkpoint(CHECKPOINT)),
    ("CHECKPOINT", f"run/adapter/{RECORD}", _json(f"run/adapter/{RECORD}"), None),
    ("DYNAMICS", "run/dynamics.parquet", _dynamics, lambda: Dynamics.read(Path("run"))),
    ("ABLATION", "ablation.json", _json("ablation.json"), None),
    ("ENVIRONMENT", "run/environment.json", _json("run/environment.json"), lambda: starts(Path("run"))),
]


def _read(file: str) -> None:
    from lit_dpo.tools import trained

    if file == "ablation.json":
        _remember(Prepared([], {}, {}, Options()), Layout(Path()))
    else:
        import argparse

        parser = argparse.ArgumentParser()
        trained.add_arguments(parser)
        trained.find("run/adapter", parser.parse_args([]))


@pytest.mark.parametrize(("name", "file", "change", "read"), READERS)
def test_a_file_of_a_newer_format_is_refused_in_a_sentence(kept, name, file, change, read):
    newest = getattr(versions, name)
    read = read or (lambda: _read(file))
    for value in (None, newest):  # the first had none
        change(value)
        read()
    change(newest + 1)
    told = f"{file} was written by a newer lit_dpo: its format is {newest + 1}, and this release reads up to {newest}."
    with pytest.raises(VersionError, match=re.escape(told)):
        read()
    change("many")
    with pytest.raises(VersionError, match=rf"Expected the version of a format, 1 to {newest}, in .* but got 'many'"):
        read()


def test_every_format_has_a_case():
    assert {name for name in vars(versions) if name.isupper()} == {name for name, *_ in READERS}


def test_a_run_does_not_go_on_from_a_checkpoint_of_a_newer_format(kept, capsys):
    _checkpoint(versions.CHECKPOINT + 1)
    with pytest.raises(SystemExit) as stop:
        command(["fit", "--config", "run/config.yaml", "--ckpt_path", CHECKPOINT, *walk.into("again")])
    assert stop.value.code == 1
    assert f"lit-dpo: error: {CHECKPOINT} was written by a newer lit_dpo" in capsys.readouterr().err
    assert issubclass(VersionError, LitDPOError)
