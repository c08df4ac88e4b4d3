"""Checkpoints of strangers: tensors and builtins, no code, no class that is not there, nothing larger than it is."""

from __future__ import annotations

import importlib
import io
import pickle
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from limits import bounded

from lit_dpo import DPOModule, PreferenceDataModule
from lit_dpo.checkpoint import read_checkpoint
from lit_dpo.checkpoint.classes import _resolve, only_known_classes
from lit_dpo.checkpoint.state import check_parts, hyper_parameters
from lit_dpo.cli import main
from lit_dpo.compat import CLASS_PATH
from lit_dpo.errors import LitDPOError, ResumeError
from lit_dpo.module import NAMED_IN_FILES
from training import data, module, trainer

CODE = """
import torch
open({marker!r}, "w")
class Own(torch.optim.SGD): pass
def make(parameters): return Own(parameters)
"""


@pytest.fixture(scope="module")
def saved(tiny_model, pairs_file, tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    run = trainer(root, max_steps=1)
    run.fit(module(tiny_model), data(pairs_file))
    run.save_checkpoint(root / "x.ckpt")
    return root / "x.ckpt"


@pytest.fixture
def changed(saved, tmp_path):
    """Makes a checkpoint with other hyper-parameters."""

    def changed(**changes: object) -> Path:
        content = torch.load(saved, weights_only=True)
        content["hyper_parameters"] |= changes
        torch.save(content, tmp_path / "changed.ckpt")
        return tmp_path / "changed.ckpt"

    return changed


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A module that nobody has imported, and the file that it makes when somebody does."""
    marker = tmp_path / "marker"
    (tmp_path / "stranger_code.py").write_text(CODE.format(marker=str(marker)))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield marker
    sys.modules.pop("stranger_code", None)


def _named(path: str, as_text: bool) -> object:
    return path if as_text else {"class_path": path, "init_args": {"lr": 1e-3}}


@pytest.mark.parametrize("part", ["policy", "loss", "reference", "optimizer", "lr_scheduler"])
@pytest.mark.parametrize("as_text", [True, False])
def test_no_module_is_imported_because_a_file_names_it(changed, stranger, part, as_text):
    path = changed(**{part: _named("stranger_code.Own", as_text)})
    with pytest.raises(ResumeError, match=r"names `stranger_code.Own`, which is not imported.*import the module"):
        DPOModule.load_from_checkpoint(path)
    assert not stranger.exists()


def test_an_imported_module_is_not_asked_for_what_it_would_import(changed, tmp_path, monkeypatch):
    """A module's own `__getattr__` is code, and as a rule it imports; only ours is asked, whose names come so."""
    (tmp_path / "lazy_code.py").write_text(
        f"def __getattr__(name):\n    open({str(tmp_path / 'ran')!r}, 'a')\n    raise AttributeError(name)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "lazy_code", importlib.import_module("lazy_code"))
    (tmp_path / "ran").unlink(missing_ok=True)  # the import system asks for a few names
    with pytest.raises(ResumeError, match=r"names `lazy_code\.Own`"):
        DPOModule.load_from_checkpoint(changed(loss={"class_path": "lazy_code.Own", "init_args": {}}))
    assert not (tmp_path / "ran").exists()
    monkeypatch.delitem(vars(sys.modules["lit_dpo"]), "DPOLoss", raising=False)  # as if nobody had asked for it yet
    assert _resolve("lit_dpo.DPOLoss")[0] is not None


@pytest.mark.parametrize("path", ["subprocess.Popen", "os.system", "builtins.exec", "pathlib.Path", "torch.load"])
@pytest.mark.parametrize("part", ["optimizer", "reference", "extra"])
def test_nothing_is_called_because_a_file_names_it(changed, path, part, tmp_path):
    arguments = {"args": f"touch {tmp_path}/ran", "shell": True}
    given = changed(**{part: {"class_path": path, "init_args": arguments}})
    with pytest.raises(ResumeError, match=r"which is (not imported|no policy, loss)"):
        DPOModule.load_from_checkpoint(given)
    with pytest.raises(ResumeError, match=r"which is (not imported|no policy, loss)"):
        DPOModule.load_from_checkpoint(changed(**{part: [path]}))
    assert not (tmp_path / "ran").exists()


def test_what_the_program_has_imported_loads_and_so_does_what_it_gives(changed, stranger):
    path = changed(optimizer={"class_path": "stranger_code.Own", "init_args": {"lr": 1e-3}})
    assert DPOModule.load_from_checkpoint(path, optimizer=torch.optim.SGD).optimizer is torch.optim.SGD
    assert not stranger.exists()
    import stranger_code

    loaded = DPOModule.load_from_checkpoint(path)
    assert type(loaded.optimizer([torch.nn.Parameter(torch.ones(1))])) is stranger_code.Own


@pytest.mark.parametrize("name", ["torch.optim.SGD", "torch.optim.rprop.Rprop", "bitsandbytes.optim.adamw.AdamW8bit"])
def test_optimizers_of_known_libraries_load(changed, name):
    path = changed(optimizer={"class_path": name, "init_args": {"lr": 1e-3}})
    assert DPOModule.load_from_checkpoint(path).optimizer is not None


def test_the_commands_that_read_a_checkpoint_take_no_class_from_it(changed, stranger, capsys):
    path = changed(policy={"class_path": "stranger_code.Own", "init_args": {}}, loss="stranger_code.make")
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(path), "--prompt", "a", "--device", "cpu"])
    assert stop.value.code == 1
    assert "Or give the adapter's folder" in capsys.readouterr().err
    assert not stranger.exists()


