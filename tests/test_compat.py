"""Private names of other libraries: there are few, in one file, and each still means what we take it to mean."""

from __future__ import annotations

import ast
import csv
import functools
import importlib
import inspect
import re
from pathlib import Path

import jsonargparse
import lightning.pytorch as pl
import pytest
import torch
from datasets import Dataset
from lightning.pytorch.cli import LightningCLI, instantiate_module
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import lit_dpo
import tiny
from lit_dpo import DPOModule, IPOLoss, LoRAPolicy, compat
from lit_dpo.checkpoint.identity import configuration, to_builtins
from lit_dpo.checkpoint.position import take_settings
from lit_dpo.lightning_cli import LitDPOCLI
from lit_dpo.losses import PreferenceLoss
from lit_dpo.memory import LiveBytes
from lit_dpo.parser import Parser
from lit_dpo.policy.checks import enable_checkpointing, int8_layers, turn_off_dropout_layers
from training import data, module, trainer

PACKAGE = Path(lit_dpo.__file__).parent
DOOR = PACKAGE / "compat.py"
MOST = 13
PRIVATE = re.compile(r"_[A-Za-z]\w*")


# ---- the law: no other file has one ----


@functools.cache
def _ours() -> set[str]:
    """Private names that this package defines: functions, classes, variables, and what objects keep of their own."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                own = isinstance(node, ast.Name) or ast.unparse(node.value) == "self"
                found |= {node.id if isinstance(node, ast.Name) else node.attr} if own else set()
    return found


def _private(source: str, ours: set[str]) -> set[str]:
    """Private names of others in a source: of anything but oneself, of a base class, in imports and as strings."""
    tree, found = ast.parse(source), set()
    pieces = {id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            own = ast.unparse(node.value) in ("self", "cls", "super()") and node.attr in ours
            found |= set() if own else {node.attr}
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            inside = str(node.module).split(".")[0] == "lit_dpo"
            found |= set() if inside else {*str(node.module).split("."), *(alias.name for alias in node.names)}
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces
        ):  # getattr, keys of what others have saved
            found.add(node.value)
    names = {name for name in found if PRIVATE.fullmatch(name)}
    return names - {"_replace", "_asdict", "_fields", "_make", "_exit"}  # public: of every NamedTuple, and of `os`


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("model._attn", {"_attn"}),
        ("self._attn", {"_attn"}),
        ("self._mine = 1; self._mine", set()),
        ("self.layer._mine", {"_mine"}),
        ("torch._C._nn", {"_C", "_nn"}),
        ("super()._mine()", set()),
        ("from torch._subclasses.fake_tensor import FakeTensorMode", {"_subclasses"}),
        ("from torch.utils import _pytree", {"_pytree"}),
        ("import torch._dynamo", {"_dynamo"}),
        ("getattr(model, '_attn')", {"_attn"}),
        ("state['_last_lr']", {"_last_lr"}),
        ("row._replace(a=1)", set()),
        ("from lit_dpo.data import _mine", set()),
        ("x.__class__, '__main__', '_', 'a _b', f'{x}_attn'", set()),
    ],
)
def test_the_law_sees_every_way_to_a_private_name(source, found):
    assert _private(source, ours={"_mine"}) == found


def test_no_file_but_one_uses_a_private_name_of_another_library():
    files = {str(file.relative_to(PACKAGE)): file for file in PACKAGE.rglob("*.py") if file != DOOR}
    found = {name: _private(file.read_text(encoding="utf-8"), _ours()) for name, file in files.items()}
    assert {name: names for name, names in found.items() if names} == {}


def test_there_are_few_of_them():
    found = _private(DOOR.read_text(encoding="utf-8"), ours=set())
    assert found == {
        "_disable_adapters",
        "_active_adapter",
        "_attn_implementation",
        "_can_set_attn_implementation",
        "_backward_hooks",
        "_ddp_params_and_buffers_to_ignore",
        "_python_dispatch",
        "_subclasses",
        "_class_path",
        "_instantiator",
        "_batches_that_stepped",
        "_version",
        "_typehints",
    }
    assert len(found) <= MOST


def test_every_accessor_says_why():
    for name, accessor in inspect.getmembers(compat, inspect.isfunction):
        if accessor.__module__ == compat.__name__:
            assert accessor.__doc__, name


# ---- PEFT ----


@pytest.fixture
def adapted():
    return tiny.lora(tiny.model()).train()


def _layers(model):
    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


def _logits(model):
    return model(input_ids=torch.arange(1, 6)[None]).logits.detach()


def _trained(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_adapters_that_are_turned_off_compute_nothing_and_still_train(adapted):
    before, trained = _logits(adapted), _trained(adapted)
    for layer in _layers(adapted):
        compat.turn_adapters_off(layer, True)
    assert all(layer.disable_adapters for layer in _layers(adapted))
    assert _trained(adapted) == trained
    off = _logits(adapted)
    assert not torch.equal(off, before)
    with adapted.disable_adapter():
        assert _trained(adapted) != trained, "the public way is as good now"
        assert torch.equal(_logits(adapted), off)


def test_an_adapter_that_is_used_computes_and_the_other_still_trains(adapted):
    from peft import LoraConfig

    adapted.add_adapter("reference", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    before, trained = _logits(adapted), _trained(adapted)
    assert all(layer.active_adapter in ("default", ["default"]) for layer in _layers(adapted))
    for layer in _layers(adapted):
        compat.use_adapters(layer, ["reference"])
    assert all(layer.active_adapters == ["reference"] for layer in _layers(adapted))
    assert _trained(adapted) == trained
    other = _logits(adapted)
    assert not torch.equal(other, before)
    adapted.set_adapter("reference")
    assert _trained(adapted) != trained, "the public way is as good now"
    assert torch.equal(_logits(adapted), other)


# ---- transformers ----


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_the_attention_of_a_model_is_the_one_that_was_set(name):
    model = tiny.model(name)
    for wanted in ("eager",) if name == "mamba" else ("eager", "sdpa"):
        model.set_attn_implementation(wanted)
        assert compat.attention_of(model) == wanted


CODE_WITH_ATTENTION_OF_ITS_OWN = """
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

