"""Mixtures: shares that hold at every point of an epoch, and every row at least once."""

from __future__ import annotations

import logging
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from lightning.pytorch.callbacks import ModelCheckpoint
from recorder import Recorder, trainer

from lit_dpo.data.budget import BudgetSampler
from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.data.formats import Preference
from lit_dpo.data.mixture import Mixture, interleave, weighted_sources
from lit_dpo.data.sampler import PromptSampler
from lit_dpo.errors import DataError, ResumeError

SIZES, SHARES = (100, 30, 7), (0.6, 0.3, 0.1)
OF = np.repeat(np.arange(3), SIZES)
LENGTHS = np.random.default_rng(0).integers(5, 60, len(OF))


@pytest.mark.parametrize("count", range(1, 8))
def test_each_source_is_within_one_of_its_share_at_every_point(count: int) -> None:
    random = np.random.default_rng(count)
    for _ in range(5):
        shares = random.dirichlet(np.full(count, 0.5)) + 1e-3
        shares /= shares.sum()
        found = np.fromiter(islice(interleave(shares.tolist()), 2000), int)
        counts = np.stack([(found == number).cumsum() for number in range(count)])
        bound = 1 - 1 / (2 * count - 2) if count > 1 else 0
        assert np.abs(counts - shares[:, None] * np.arange(1, 2001)).max() <= bound + 1e-9


# --- samplers -------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "sorted": {"batch_size": 4},
    "unsorted": {"batch_size": 4, "bucket": 0},
    "in short runs": {"batch_size": 4, "bucket": 3},
    "tokens": {"max_tokens": 130},
}


def samplers(kind: str, ranks: int, epoch: int = 0, **options: Any) -> list[PromptSampler]:
    given = {**KINDS[kind], **options}
    mixture = Mixture(OF, SHARES, 1 if "max_tokens" in given else given["batch_size"] * ranks)
    made = BudgetSampler if "max_tokens" in given else PromptSampler
    found = [made(LENGTHS, **given, rank=rank, num_replicas=ranks, mixture=mixture) for rank in range(ranks)]
    for sampler in found:
        sampler.set_epoch(epoch)
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_shares_hold_after_every_step_of_all_ranks(kind: str, ranks: int) -> None:
    for epoch in range(3):
        passes = [list(sampler) for sampler in samplers(kind, ranks, epoch)]
        assert len({len(batches) for batches in passes}) == 1
        assert all(batch for batches in passes for batch in batches)
        steps = [list(chain(*step)) for step in zip(*passes, strict=True)]
        assert {*chain(*steps)} == {*range(len(OF))}
        counts = np.cumsum([np.bincount(OF[step], minlength=3) for step in steps], axis=0)
        owed = counts.sum(axis=1, keepdims=True) * np.array(SHARES)
        assert np.abs(counts - owed).max() <= 0.75 + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_position_gives_the_remaining_batches_of_a_mixture(kind: str) -> None:
    (straight,) = samplers(kind, 1, 3)
    batches = list(straight)
    for start in (0, 1, 7, len(batches)):
        (resumed,) = samplers(kind, 1)
        resumed.load_position(3, start)
        assert list(resumed) == batches[start:]
        assert len(resumed) == len(batches)


def test_an_epoch_is_as_short_as_it_can_be_and_repeats_in_fresh_permutations() -> None:
    mixture = Mixture(OF, SHARES)
    assert (mixture.size, mixture.times[0]) == (166, 1.0)
    (first, second) = (mixture.permutation(np.random.default_rng(seed)) for seed in range(2))
    assert sorted(first[OF[first] == 0]) == [*range(100)]
    small = first[OF[first] == 2]
    assert sorted(small[:7]) == sorted(small[7:14]) == [*range(130, 137)]
    assert small[:7].tolist() != small[7:14].tolist()
    assert first.tolist() != second.tolist()


def test_batches_of_a_mixture_hold_rows_of_similar_length_of_each_source() -> None:
    def spread(kind: str) -> float:
        (sampler,) = samplers(kind, 1, batch_size=12)
        return float(np.mean([np.ptp(LENGTHS[[row for row in rows if OF[row] == 0]]) for rows in sampler]))

    assert spread("sorted") < spread("unsorted") / 3
    (sampler,) = samplers("sorted", 1, batch_size=12)
    first = [LENGTHS[rows].mean() for rows in sampler]
    assert first != sorted(first)  # the batches themselves are in no order


