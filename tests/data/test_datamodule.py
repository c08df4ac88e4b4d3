from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from recorder import Recorder, trainer

from lit_dpo.data.batch import CompletionBatch
from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.data.formats import Preference, Triples
from lit_dpo.data.loader import PromptDataset
from lit_dpo.data.sampler import Uncounted
from lit_dpo.errors import DataError, ResumeError


def rows(count: int, start: int = 0) -> list[dict]:
    return [
        {"prompt": f"question {i}", "chosen": " yes" * (i % 5 + 1), "rejected": " no"}
        for i in range(start, start + count)
    ]


@pytest.fixture
def data(jsonl, tokenizer_folder: str):
    """`data(**options)`: a data module of 22 pairs in 6 batches."""
    path = jsonl("train.jsonl", rows(22))
    return lambda **options: PreferenceDataModule(
        **{"train": path, "tokenizer": tokenizer_folder, "batch_size": 4, "seed": 3, **options}
    )


# --- what is found in the data --------------------------------------------------------------------------------------


def stop(data: PreferenceDataModule) -> str:
    with pytest.raises(DataError) as error:
        data.setup("fit")
    return str(error.value)


def test_every_row_is_trained_on_once_per_epoch(data) -> None:
    module = Recorder()
    trainer().fit(module, data())
    for epoch in (module.seen[:6], module.seen[6:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(22))
    assert module.seen[:6] != module.seen[6:]


def test_a_batch_is_what_the_files_say(data, jsonl, chat_tokenizer) -> None:
    module = data(train=[jsonl("a.jsonl", rows(3)), jsonl("b.jsonl", rows(3, 10))])
    module.setup("fit")
    table = module._tables["train"]
    batch = table.batch([4, 1])
    assert batch.indices.tolist() == [4, 1]
    expected = [module.preference("train", row) for row in (4, 1)]
    assert [preference.prompt for preference in expected] == ["question 11", "question 1"]
    text = "".join(f"{p.prompt}{p.chosen}<eos>{p.rejected}<eos>" for p in expected)
    assert chat_tokenizer.decode(batch.input_ids[0]) == text
    assert table.lengths[[4, 1]].sum() == batch.input_ids.shape[1]


def test_a_bad_row_stops_before_training_with_file_and_row(data, jsonl) -> None:
    path = jsonl("bad.jsonl", [*rows(3), {"prompt": "q", "chosen": "", "rejected": "b"}])
    message = stop(data(train=[jsonl("good.jsonl", rows(3)), path]))
    assert f"{path}, row 3 (from 0): " in message
    assert "`chosen`" in message
    module = Recorder()
    with pytest.raises(DataError, match="row 3"):
        trainer().fit(module, data(train=path))
    assert module.seen == []


def test_types_that_differ_between_rows_are_named(data, jsonl) -> None:
    mixed = [*rows(2), {"prompt": "q", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}]
    message = stop(data(train=jsonl("mixed.jsonl", mixed)))
    assert "row 2" in message
    assert "`chosen` is messages" in message


def test_a_pair_too_long_is_named_where_that_is_an_error(data, jsonl) -> None:
    message = stop(data(train=jsonl("a.jsonl", rows(5)), max_length=12, truncation="error"))
    assert "a.jsonl, row " in message
    assert "max_length=12" in message
    assert "tokens" in message


def test_dropped_pairs_are_counted_in_one_line_and_rows_keep_their_numbers(data, caplog, jsonl) -> None:
    long = [{**row, "chosen": " yes" * 90} if i in (0, 2) else row for i, row in enumerate(rows(8))]
    path = jsonl("long.jsonl", long)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        module = data(train=path, max_length=60)
        with caplog.at_level(logging.INFO):
            module.setup("fit")
        lines = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
        assert lines == ["train: 2 of 8 pairs dropped: longer than max_length=60 (truncation=drop)"]
        assert module._tables["train"].rows.tolist() == [1, 3, 4, 5, 6, 7]
        assert module._tables["train"].batch([2, 0]).indices.tolist() == [4, 1]
        assert module.preference("train", 3) == Preference("question 3", " yes" * 4, " no")


def test_nothing_left_is_an_error(data) -> None:
    message = stop(data(max_length=2))
    assert "no pairs are left" in message
    assert "22 of 22" in message


def test_equal_answers_and_leaking_prompts_are_said_once(data, caplog, jsonl) -> None:
    same = [*rows(2), {"prompt": "q", "chosen": "a", "rejected": "a"}]
    with caplog.at_level(logging.WARNING):
        trainer(max_steps=1).fit(Recorder(), data(train=jsonl("same.jsonl", same), val=jsonl("val.jsonl", rows(3, 1))))
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("lit_dpo")]
    assert len(messages) == 2
    assert messages[0].startswith("train: 1 of 3 pairs have two equal completions")
    assert messages[1].startswith("val: 1 of 3 pairs have a prompt that is in train")


