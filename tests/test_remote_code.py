"""Code that comes with a model runs where the user has said so, and nowhere because a file says so."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_dpo import CachedReference, DPOModule, LoRAPolicy, ModelReference, PreferenceDataModule
from lit_dpo.cli import main
from lit_dpo.errors import DataError, PolicyError, ResumeError
from training import data, module, trainer

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).write_text("it ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own(tiny_model, tmp_path, monkeypatch):
    """A model folder with code of its own, and the file that this code writes when it runs."""
    folder, marker = tmp_path / "own", tmp_path / "marker"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(tiny_model, folder)
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    _change(
        folder / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"},
    )
    _change(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "code.OwnTokenizer"]},
    )
    return folder, marker


def _change(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _again(folder: Path, marker: Path) -> None:
    """Code that has changed runs again, in the same process."""
    marker.unlink()
    with (folder / "code.py").open("a") as stream:
        stream.write("# changed\n")


def _trained(model: Path, pairs_file: Path, root: Path, **kwargs) -> Path:
    keep = ModelCheckpoint(root, filename="x")
    run = trainer(root, callbacks=[keep], enable_checkpointing=True, max_steps=1)
    run.fit(module(model, policy={"trust_remote_code": True}, **kwargs), data(pairs_file))
    return root / "x.ckpt"


def test_a_checkpoint_does_not_say_that_code_runs(own, pairs_file, tmp_path):
    folder, marker = own
    path = _trained(folder, pairs_file, tmp_path / "run")
    assert marker.is_file()
    _again(folder, marker)
    with pytest.raises(PolicyError, match="comes with code of its own"):
        DPOModule.load_from_checkpoint(path)
    (tmp_path / "hparams.yaml").write_text(yaml.safe_dump(torch.load(path, weights_only=True)["hyper_parameters"]))
    with pytest.raises(PolicyError, match="comes with code of its own"):
        DPOModule.load_from_checkpoint(path, hparams_file=str(tmp_path / "hparams.yaml"))
    assert not marker.exists()
    typed = {"model": str(folder), "quantization": "none", "r": 4, "trust_remote_code": True}
    again = DPOModule.load_from_checkpoint(path, policy=typed)
    assert again.policy.trust_remote_code
    assert type(again.model.get_base_model()).__name__ == "OwnModel"


@pytest.mark.parametrize("cached", [False, True])
def test_a_reference_in_a_checkpoint_does_not_either(own, tiny_model, pairs_file, tmp_path, cached):
    folder, marker = own
    reference = ModelReference(str(folder), quantization="none", trust_remote_code=True)
    reference = CachedReference(reference, str(tmp_path / "cache")) if cached else reference
    path = _trained(tiny_model, pairs_file, tmp_path / "run", reference=reference)
    _again(folder, marker)
    with pytest.raises(PolicyError, match="comes with code of its own"):
        DPOModule.load_from_checkpoint(path)
    assert not marker.exists()
    stream = io.BytesIO(path.read_bytes())
    assert DPOModule.load_from_checkpoint(stream, reference=None).reference is not None


def test_an_edited_checkpoint_of_a_run_without_code_does_not(own, tiny_model, pairs_file, tmp_path):
    folder, marker = own
    path = _trained(tiny_model, pairs_file, tmp_path / "run")
    saved = torch.load(path, weights_only=True)
    saved["hyper_parameters"]["policy"]["init_args"] |= {"model": str(folder), "trust_remote_code": True}
    torch.save(saved, path)
    with pytest.raises(PolicyError):
        DPOModule.load_from_checkpoint(path)
    assert not marker.exists()


def test_the_command_takes_it_from_the_command_line_alone(own, pairs_file, tmp_path, monkeypatch, capsys):
    folder, marker = own
    path = _trained(folder, pairs_file, tmp_path / "run")
    _again(folder, marker)
    monkeypatch.chdir(tmp_path)
    command = [
        "validate",
        f"--model.policy.model={folder}",
        *("--model.policy.quantization=none", "--model.policy.r=4", "--trainer.logger=false"),
        *(f"--data.val={pairs_file}", "--trainer.accelerator=cpu", f"--ckpt_path={path}"),
    ]
    with pytest.raises(SystemExit):
        main(command)
    assert "comes with code of its own" in capsys.readouterr().err
    assert not marker.exists()
    main([*command, "--model.policy.trust_remote_code=true"])
    assert marker.is_file()


def test_a_tokenizer_with_code_is_refused_and_not_asked_about(own, pairs_file, monkeypatch):
    """As on a terminal, where somebody would answer yes."""
    folder, marker = own
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(DataError, match="trust_remote_code"):
        PreferenceDataModule(train=str(pairs_file), tokenizer=str(folder)).setup("fit")
    with pytest.raises(PolicyError, match="code of its own"):
        LoRAPolicy(str(folder)).load_tokenizer()
    assert not marker.exists()


class _Touches:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_what_is_pickled_in_a_checkpoint_does_not_run_whatever_a_caller_asks(tiny_model, pairs_file, tmp_path):
    path, marker = _trained(tiny_model, pairs_file, tmp_path / "run"), tmp_path / "marker"
    torch.save({**torch.load(path, weights_only=True), "extra": _Touches(marker)}, path)
    with pytest.raises(ResumeError, match="tensors and builtins"):
        DPOModule.load_from_checkpoint(path, weights_only=False)
    with pytest.raises(ResumeError, match="tensors and builtins"):
        trainer(tmp_path).fit(module(tiny_model), data(pairs_file), ckpt_path=path, weights_only=False)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_checkpoint_does_not_say_what_builds_its_module(tiny_model, pairs_file, tmp_path, monkeypatch):
    """Lightning before 2.6.6 called whatever it named."""
    path, marker = _trained(tiny_model, pairs_file, tmp_path / "run"), tmp_path / "marker"
    (tmp_path / "imported.py").write_text(f"open({str(marker)!r}, 'w')\ndef build(*_): return None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    saved = torch.load(path, weights_only=True)
    saved["hyper_parameters"]["_instantiator"] = "imported.build"
    torch.save(saved, path)
    with pytest.raises(ValueError, match="not in the allowlist"):
        DPOModule.load_from_checkpoint(path)
    assert not marker.exists()