# --- data modules ---------------------------------------------------------------------------------------------------


def rows(count: int, start: int = 0) -> list[dict]:
    return [
        {"prompt": f"question {i}", "chosen": " yes" * (i % 5 + 1), "rejected": " no"}
        for i in range(start, start + count)
    ]


@pytest.fixture
def data(jsonl, tokenizer_folder: str):
    """`data(**options)`: a mixture of 20 and 6 pairs, of two layouts, two to one."""
    other = [{"question": f"asked {i}", "response_j": " a" * (i + 1), "response_k": " b"} for i in range(6)]
    train = {jsonl("a.jsonl", rows(20)): 2, jsonl("b.jsonl", other): 1}
    return lambda **options: PreferenceDataModule(
        **{"train": train, "tokenizer": tokenizer_folder, "batch_size": 3, "seed": 3, **options}
    )


def seen(data: PreferenceDataModule, **options: Any) -> list[list[int]]:
    module = Recorder()
    trainer(max_epochs=1, **options).fit(module, data)
    return module.seen


def test_every_batch_has_its_part_of_each_source_whose_layouts_may_differ(data, caplog) -> None:
    module = data()
    with caplog.at_level(logging.INFO):
        found = seen(module)
    assert all(sum(row >= 20 for row in batch) == 1 and len(batch) == 3 for batch in found)
    assert {*chain(*found)} == {*range(26)}
    assert module.preference("train", 3) == Preference("question 3", " yes" * 4, " no")
    assert module.preference("train", 21).chosen == [{"role": "assistant", "content": " a a"}]
    lines = [record.getMessage() for record in caplog.records]
    assert "--data.format StackExchange" in caplog.text
    assert sum("train: an epoch of the mixture has 30 prompts" in line for line in lines) == 1


def test_lists_of_pairs_and_objects_are_mixtures_too(data, jsonl) -> None:
    held = Dataset.from_list(rows(20))
    found = seen(data(train=[(held, 0.8), (jsonl("c.jsonl", rows(4, 50)), 0.2)], batch_size=5))
    assert all(sum(row >= 20 for row in batch) == 1 for batch in found)


def test_a_mixture_with_a_part_held_out_mixes_the_rest(data) -> None:
    module = data(val_split=0.3)
    found = seen(module)
    held = {*module._tables["val"].rows.tolist()}
    assert {*chain(*found)} == {*range(26)} - held
    assert all(sum(row >= 20 for row in batch) == 1 for batch in found)


def test_a_resumed_mixture_goes_on(data, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=4, save_top_k=1)
    trainer(checkpoint, max_steps=5).fit(Recorder(), data())
    resumed = Recorder()
    trainer(max_epochs=1).fit(resumed, data(), ckpt_path=tmp_path / "x.ckpt")
    assert resumed.seen == seen(data())[4:]
    other = dict.fromkeys(data().sources["train"], 1.0)
    with pytest.raises(ResumeError, match="shares"):
        trainer().fit(Recorder(), data(train=other), ckpt_path=tmp_path / "x.ckpt")


def test_what_is_no_mixture_is_refused(data, jsonl) -> None:
    ranked = {"prompt": "q", "completions": [" a", " b"], "scores": [1, 2]}
    a, scored = jsonl("c.jsonl", rows(4)), jsonl("s.jsonl", [ranked])
    for weight in (0, -1, float("nan"), float("inf"), "half", True):
        with pytest.raises(DataError, match="finite weight > 0"):
            data(train={a: 1, scored: weight})
    for split in ("val", "test", "predict"):
        with pytest.raises(DataError, match=f"`{split}`.*a mixture is for `train` alone"):
            data(**{split: {a: 0.5, scored: 0.5}})
    with pytest.raises(ValueError, match="`group_by_prompt`"):
        data(group_by_prompt=4)
    with pytest.raises(DataError, match="same columns of numbers"):
        data(train={a: 1, scored: 1}).setup("fit")
    long = jsonl("long.jsonl", [{**row, "chosen": " yes" * 99} for row in rows(4)])
    with pytest.raises(DataError, match=r"no rows are left of .*long\.jsonl"):
        trainer().fit(Recorder(), data(train={a: 1, long: 1}, max_length=60))
    with pytest.raises(DataError, match=r"raise the share of .*c\.jsonl, which has 4"):
        trainer().fit(Recorder(), data(train={a: 1e-6, long: 1}))
    assert weighted_sources(DatasetDict({"train": Dataset.from_list(rows(2))})) is None