def test_missing_sources_and_tokenizers_are_named(data) -> None:
    assert "--data.train" in stop(data(train=None))
    assert "cannot be loaded" in stop(data(tokenizer="/nowhere/at/all"))
    with pytest.raises(DataError, match="`tokenizer`"):
        data(tokenizer=None).setup("fit")


def test_the_tokenizer_is_the_policy_s(data, chat_tokenizer) -> None:
    class Policy:
        def load_tokenizer(self):
            return chat_tokenizer

    module = Recorder()
    module.policy = Policy()
    trainer(max_steps=1).fit(module, data(tokenizer=None))
    assert len(module.seen) == 1


def test_a_changed_option_encodes_anew(data) -> None:
    def lengths(**options) -> list[int]:
        module = data(**options)
        module.setup("fit")
        return module._tables["train"].lengths.tolist()

    assert lengths() == lengths()
    cut = lengths(max_length=5, max_prompt_length=3, truncation="truncate_both")
    assert max(cut) <= 7
    swapped = Triples(chosen="rejected", rejected="chosen")
    module = data(format=swapped)
    module.setup("fit")
    assert module.preference("train", 1).chosen == " no"
    batch = module._tables["train"].batch([4])
    assert batch.chosen_lengths < batch.rejected_lengths


@dataclass(frozen=True)
class Repeated(Triples):
    times: int = 1

    def read(self, row) -> Preference:
        preference = super().read(row)
        return preference._replace(prompt=preference.prompt * self.times)


def test_a_changed_format_option_encodes_anew(data) -> None:
    once, twice = data(format=Repeated()), data(format=Repeated(times=2))
    once.setup("fit")
    twice.setup("fit")
    assert (twice._tables["train"].lengths > once._tables["train"].lengths).all()


# --- splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_held_out_prompts_are_not_trained_on(data, jsonl, fraction: float) -> None:
    doubled = rows(20) + rows(20)
    module = data(train=jsonl("doubled.jsonl", doubled), val_split=fraction)
    module.setup("fit")
    train, val = ([doubled[row]["prompt"] for row in module._tables[split].rows] for split in ("train", "val"))
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(row["prompt"] for row in doubled)
    assert len(set(val)) == min(max(1, round(fraction * 20)), 19)


def test_without_validation_data_there_is_no_validation(data) -> None:
    module = Recorder()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is zero.*")
        trainer().fit(module, data())
    assert module.validated == []


def test_evaluation_sees_the_rows_in_order(data, jsonl) -> None:
    module = Recorder()
    trainer().validate(module, data(val=jsonl("val.jsonl", rows(9, 50)), eval_batch_size=2), verbose=False)
    assert module.validated == list(range(9))


@pytest.mark.parametrize("names", [["predict", "test", "val"], ["test", "val"], ["val"]])
def test_predict_takes_the_first_source_there_is(data, jsonl, caplog, names: list[str]) -> None:
    sources = {name: jsonl(f"{name}.jsonl", rows(len(name), 100)) for name in names}
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        predicted = trainer().predict(Recorder(), data(**sources))
    assert [row for batch in predicted for row in batch] == list(range(len(names[0])))
    assert (f"those of `{names[0]}` are used" in caplog.text) == (names[0] != "predict")


def test_predict_without_data_is_an_error(data) -> None:
    with pytest.raises(DataError, match=r"--data\.predict"):
        trainer().predict(Recorder(), data())


def test_sample_prompts_are_different_prompts(data, jsonl, chat_tokenizer) -> None:
    module = data(train=jsonl("a.jsonl", rows(2) + rows(3)))
    module.setup("fit")
    found = module.prompts("train", 3)
    assert [row for row, *_ in found] == [0, 1, 4]
    assert [chat_tokenizer.decode(ids) for _, ids, _ in found] == [preference.prompt for *_, preference in found]


def test_a_dataset_object_stays_out_of_checkpoints(data, tmp_path: Path) -> None:
    run = trainer(max_steps=1)
    run.fit(Recorder(), data(train=Dataset.from_list(rows(4))))
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert saved["PreferenceDataModule"] == {
        "epoch": 1,
        "batches": 0,
        "pairs": 4,
        "batch_size": 4,
        "max_tokens": None,
        "ranks": 1,
        "seed": 3,
    }
    assert not any("datamodule" in key for key in saved)


