"""What a user holds already, and Lightning's and PyTorch's own tools, work as they are."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.tuner import Tuner
from transformers import AutoModelForCausalLM

import tiny
from lit_dpo import DPOModule, LoRAPolicy, PreferenceDataModule
from lit_dpo.cli import main
from lit_dpo.errors import DataError, PolicyError, TrainingError
from training import Trace, adapter, data, module, trainer


@pytest.fixture
def rows(pairs_file):
    return [json.loads(line) for line in pairs_file.read_text().splitlines()]


def _stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


# ---- data ----


def _losses(model, root, **given):
    trace = Trace()
    trainer(root, callbacks=[trace]).fit(module(model), PreferenceDataModule(**given, batch_size=4))
    return trace


@pytest.mark.parametrize(
    "held",
    [
        lambda rows: rows,
        tuple,
        Dataset.from_list,
        _stream,
        lambda rows: DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:2])),
        lambda rows: (row for row in rows),
    ],
    ids=["list", "tuple", "Dataset", "IterableDataset", "DatasetDict", "generator"],
)
def test_rows_that_are_there_train_as_their_file_does(tiny_model, pairs_file, rows, tmp_path, held):
    theirs = _losses(tiny_model, tmp_path, train=held(rows))
    ours = _losses(tiny_model, tmp_path, train=str(pairs_file))
    assert theirs.rows == ours.rows
    assert theirs.losses == ours.losses


def test_a_dict_of_data_sets_has_a_split_for_each_stage(tiny_model, rows):
    given = DatasetDict(train=Dataset.from_list(rows), validation=Dataset.from_list(rows[:3]))
    source = PreferenceDataModule(train=given, val=given, tokenizer=str(tiny_model))
    source.setup("fit")
    assert source.columns.keys() == {"train", "val"}
    assert len(source.val_dataloader().dataset) == 3
    with pytest.raises(DataError, match=r"Expected a split test for `test` in .* but it has train, validation"):
        PreferenceDataModule(test=given, tokenizer=str(tiny_model)).setup("test")


def test_a_tokenizer_object_encodes_as_its_folder_does(tiny_model, rows):
    given = LoRAPolicy(str(tiny_model)).load_tokenizer()
    batches = []
    for tokenizer in (given, str(tiny_model)):
        source = PreferenceDataModule(train=rows, tokenizer=tokenizer)
        source.setup("fit")
        batches.append(next(iter(source.train_dataloader())).input_ids)
    assert torch.equal(*batches)
    assert PreferenceDataModule(train=rows, tokenizer=given).loaded_tokenizer is given


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}, "d"], "row 1 .from 0.: Expected a dictionary but got str"),
        ([], "Expected a file, a list of files, a hub id or rows but got"),
        (7, "Expected a file, a list of files, a hub id or rows but got a int"),
        ([{"prompt": "a", "chosen": "b"}], "`rejected` is missing"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": {"x": 1}}], "the rows do not make one table"),
    ],
)
def test_what_has_no_rows_is_refused_in_a_line(tiny_model, given, words):
    with pytest.raises(DataError, match=words) as stop:
        PreferenceDataModule(train=given, tokenizer=str(tiny_model)).setup("fit")
    assert len(str(stop.value)) < 400


# ---- learning rates ----


def _rates(model, file, root, steps=10, **given):
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    run = trainer(root, max_epochs=-1, max_steps=steps, callbacks=[Look()])
    run.fit(module(model, lr=1.0e-3, **given), data(file, batch_size=2))
    return [rate / 1.0e-3 for rate in seen]


def test_a_least_rate_is_what_is_left_at_the_end(tiny_model, pairs_file, tmp_path):
    linear = _rates(tiny_model, pairs_file, tmp_path, lr_scheduler="linear", min_lr_ratio=0.2, warmup_ratio=0.2)
    assert linear == pytest.approx([0, 0.5, *(0.2 + 0.8 * (8 - step) / 8 for step in range(8))])
    cosine = _rates(tiny_model, pairs_file, tmp_path, lr_scheduler="cosine", min_lr_ratio=0.2)
    assert cosine == pytest.approx([0.2 + 0.8 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)])


def test_wsd_warms_up_stays_and_falls(tiny_model, pairs_file, tmp_path):
    given = {"lr_scheduler": "wsd", "warmup_ratio": 0.2, "decay_ratio": 0.4, "min_lr_ratio": 0.2}
    found = _rates(tiny_model, pairs_file, tmp_path, **given)
    assert found == pytest.approx([0.2, 0.6, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4])


def test_a_scheduler_of_torch_is_taken_as_it_is(tiny_model, pairs_file, tmp_path):
    step = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    found = _rates(tiny_model, pairs_file, tmp_path, steps=5, lr_scheduler=step)
    assert found == pytest.approx([1, 1, 0.5, 0.5, 0.25])


def test_a_plateau_follows_its_measure(tiny_model, pairs_file, tmp_path):
    plateau = functools.partial(ReduceLROnPlateau, monitor="val/loss", mode="max", patience=0, factor=0.5)
    run = trainer(tmp_path, max_epochs=4)
    run.fit(module(tiny_model, lr_scheduler=plateau), data(pairs_file, val=str(pairs_file), batch_size=11))
    assert run.optimizers[0].param_groups[0]["lr"] < 1e-2
    silent = module(tiny_model, lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(TrainingError, match=r"`lightning.pytorch.cli.ReduceLROnPlateau` with `monitor`"):
        trainer(tmp_path).fit(silent, data(pairs_file))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lr_scheduler": "constant", "min_lr_ratio": 0.1}, "`min_lr_ratio` has no effect"),
        ({"lr_scheduler": "cosine", "decay_ratio": 0.1}, "`decay_ratio` has no effect"),
        ({"lr_scheduler": "wsd", "decay_ratio": 0.5, "warmup_ratio": 0.6}, r"`decay_ratio` in \(0, 1 - "),
        ({"lr_scheduler": "wsd", "min_lr_ratio": 1.0}, r"`min_lr_ratio` in \[0, 1\)"),
        ({"lr_scheduler": "cosin"}, "Expected `lr_scheduler` among linear, cosine, constant, wsd"),
        ({"lr_scheduler": torch.optim.lr_scheduler.StepLR, "warmup_ratio": 0.1}, "a scheduler of one's own"),
    ],
)
def test_parts_of_a_schedule_that_do_not_go_together_are_refused(tiny_model, given, words):
    with pytest.raises(PolicyError, match=words):
        module(tiny_model, **given)


def test_lightnings_tuner_finds_a_rate_and_leaves_the_run_as_it_was(tiny_model, pairs_file, tmp_path):
    dpo = module(tiny_model)
    run, pairs = trainer(tmp_path, max_epochs=4), data(pairs_file)
    found = Tuner(run).lr_find(dpo, datamodule=pairs, num_training=20, min_lr=1e-5, max_lr=1e-1, update_attr=True)
    assert len(found.results["lr"]) == 20
    assert dpo.lr == found.suggestion()
    dpo.lr = 1e-3
    run.fit(dpo, datamodule=pairs)
    alone = module(tiny_model, lr=1e-3)
    trainer(tmp_path, max_epochs=4).fit(alone, data(pairs_file))
    torch.testing.assert_close(adapter(dpo), adapter(alone), rtol=0, atol=0)


# ---- an optimizer with a mode ----


class _Averaged(torch.optim.SGD):
    """Like schedule-free optimizers: a step in the wrong mode is an error, and evaluation has weights of its own."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.param_groups[0]["train_mode"] = False

    @torch.no_grad()
    def _shift(self, sign, mode):
        for group in self.param_groups:
            if group["train_mode"] != mode:
                for p in group["params"]:
                    p.add_(sign * 0.25)
            group["train_mode"] = mode

    def train(self):
        self._shift(1, True)

    def eval(self):
        self._shift(-1, False)

    def step(self, closure=None):
        loss = closure()
        assert self.param_groups[0]["train_mode"], "not in train mode"
        return super().step(lambda: loss)