def _laughs() -> object:
    found: object = ["ha"]
    for _ in range(60):
        found = [found, found]
    return found


@pytest.mark.parametrize("kind", ["hyper-parameters", "identity", "not an object", "not a checkpoint"])
def test_a_short_file_does_not_become_endless(saved, tmp_path, kind):
    content = torch.load(saved, weights_only=True)
    if kind == "hyper-parameters":
        content["hyper_parameters"]["a"] = _laughs()
    elif kind == "identity":
        content["lit_dpo"]["base"] = _laughs()
    content = {"not an object": {**content, "hyper_parameters": [1]}, "not a checkpoint": [1]}.get(kind, content)
    torch.save(content, tmp_path / "x.ckpt")
    with bounded(), pytest.raises(ResumeError):
        DPOModule.load_from_checkpoint(tmp_path / "x.ckpt")


def test_neither_does_a_file_of_hyper_parameters(saved, tmp_path):
    lines = ["a0: &a0 [ha, ha]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    (tmp_path / "hparams.yaml").write_text("\n".join(lines))
    with bounded(), pytest.raises(ResumeError, match="more than any run"):
        DPOModule.load_from_checkpoint(saved, hparams_file=str(tmp_path / "hparams.yaml"))
    (tmp_path / "hparams.yaml").write_text(yaml.dump({"policy": Path}))
    with pytest.raises(LitDPOError):
        DPOModule.load_from_checkpoint(saved, hparams_file=str(tmp_path / "hparams.yaml"))
    (tmp_path / "hparams.yaml").write_text("policy: [")
    with pytest.raises(ResumeError, match=r"Expected hyper-parameters in .*hparams.yaml"):
        hyper_parameters(saved, "hyper_parameters", tmp_path / "hparams.yaml")


def test_tensors_are_as_large_as_their_numbers(saved, tmp_path):
    content = torch.load(saved, weights_only=True)
    name = next(iter(content["state_dict"]))
    content["state_dict"][name] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(content, tmp_path / "x.ckpt")
    with bounded(), pytest.raises(ResumeError, match="larger than its numbers"):
        DPOModule.load_from_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta")], ids=["sparse", "meta"]
)
def test_tensors_have_their_numbers_one_after_another(tensor):
    with pytest.raises(ResumeError, match="larger than its numbers"):
        check_parts({"state_dict": [tensor]}, "x.ckpt")