def test_only_our_steps_get_batches_that_compare_nothing(data) -> None:
    """A rank without a share of a batch runs one of another's rows; a step of one's own may take a mean over it."""
    module = data()
    module.setup("fit")
    table = module._tables["train"]
    assert module._dataset(table, "training_step").counts_all
    assert PromptDataset(table, counts_all=True)[Uncounted([3])].size == 1
    nothing = PromptDataset(table)[Uncounted([3])]
    assert nothing.size == 0
    assert len(nothing.completion_lengths) == 1
    assert not module._dataset(table, None).counts_all, "nothing is predicted twice"


def test_a_token_budget_decides_the_batches_in_training_and_outside(data, jsonl) -> None:
    module, pairs = Recorder(), data(batch_size=None, max_tokens=90, val=jsonl("val.jsonl", rows(22, 50)))
    run = trainer(max_epochs=3, accumulate_grad_batches=2)
    run.fit(module, pairs)
    per_epoch = len(module.seen) // 3
    assert run.estimated_stepping_batches == run.global_step == 3 * -(-per_epoch // 2)
    lengths = pairs._tables["train"].lengths
    assert len({len(batch) for batch in module.seen}) > 1
    assert all(lengths[batch].sum() <= 90 for batch in module.seen)
    for epoch in range(3):
        batches = module.seen[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(row for batch in batches for row in batch) == list(range(22))
    assert module.validated == list(range(22)) * 3


def test_a_batch_size_caps_the_pairs_of_a_budget(data, jsonl) -> None:
    module, pairs = Recorder(), data(batch_size=3, eval_batch_size=2, max_tokens=90, val=jsonl("val.jsonl", rows(22)))
    trainer(max_epochs=1).fit(module, pairs)
    assert max(len(batch) for batch in module.seen) == 3
    assert max(batch.size for batch in pairs.val_dataloader()) == 2


def test_without_a_budget_a_batch_has_eight_pairs(data) -> None:
    assert (data(batch_size=None).batch_size, data(batch_size=None, max_tokens=90).batch_size) == (8, None)


def test_a_pair_over_the_budget_stops_before_training_with_the_remedy(data, jsonl) -> None:
    long = [{**row, "chosen": " yes" * 90} if i in (0, 2) else row for i, row in enumerate(rows(8))]
    message = stop(data(train=jsonl("long.jsonl", long), max_tokens=90))
    assert "train: Expected pairs of up to `max_tokens`=90 tokens" in message
    assert "2 of 8 are longer" in message
    assert "--data.max_length" in message
    with pytest.raises(ValueError, match="`max_tokens` >= 1"):
        data(max_tokens=0)


@pytest.mark.parametrize("options", [{}, {"batch_size": None, "max_tokens": 90}], ids=["pairs", "per_token"])
@pytest.mark.parametrize("microbatch_tokens", [math.inf, 60])
def test_the_largest_microbatches_are_those_of_the_epoch(data, options: dict, microbatch_tokens: float) -> None:
    pairs = data(**options)
    pairs.setup("fit")
    loader = pairs.train_dataloader()
    (flat, padded), several = loader.largest_microbatches(microbatch_tokens)
    batches = list(loader)
    rows = [row for batch in batches for row in batch.cut(microbatch_tokens)]
    assert several == (len(rows) > len(batches)) == (microbatch_tokens == 60)
    assert sum(prompt + sum(completions) for prompt, completions in flat) == max(row.input_ids.shape[1] for row in rows)
    assert len(padded) * max(prompt + max(completions) for prompt, completions in padded) == max(
        row.size * int((row.prompt_lengths + torch.maximum(row.chosen_lengths, row.rejected_lengths)).max())
        for row in rows
    )
    assert any(row.prompt_lengths.tolist() == [prompt for prompt, _ in flat] for row in rows)


def test_overfit_batches_repeat_the_same_batches(data) -> None:
    module = Recorder()
    trainer(overfit_batches=2).fit(module, data())
    assert module.seen == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


# --- resuming -------------------------------------------------------------------------------------------------------

MOMENTS = {
    "steps": ({"every_n_train_steps": 1}, {}),
    "workers": ({"every_n_train_steps": 5}, {"num_workers": 1}),
    "accumulation": ({"every_n_train_steps": 1}, {"accumulate_grad_batches": 2}),
    "validation within the epoch": ({"save_on_train_epoch_end": False}, {"val_check_interval": 2}),
    "validation at its end": ({"save_on_train_epoch_end": False}, {}),
    "end of the epoch": ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {}),
    "end of the epoch, with workers": ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {"num_workers": 1}),
    "fewer batches": ({"every_n_train_steps": 1}, {"limit_train_batches": 4}),
    "a token budget": ({"every_n_train_steps": 1}, {"max_tokens": 90}),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_resumed_run_sees_the_remaining_batches(data, tmp_path: Path, jsonl, moment: str) -> None:
    when, options = MOMENTS[moment]
    options = dict(options)
    source = {"val": jsonl("val.jsonl", rows(3, 90)), "num_workers": options.pop("num_workers", 0)}
    source["max_tokens"] = options.pop("max_tokens", None)
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_top_k=-1, **when)
    straight = Recorder()
    trainer(checkpoint, **options).fit(straight, data(**source))
    files = sorted((tmp_path / "ckpt").iterdir())
    assert len(files) >= 2
    for file in files:
        state = torch.load(file, weights_only=True)["PreferenceDataModule"]
        done = state["epoch"] * options.get("limit_train_batches", len(straight.seen) // 2) + state["batches"]
        resumed = Recorder()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*resum.*")
            trainer(**options).fit(resumed, data(**source), ckpt_path=file)
        assert resumed.seen == straight.seen[done:], file.name
        steps = int(file.stem.split("step=")[1].split("-")[0])
        assert done == min(steps * options.get("accumulate_grad_batches", 1), len(straight.seen))


@pytest.mark.parametrize("when", [{"every_n_train_steps": 4}, {"every_n_epochs": 1}], ids=["step", "stop"])
def test_a_run_stopped_by_max_steps_goes_on_where_it_was(data, tmp_path: Path, when: dict) -> None:
    straight, resumed = Recorder(), Recorder()
    trainer(max_epochs=-1, max_steps=16).fit(straight, data())
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="last", enable_version_counter=False, **when)
    trainer(checkpoint, max_epochs=-1, max_steps=8).fit(Recorder(), data())
    trainer(max_epochs=-1, max_steps=16).fit(resumed, data(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.seen == straight.seen[8:]


def test_a_step_that_failed_is_done_again(data, tmp_path: Path) -> None:
    class Fails(Recorder):
        def training_step(self, batch: CompletionBatch, index: int) -> torch.Tensor:
            if len(self.seen) == 3:
                raise RuntimeError("out of luck")
            return super().training_step(batch, index)

    straight, resumed = Recorder(), Recorder()
    trainer().fit(straight, data())
    run = trainer()
    with pytest.raises(RuntimeError, match="out of luck"):
        run.fit(Fails(), data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    trainer().fit(resumed, data(), ckpt_path=tmp_path / "x.ckpt")
    assert resumed.seen == straight.seen[3:]


@pytest.mark.parametrize("step", [3, 6])
def test_other_batches_cannot_continue_an_epoch(data, tmp_path: Path, step: int) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, every_n_train_steps=3, filename="{step}")
    trainer(checkpoint, max_epochs=1).fit(Recorder(), data())
    with pytest.raises(ResumeError, match="batch_size 4 -> 2"):
        trainer().fit(Recorder(), data(batch_size=2), ckpt_path=tmp_path / f"step={step}.ckpt")
    with pytest.raises(ResumeError, match="max_tokens None -> 200"):
        trainer().fit(Recorder(), data(max_tokens=200), ckpt_path=tmp_path / f"step={step}.ckpt")


def test_other_batches_can_continue_after_an_epoch(data, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_epochs=1, save_on_train_epoch_end=True)
    trainer(checkpoint, max_epochs=1).fit(Recorder(), data())
    module, straight = Recorder(), Recorder()
    trainer().fit(module, data(batch_size=2), ckpt_path=tmp_path / "x.ckpt")
    trainer().fit(straight, data(batch_size=2))
    assert module.seen == straight.seen[11:]


def test_an_epoch_that_was_cut_short_is_not_taken_up_again(data, tmp_path: Path) -> None:
    class Stops(Recorder):
        def training_step(self, batch: CompletionBatch, index: int) -> torch.Tensor:
            self.trainer.should_stop = len(self.seen) == 3
            return super().training_step(batch, index)

    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_epochs=1, save_on_train_epoch_end=True)
    stopped, resumed, straight = Stops(), Recorder(), Recorder()
    trainer(checkpoint).fit(stopped, data())
    assert len(stopped.seen) == 4
    trainer().fit(straight, data())
    trainer().fit(resumed, data(), ckpt_path=tmp_path / "x.ckpt")
    assert resumed.seen == straight.seen[6:]


def test_validating_a_checkpoint_does_not_move_training(data, tmp_path: Path, jsonl) -> None:
    options = {"val": jsonl("val.jsonl", rows(3, 90))}
    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, filename="x", save_top_k=-1)
    trainer(checkpoint, max_steps=3).fit(Recorder(), data(**options))
    module, again = Recorder(), data(**options)
    trainer().validate(module, again, ckpt_path=tmp_path / "x.ckpt", verbose=False)
    straight = Recorder()
    trainer(max_steps=2).fit(straight, data(**options))
    trainer(max_steps=2).fit(module, again)
    assert module.seen == straight.seen