def test_an_optimizer_that_has_a_mode_trains_and_is_evaluated_in_the_right_one(tiny_model, pairs_file, tmp_path):
    seen = []

    class Look(Callback):
        def on_validation_start(self, trainer, pl_module):
            seen.append(trainer.optimizers[0].param_groups[0]["train_mode"])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(trainer.optimizers[0].param_groups[0]["train_mode"])

    run = trainer(tmp_path, callbacks=[Look()], num_sanity_val_steps=0)
    run.fit(module(tiny_model, optimizer=functools.partial(_Averaged, lr=1e-3)), data(pairs_file, val=str(pairs_file)))
    assert seen
    assert not any(seen)


# ---- processes, commands ----


def test_the_default_module_can_be_sent_to_another_process(tiny_model):
    import pickle

    made = DPOModule(LoRAPolicy(str(tiny_model)))
    again = pickle.loads(pickle.dumps(made))
    assert again.policy == made.policy
    (group,) = again.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-5, 0.0)


OWN_DATA = """
import lightning.pytorch as pl
from torch.utils.data import DataLoader
from lit_dpo.data.batch import EncodedPrompt, collate

class Made(pl.LightningDataModule):
    def __init__(self, count: int = 3):
        super().__init__()
        self.count = count

    def train_dataloader(self):
        pairs = [EncodedPrompt([1, 5 + n], [[6, 7], [8]]) for n in range(self.count)]
        return DataLoader(pairs, batch_size=2, collate_fn=collate)
"""


def test_any_data_module_of_lightning_trains_by_the_command(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(OWN_DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = [f"--model.policy.model={tiny_model}", "--model.policy.quantization=none", "--model.policy.r=2"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
    with tiny.records("lightning.pytorch.utilities.rank_zero") as lines:
        main(["fit", *model, *quiet, "--data=own_data.Made", "--data.count=5"])
    assert any(line.getMessage().startswith("3 steps in") for line in lines)
    assert (tmp_path / "runs" / "version_0" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_in_a_spawned_process_gives_its_adapter_back(tiny_model, pairs_file, tmp_path):
    """From an adapter, so that nothing is drawn in either process."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tiny.lora(base, r=4).save_pretrained(tmp_path / "adapter")
    given = {"policy": {"adapter_path": str(tmp_path / "adapter"), "adapter_base": "any"}}
    trainer(tmp_path / "alone", max_steps=2).fit(alone := module(tiny_model, **given), data(pairs_file))
    run = trainer(tmp_path / "spawned", max_steps=2, devices=1, strategy="ddp_spawn")
    run.fit(spawned := module(tiny_model, **given), data(pairs_file))
    torch.testing.assert_close(adapter(spawned), adapter(alone), rtol=0, atol=1e-6)
