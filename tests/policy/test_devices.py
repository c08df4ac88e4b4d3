"""What is chosen for a GPU that nobody chose, and what is said of it. The card's own facts are put in its place."""

from __future__ import annotations

import re
import types

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data._utils.pin_memory import pin_memory

import tiny
from lit_dpo import LoRAPolicy
from lit_dpo.cli import main
from lit_dpo.data.batch import CompletionBatch
from lit_dpo.policy.devices import remark
from training import data

AMPERE, TURING = (8, 0), (7, 5)


@pytest.fixture
def cards(monkeypatch):
    """Lets torch say that there are CUDA devices of these compute capabilities."""

    def there_are(*capabilities):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        number = lambda device: device if isinstance(device, int) else device.index or 0  # noqa: E731
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: capabilities[number(device)])

    return there_are


def _precision(capsys, *arguments):
    with tiny.records("lightning.pytorch.utilities.rank_zero") as lines, pytest.raises(SystemExit):
        main(["fit", "--model.policy.model=x", *arguments, "--print_config"])
    said = [line.getMessage() for line in lines if "by the GPU" in line.getMessage()]
    return yaml.safe_load(capsys.readouterr().out)["trainer"]["precision"], len(said)


@pytest.mark.parametrize(
    ("capabilities", "arguments", "precision"),
    [
        ([AMPERE], [], "bf16-mixed"),
        ([(12, 0)], ["--trainer.accelerator=gpu"], "bf16-mixed"),
        ([AMPERE], ["--trainer.accelerator=cuda", "--trainer.strategy=ddp"], "bf16-mixed"),
        ([TURING], [], "16-mixed"),
        ([AMPERE, TURING], ["--trainer.devices=2"], "16-mixed"),
        ([], [], None),
        ([AMPERE], ["--trainer.accelerator=cpu"], None),
        ([AMPERE], ["--trainer.strategy=ddp_fork"], None),
    ],
)
def test_the_precision_is_the_gpus_and_said_once(capabilities, arguments, precision, cards, capsys):
    cards(*capabilities)
    assert _precision(capsys, *arguments) == (precision, int(precision is not None))


@pytest.mark.parametrize("typed", ["32-true", "16-mixed", "bf16-true", None])
def test_a_precision_that_was_typed_holds(typed, cards, capsys, tmp_path):
    """On the command line, in a file, in the fragment of a trainer; `null` too, which is Lightning's 32-true."""
    cards(AMPERE)
    word = "null" if typed is None else typed
    (tmp_path / "run.yaml").write_text(f"trainer:\n  precision: {word}\n")
    (tmp_path / "trainer.yaml").write_text(f"precision: {word}\n")
    ways = (
        [f"--trainer.precision={word}"],
        ["--config", str(tmp_path / "run.yaml")],
        [f"--trainer={tmp_path / 'trainer.yaml'}"],
        ["--config", str(tmp_path / "run.yaml"), "--trainer.max_epochs=1"],
    )
    for arguments in ways if typed in ("32-true", None) else ways[:1]:
        assert _precision(capsys, *arguments) == (typed, 0)


def test_a_plugin_that_may_be_a_precision_is_not_contradicted(cards, capsys):
    cards(AMPERE)
    plugin = "lightning.pytorch.plugins.MixedPrecision"
    typed = [f"--trainer.plugins={plugin}", "--trainer.plugins.precision=16-mixed", "--trainer.plugins.device=cpu"]
    assert _precision(capsys, *typed) == (None, 0)