def _nested(depth):
    found = {}
    for _ in range(depth):
        found = {"a": found}
    return found


def test_what_a_run_may_write_has_an_end():
    """A hundred levels, in all that is read, and so many parts of hyper-parameters."""
    check_parts(_nested(100), "x.ckpt")
    with pytest.raises(ResumeError, match=r"x.ckpt holds more than any run writes"):
        check_parts(_nested(101), "x.ckpt")
    for many in ([0] * 99_998, _nested(99)):
        with only_known_classes({"a": many}, DPOModule, NAMED_IN_FILES):
            pass
    for more in ([0] * 99_999, _nested(100)):
        with (
            pytest.raises(ResumeError, match="larger than any module has"),
            only_known_classes({"a": more}, DPOModule, NAMED_IN_FILES),
        ):
            pass


def test_a_stream_is_read_from_its_beginning_and_left_there(saved):
    stream = io.BytesIO(saved.read_bytes())
    stream.seek(7)
    read_checkpoint(stream)
    assert stream.tell() == 0


# ---- which classes ----


def _known(stored):
    with only_known_classes(stored, DPOModule, NAMED_IN_FILES):
        return True


def test_the_project_of_the_module_s_own_class_is_known_and_no_other(monkeypatch):
    """It was imported by whoever loads; what it holds need not be of a kind that has a name here."""
    for project in ("my_lab", "elsewhere"):
        code = types.ModuleType(project)
        exec("import lit_dpo\nclass Mine(lit_dpo.DPOModule): pass\ndef make(parameters): pass", vars(code))
        monkeypatch.setitem(sys.modules, project, code)
    mine = {CLASS_PATH: "my_lab.Mine"}
    assert _known({**mine, "optimizer": {"class_path": "my_lab.make"}})
    for stored in ({**mine, "optimizer": "elsewhere.make"}, {"optimizer": "my_lab.make"}):
        with pytest.raises(ResumeError, match="which is no policy, loss, reference, optimizer or schedule"):
            _known(stored)


def test_a_library_is_imported_as_far_as_it_is_there(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.optim._multi_tensor", raising=False)
    assert _resolve("torch.optim._multi_tensor.Adam")[0] is not None
    assert _resolve("lit_dpo.nowhere.Loss") == (None, ["lit_dpo.nowhere", "lit_dpo.nowhere.Loss"])
    for name in ("bitsandbytes", "bitsandbytes.optim"):  # as where it is not installed
        monkeypatch.setitem(sys.modules, name, None)
    assert _resolve("bitsandbytes.optim.AdamW8bit") == (None, ["bitsandbytes.optim.AdamW8bit"])


def test_what_nobody_has_named_is_imported_as_ever():
    with (
        only_known_classes({"a": "stranger_code.Own"}, DPOModule, NAMED_IN_FILES),
        pytest.raises(ModuleNotFoundError, match="no_such_module"),
    ):
        importlib.import_module("no_such_module")


def test_an_archive_that_is_compressed_is_not_unpacked(saved, tmp_path):
    """torch reads what is compressed, and never writes it: zeros would be a thousand times their size."""
    with zipfile.ZipFile(saved) as there, zipfile.ZipFile(tmp_path / "x.ckpt", "w", zipfile.ZIP_DEFLATED) as made:
        for one in there.infolist():
            made.writestr(one.filename, there.read(one))
    with pytest.raises(ResumeError, match="compresses"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + bytes(18), pickle.dumps({"a": 1}), b"\x80\x02cos\nsystem\n."])
def test_what_is_no_checkpoint_is_a_sentence(content):
    with pytest.raises(ResumeError, match="Expected a checkpoint"):
        read_checkpoint(io.BytesIO(content))


def test_the_data_of_a_run_are_not_in_question():
    """A data module is never built from a checkpoint by a command; its state is numbers."""
    assert "load_from_checkpoint" not in vars(PreferenceDataModule)