class OwnAttention(nn.Module):
    pass

class Own(PreTrainedModel):
    config_class = PreTrainedConfig
    _supports_sdpa = True
"""


def test_a_model_whose_code_does_not_ask_the_interface_cannot_switch(tmp_path, monkeypatch):
    assert compat.can_switch_attention(tiny.model())
    (tmp_path / "own_attention.py").write_text(CODE_WITH_ATTENTION_OF_ITS_OWN)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_attention")
    model = own.Own(own.PreTrainedConfig())
    before = compat.attention_of(model)
    assert not compat.can_switch_attention(model)
    model.set_attn_implementation("eager" if before == "sdpa" else "sdpa")
    assert compat.attention_of(model) == before, "the public way does nothing"


# ---- torch ----


def test_a_gradient_hook_is_seen_while_it_is_there():
    parameter = nn.Parameter(torch.zeros(2))
    assert not compat.has_gradient_hook(parameter)
    handle = parameter.register_hook(lambda gradient: gradient)
    assert compat.has_gradient_hook(parameter)
    handle.remove()
    assert not compat.has_gradient_hook(parameter)


def test_an_operation_mode_sees_operations_of_a_backward_pass_too():
    seen = []

    class Mode(compat.operation_mode()):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    x = torch.ones(3, requires_grad=True)
    with Mode():
        y = x.exp().sum()
        forward = len(seen)
        y.backward()
    assert torch.ops.aten.exp in seen[:forward]
    assert torch.ops.aten.mul in seen[forward:]


def test_fake_tensors_have_a_size_a_device_and_no_memory():
    with compat.fake_tensors():
        large = torch.zeros(2**20, 2**20)
        assert (large @ large).shape == (2**20, 2**20)
        assert large.device.type == "cpu"
        assert (large[:, :1] + torch.zeros(1)).shape == (2**20, 1)


@pytest.mark.parametrize("fake", [False, True])
def test_a_storage_is_one_object_for_as_long_as_it_is_there(fake):
    """What `LiveBytes` counts by; that would double what is there if views had objects of their own."""
    from contextlib import nullcontext

    with compat.fake_tensors() if fake else nullcontext():
        one = torch.zeros(4, 4)
        first = id(one.untyped_storage())
        others = [torch.zeros(3).untyped_storage() for _ in range(100)]
        assert {id(view.untyped_storage()) for view in (one, one[1], one.t(), one.detach(), nn.Parameter(one))} == {
            first
        }
        assert first not in map(id, others)
        del others
        with LiveBytes() as memory:
            made = [torch.ones(8) for _ in range(100)]
            views = [part.view(2, 4) for part in made]
            assert memory.live == 100 * 32
            del made
            assert memory.live == 100 * 32
            del views
        assert memory.live == 0


def test_dropout_of_every_kind_that_torch_has_is_turned_off():
    kinds = [getattr(nn, name) for name in dir(nn) if "Dropout" in name]
    layers = nn.ModuleList(kind(0.5) for kind in kinds)
    assert len(layers) >= 6
    turn_off_dropout_layers(layers)
    assert [layer.p for layer in layers] == [0.0] * len(layers)


def test_a_module_moves_and_never_casts(tiny_model):
    dpo = module(tiny_model)
    dpo.register_buffer("seen", torch.zeros(2))
    for given in (
        (),
        (torch.float16,),
        (None, torch.float16),
        ("cpu",),
        ("cpu", torch.float16),
        (torch.zeros(1).half(),),
    ):
        assert dpo.to(*given).seen.dtype == torch.float32
        assert dpo.device.type == "cpu"
    assert dpo.to(dtype=torch.float16).seen.device.type == "cpu"
    for given, named in ((("meta",), {}), ((), {"device": "meta"}), ((), {"tensor": torch.zeros(1, device="meta")})):
        there = module(tiny_model)
        there.register_buffer("seen", torch.zeros(2))
        assert there.to(*given, **named).seen.device.type == "meta"
    with pytest.raises(TypeError, match="to"):
        dpo.to(devcie="cpu")


def test_what_a_scheduler_is_after_some_steps_is_what_it_would_have_been():
    """Of a run that goes on under another rate: what `LambdaLR` keeps in private is its own doing."""

    def made(rate, steps):
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
        return optimizer, scheduler

    saved, fresh, straight = made(1e-2, 4), made(1e-3, 0), made(1e-3, 4)
    file = {"optimizer_states": [saved[0].state_dict()], "lr_schedulers": [saved[1].state_dict()]}
    config = type("Config", (), {"scheduler": fresh[1]})
    take_settings(file, type("Run", (), {"optimizers": [fresh[0]], "lr_scheduler_configs": [config]}), same=True)
    fresh[0].load_state_dict(file["optimizer_states"][0])
    fresh[1].load_state_dict(file["lr_schedulers"][0])
    for _ in range(3):
        assert fresh[1].get_last_lr() == straight[1].get_last_lr()
        assert fresh[0].param_groups[0]["lr"] == straight[0].param_groups[0]["lr"]
        for optimizer, scheduler in (fresh, straight):
            optimizer.step()
            scheduler.step()


# ---- bitsandbytes ----


def test_int8_layers_are_bitsandbytes_own_and_not_the_adapters_around_them(tiny_model):
    policy = LoRAPolicy(str(tiny_model), quantization="int8", r=2)
    model = policy.load()
    found = int8_layers(model)
    assert found == [layer.base_layer for layer in _layers(model)]
    assert {type(layer).__name__ for layer in _layers(model)} == {type(layer).__name__ for layer in found}
    assert all(hasattr(layer.state, "threshold") for layer in found)
    assert int8_layers(nn.Linear(2, 2)) == []


# ---- Lightning ----


def test_rows_are_numbered_from_the_step_that_is_given(tiny_model, pairs_file, tmp_path):
    class Later(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            compat.number_rows_from(trainer, 40)

    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, logger=logger, max_steps=3, callbacks=[Later()])
    run.fit(module(tiny_model), data(pairs_file))
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        steps = {int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")}
    assert steps == {40, 41, 42}
    saved = run.fit_loop.state_dict()["epoch_loop.state_dict"]
    assert saved[compat.BATCHES_THAT_STEPPED] == 43


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_a_logger_has_no_number_until_it_is_asked_or_given_one(kind, tmp_path):
    logger = kind(tmp_path, name="")
    assert not compat.is_numbered(logger)
    assert logger.version == 0
    assert compat.is_numbered(logger)
    compat.number(logger, 5)
    assert logger.version == 5
    assert logger.log_dir.endswith("version_5")
    assert compat.is_numbered(kind(tmp_path, name="", version=3))


class _Shorter(DPOModule):
    pass


def test_hyper_parameters_say_which_class_to_build_and_from_what(tiny_model):
    named = configuration(_Shorter(LoRAPolicy(str(tiny_model), quantization="none"), IPOLoss(beta=0.3)))
    assert named[compat.INSTANTIATOR].endswith(instantiate_module.__name__)
    given = {name: value for name, value in named.items() if name != compat.INSTANTIATOR}
    built = instantiate_module(DPOModule, given)
    assert type(built) is _Shorter
    assert built.loss == IPOLoss(beta=0.3)


def test_a_loggers_hyper_parameters_are_builtins(tiny_model):
    initial = DPOModule(LoRAPolicy(str(tiny_model)), IPOLoss(beta=0.3)).hparams_initial
    assert initial["loss"] == to_builtins(IPOLoss(beta=0.3))
    assert initial["policy"]["init_args"]["model"] == str(tiny_model)


@pytest.mark.parametrize("name", ["_prepare_subcommand_parser", "_parse_ckpt_path"])
def test_lightning_calls_the_private_methods_that_are_overridden(name):
    theirs, ours = getattr(LightningCLI, name), vars(LitDPOCLI)[name]
    assert list(inspect.signature(theirs).parameters) == list(inspect.signature(ours).parameters)
    assert f"self.{name}(" in inspect.getsource(LightningCLI)


def test_names_that_are_found_by_string_are_there():
    """Public ones, which may be absent, so that nothing would say if they were called something else."""
    scaler = torch.amp.GradScaler("cpu")
    assert MixedPrecision("16-mixed", "cpu", scaler).scaler is scaler
    base = tiny.model()
    enable_checkpointing(base)
    assert any(getattr(layer, "gradient_checkpointing", False) for layer in base.model.modules())


# ---- jsonargparse ----


def test_another_class_in_a_configuration_asks_us_what_it_takes_over():
    seen = []
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--loss", type=PreferenceLoss, default={"class_path": "lit_dpo.losses.DPOLoss"})
    with compat.on_another_class(
        lambda parser, before, after: seen.append((before["class_path"], after["class_path"]))
    ):
        parser.parse_args(["--loss=IPOLoss", "--loss=SimPOLoss"])
    paths = {(before.rpartition(".")[2], after.rpartition(".")[2]) for before, after in seen}
    assert ("IPOLoss", "SimPOLoss") in paths
    seen.clear()
    parser.parse_args(["--loss=IPOLoss", "--loss=SimPOLoss"])
    assert not seen
    assert issubclass(Parser, jsonargparse.ArgumentParser)


# ---- datasets ----


def test_rows_without_a_file_are_known_by_what_they_hold():
    from datasets.fingerprint import generate_fingerprint

    one, same, other = (Dataset.from_list([{"a": value}]) for value in ("x", "x", "y"))
    assert generate_fingerprint(one) == generate_fingerprint(same) != generate_fingerprint(other)
    assert generate_fingerprint(other.map(lambda row: {"a": "x"})) != generate_fingerprint(other)
    both = Dataset.from_list([{"a": "x"}, {"a": "y"}])
    assert generate_fingerprint(both.select([0])) != generate_fingerprint(both.select([1]))