def test_the_saved_configuration_says_what_was_chosen_and_gives_the_same_run(
    tiny_model, pairs_file, tmp_path, capsys, monkeypatch
):
    """Without the GPU that chose it too, and a run goes on by it."""
    monkeypatch.chdir(tmp_path)
    typed = ["fit", f"--model.policy.model={tiny_model}", "--model.policy.quantization=none", "--data.batch_size=4",
             f"--data.train={pairs_file}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
             "--model.lr_scheduler=constant", "--model.policy.target_modules=[q_proj]",
             "--trainer.callbacks=[training.Unestimated]"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("lit_dpo.lightning_cli.default_precision", lambda *_: "bf16-mixed")
        main([*typed, "--trainer.max_steps=3"])
        (checkpoint,) = tmp_path.glob("runs/version_0/checkpoints/*step=3.ckpt")
        main([*typed, "--trainer.max_steps=4", "--ckpt_path", str(checkpoint)])
    assert "'training.precision'" not in capsys.readouterr().err
    assert torch.load(checkpoint, weights_only=True)["lit_dpo"]["training"]["precision"] == "bf16-mixed"
    saved = tmp_path / "runs" / "version_0" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["trainer"]["precision"] == "bf16-mixed"
    main(["fit", "--config", str(saved)])
    main(["fit", "--config", str(saved), "--trainer.max_steps=4", "--ckpt_path", str(checkpoint)])
    first, resumed, again, other = (
        (tmp_path / "runs" / f"version_{number}" / "adapter" / "adapter_model.safetensors").read_bytes()
        for number in range(4)
    )
    assert first == again
    assert resumed == other != first


def test_auto_is_what_the_card_computes_in(cards):
    policy, first, second = LoRAPolicy("x"), torch.device("cuda"), torch.device("cuda", 1)
    assert policy.torch_dtype(first) == torch.bfloat16, "a card that is not here, of a plan"
    cards(AMPERE, TURING)
    assert policy.torch_dtype(first) == torch.bfloat16
    assert policy.torch_dtype(second) == torch.float16
    assert policy.torch_dtype(second, torch.bfloat16) == torch.bfloat16, "as a trainer's precision says"
    assert LoRAPolicy("x", dtype="bfloat16").torch_dtype(second) == torch.bfloat16
    assert policy.torch_dtype(torch.device("cpu")) == torch.float32
    assert policy.torch_dtype(torch.device("mps")) == torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "precision", "dtype", "setting", "said"),
    [
        (AMPERE, "32-true", torch.float32, "highest", "all products are float32 and run exact"),
        (AMPERE, "32-true", torch.bfloat16, "highest", "the adapters' products .* is 'highest'; 'high' would run them"),
        (AMPERE, "bf16-true", torch.bfloat16, "high", r"run in TF32, 10 bits of mantissa .* is 'high'\)"),
        (TURING, "32-true", torch.float16, "highest", "small gradients may vanish. `16-mixed` scales them"),
        (TURING, "32-true", torch.float32, "highest", None),
        (AMPERE, "bf16-mixed", torch.bfloat16, "highest", None),
        (AMPERE, "bf16-mixed", torch.float32, "highest", None),
    ],
)
def test_float32_products_are_said_where_there_are_any(capability, precision, dtype, setting, said, cards, monkeypatch):
    cards(capability)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting)
    line = remark(torch.device("cuda"), precision, dtype)
    assert (line is None) == (said is None)
    if said is not None:
        assert re.search(said, line), line
    assert remark(torch.device("cpu"), precision, dtype) is None


# ---- batches ----


class _Noted(torch.Tensor):
    """A tensor that notes how it was pinned and moved."""

    pinned = False

    def pin_memory(self, *_):
        again = self.clone().as_subclass(_Noted)
        again.pinned = True
        return again

    def to(self, *given, **named):
        moved = super().to(*given, **named)
        moved.moved = named
        return moved


def _noted():
    whole, columns = tiny.batch()._asdict(), {"weight": torch.ones(3), "difficulty": torch.ones(3)}
    del whole["columns"]
    noted = {name: one.as_subclass(_Noted) for name, one in whole.items()}
    return CompletionBatch(**noted, columns={name: one.as_subclass(_Noted) for name, one in columns.items()})


def _fields(batch):
    whole = batch._asdict()
    return whole | whole.pop("columns")


def test_a_loaders_pinning_reaches_every_tensor_of_a_batch():
    """`DataLoader`'s own function, which knows NamedTuples and skips dataclasses."""
    pinned = pin_memory(_noted())
    assert type(pinned) is CompletionBatch
    assert all(one.pinned for one in _fields(pinned).values())


def test_lightning_moves_tokens_without_waiting_and_leaves_lengths():
    moved = move_data_to_device(_noted(), torch.device("meta"))
    assert type(moved) is CompletionBatch
    for name, field in _fields(moved).items():
        there = name in ("input_ids", "position_ids", "weight", "difficulty")
        assert field.device.type == ("meta" if there else "cpu"), name
        if there:
            assert field.moved == {"non_blocking": True}, name


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_batches_are_pinned_for_the_trainers_device_not_for_one_that_is_there(
    device, pinned, cards, tiny_model, pairs_file
):
    cards(AMPERE)
    module = data(pairs_file, val=str(pairs_file), tokenizer=str(tiny_model))
    module.setup("fit")
    assert not module.train_dataloader().pin_memory, "without a trainer"
    module.trainer = types.SimpleNamespace(
        strategy=SingleDeviceStrategy(torch.device(device)),
        lightning_module=None,
        global_rank=0,
        world_size=1,
        overfit_batches=0,
    )
    loaders = (module.train_dataloader(), module.val_dataloader())
    assert [loader.pin_memory for loader in loaders] == [pinned] * 2


@pytest.mark.gpu
def test_a_batch_on_its_way_to_a_device_is_pinned(gpu, tiny_model, pairs_file):
    if gpu.type == "cpu":
        pytest.skip("nothing is pinned for a CPU")
    module = data(pairs_file, tokenizer=str(tiny_model))
    module.trainer = pl.Trainer(accelerator="gpu", devices=1, logger=False)
    module.setup("fit")
    batch = next(iter(module._eval_loader("train")))
    tensors = [field for field in batch if torch.is_tensor(field)] + list(batch.columns.values())
    assert len(tensors) >= 9
    assert all(tensor.is_pinned() for tensor in tensors)
    assert move_data_to_device(batch, gpu).input_ids.is_cuda
