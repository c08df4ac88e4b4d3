"""What changes between two runs under the same name: a base's weights, a tokenizer, a clock."""

from __future__ import annotations

import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_dpo import LoRAPolicy
from lit_dpo.errors import LitDPOError, PolicyError, ResumeError
from lit_dpo.lightning_cli import _last
from lit_dpo.tools import export, generate
from lit_dpo.tools.trained import _of_run
from training import data, module, trainer


@pytest.fixture(scope="module")
def trained(tiny_model, pairs_file, tmp_path_factory):
    """A base of its own, a checkpoint and the adapter of its end."""
    root = tmp_path_factory.mktemp("changed")
    shutil.copytree(tiny_model, root / "base")
    run = trainer(root, max_steps=2)
    run.fit(module(root / "base"), data(pairs_file))
    run.save_checkpoint(root / "a.ckpt")
    return root


def _change_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _ways(root, pairs):
    adapter = str(root / "adapter")
    return {
        "resume": lambda: trainer(root).fit(module(root / "base"), data(pairs), ckpt_path=root / "a.ckpt"),
        "continue": lambda: LoRAPolicy(str(root / "base"), quantization="none", adapter_path=adapter).load(
            torch.device("cpu")
        ),
        "generate": lambda: generate.main([adapter, "--prompt", "x", "--max_new_tokens", "1", "--device", "cpu"]),
        "merge": lambda: export.main([adapter, str(root / "out"), "--merge", "--probe", str(pairs), "--device", "cpu"]),
    }


@pytest.mark.parametrize("way", ["resume", "continue", "generate", "merge"])
def test_a_base_that_was_changed_in_its_place_is_refused(trained, pairs_file, tmp_path, way):
    before = tmp_path / "before"
    shutil.copytree(trained / "base", before)
    try:
        _change_weights(trained / "base")
        with pytest.raises(LitDPOError, match=r"another (run|model)|has other weights now") as refused:
            _ways(trained, pairs_file)[way]()
        assert isinstance(refused.value, PolicyError if way == "continue" else ResumeError)
        assert not (trained / "out").exists()
    finally:
        shutil.rmtree(trained / "base")
        shutil.copytree(before, trained / "base")


def test_an_adapter_is_exported_with_a_line_where_its_base_was_changed(trained, tmp_path, caplog):
    shutil.copytree(trained / "base", tmp_path / "base")
    _change_weights(tmp_path / "base")
    export.main([str(trained / "adapter"), str(tmp_path / "same")])
    assert "another model" not in caplog.text
    export.main([str(trained / "adapter"), str(tmp_path / "other"), "--base", str(tmp_path / "base")])
    assert "it is another model. Give the base that it was trained on" in caplog.text


def test_an_adapter_goes_onto_its_own_base_wherever_that_is_and_onto_another_if_asked(trained, tmp_path):
    shutil.copytree(trained / "base", tmp_path / "moved")
    adapter = str(trained / "adapter")
    for given in ({"model": str(trained / "base")}, {"model": str(tmp_path / "moved")}):
        LoRAPolicy(quantization="none", adapter_path=adapter, **given).load(torch.device("cpu"))
    _change_weights(tmp_path / "moved")
    anyway = LoRAPolicy(str(tmp_path / "moved"), quantization="none", adapter_path=adapter, adapter_base="any")
    anyway.load(torch.device("cpu"))


# ---- clocks ----


def _runs(root, times):
    files = []
    for number, when in enumerate(times):
        files.append(root / f"version_{number}" / "last.ckpt")
        files[-1].parent.mkdir(parents=True)
        files[-1].write_bytes(b"")
        os.utime(files[-1], (when, when))
    return files


def test_the_last_checkpoint_after_a_change_of_the_clock(tmp_path, caplog):
    """Backwards: it is said which run has a higher number. In the future: nobody guesses."""
    now = time.time()
    files = _runs(tmp_path / "back", [now - 100, now - 5000])
    with caplog.at_level("INFO"):
        assert _last(tmp_path / "back") == files[0]
    assert f"{files[0]} is newer than {files[1]}, of a run with a higher number" in caplog.text
    files = _runs(tmp_path / "future", [now + 5000, now])
    with pytest.raises(ResumeError, match=rf"{files[0]} is dated in the future, .*name one with `--ckpt_path`"):
        _last(tmp_path / "future")
    (alone,) = _runs(tmp_path / "alone", [now + 5000])
    assert _last(tmp_path / "alone") == alone


def test_the_checkpoint_of_a_run_is_its_last_step_whatever_the_clock_was(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step, age in ((2, 0), (10, 500), (9, 100)):
        file = folder / f"epoch=0-step={step}.ckpt"
        file.write_bytes(b"")
        os.utime(file, (time.time() - age,) * 2)
    assert _of_run(tmp_path).name == "epoch=0-step=10.ckpt"
