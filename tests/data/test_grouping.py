"""Rows of one prompt as one example: the same comparisons, fewer tokens."""

from __future__ import annotations

import logging
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from lightning.pytorch.callbacks import ModelCheckpoint
from recorder import Recorder, trainer

from lit_dpo.data.batch import CompletionBatch
from lit_dpo.data.budget import BudgetSampler
from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.data.formats import Rankings, Triples
from lit_dpo.data.sampler import PromptSampler, Uncounted
from lit_dpo.data.table import PromptTable
from lit_dpo.errors import DataError, ResumeError

WORDS = [" yes", " no", " perhaps", " never", " a lot", " why"]


def rows(prompts: int = 6, seed: int = 0) -> list[dict]:
    """Several pairs of each prompt, in any order; among them a pair twice, both ways, and of equal completions."""
    random = np.random.default_rng(seed)
    found = []
    for prompt in range(prompts):
        for _ in range(prompt % 4 + 1):
            chosen, rejected = random.choice(len(WORDS), 2, replace=False)
            found.append({"prompt": f"question {prompt}", "chosen": WORDS[chosen], "rejected": WORDS[rejected]})
    found += [found[-1], {**found[-1], "chosen": found[-1]["rejected"], "rejected": found[-1]["chosen"]}]
    found.append({**found[2], "rejected": found[2]["chosen"]})
    order = random.permutation(len(found))
    return [{**found[place], "w": float(number)} for number, place in enumerate(order)]


@pytest.fixture
def data(jsonl, tokenizer_folder: str):
    path = jsonl("train.jsonl", rows())
    shared = {"train": path, "tokenizer": tokenizer_folder, "format": Triples(weight="w"), "batch_size": 2, "seed": 3}
    return lambda **options: PreferenceDataModule(**{**shared, **options})


def table(module: PreferenceDataModule, split: str = "train") -> PromptTable:
    module.setup("fit")
    return module._tables[split]


def contents(batch: CompletionBatch) -> Counter:
    """The comparisons of a batch: ids of the prompt and the two completions, columns, and row number."""
    found, flat, first, number = Counter(), batch.input_ids[0].tolist(), 0, 0
    for prompt, completions, comparisons in zip(
        batch.prompt_lengths.tolist(),
        batch.completions_per_prompt.tolist(),
        batch.comparisons_per_prompt.tolist(),
        strict=True,
    ):
        lengths = [prompt, *batch.completion_lengths[first : first + completions].tolist()]
        parts = [tuple(flat[end - length : end]) for length, end in zip(lengths, np.cumsum(lengths), strict=True)]
        flat, first = flat[sum(lengths) :], first + completions
        for chosen, rejected in batch.comparisons[number : number + comparisons].tolist():
            columns = tuple((name, float(column[number])) for name, column in batch.columns.items())
            found[parts[0], parts[1 + chosen], parts[1 + rejected], columns, int(batch.indices[number])] += 1
            number += 1
    assert not flat
    return found


def everything(of: PromptTable) -> Counter:
    return contents(of.batch(range(of.size)))


@pytest.mark.parametrize("cap", [2, 3, 4, 100])
def test_the_comparisons_are_those_of_the_rows_apart(data, cap: int) -> None:
    apart, merged = table(data()), table(data(group_by_prompt=cap))
    assert everything(merged) == everything(apart)
    assert merged.comparisons_count == apart.size == len(rows())
    assert merged.lengths.sum() < apart.lengths.sum()
    assert merged.completions_per_prompt.max() <= cap
    if cap == 100:
        assert merged.size == 6
        assert sorted(merged.completions_per_prompt) == sorted(
            len(
                {
                    row[side]
                    for row in rows()
                    for side in ("chosen", "rejected")
                    if row["prompt"] == f"question {number}"
                }
            )
            for number in range(6)
        )


def test_further_completions_go_into_a_further_example_in_the_order_of_the_file(data, jsonl) -> None:
    pairs = [(0, 1), (1, 2), (3, 4), (0, 4), (4, 5)]
    lines = [{"prompt": "q", "chosen": WORDS[a], "rejected": WORDS[b], "w": 1.0} for a, b in pairs]
    merged = table(data(train=jsonl("q.jsonl", lines), group_by_prompt=3))
    assert [merged.batch([index]).indices.tolist() for index in range(merged.size)] == [[0, 1], [2, 3], [4]]
    assert merged.completions_per_prompt.tolist() == [3, 3, 2]


def test_rows_of_all_files_are_merged_and_keep_their_numbers(data, jsonl) -> None:
    lines = rows()
    files = [jsonl("a.jsonl", lines[:7]), jsonl("b.jsonl", lines[7:])]
    module = data(train=files, group_by_prompt=9)
    merged = table(module)
    assert everything(merged) == everything(table(data(group_by_prompt=9)))
    for batch in (merged.batch([index]) for index in range(merged.size)):
        assert len({module.preference("train", row).prompt for row in batch.indices.tolist()}) == 1
    assert module.place("train", 8) == f"{files[1]}, row 1 (from 0)"


def test_prompts_with_equal_ids_are_the_same_prompt_whatever_the_rows_say(data, jsonl, tokenizer_folder) -> None:
    """The ids are compared, not the text: a template may leave something out."""
    lines = [
        {
            "prompt": [{"role": "user", "content": "q", "name": name}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": f"{name}"}],
        }
        for name in ("x", "y")
    ]
    merged = table(data(train=jsonl("m.jsonl", lines), format=Triples(), group_by_prompt=9))
    assert (merged.size, len(merged.completion_lengths), merged.comparisons_count) == (1, 3, 2)


def test_rankings_of_one_prompt_are_merged_too(data, jsonl) -> None:
    lines = [
        {"prompt": "q", "completions": WORDS[:3], "stars": [1, 2, 3]},
        {"prompt": "other", "completions": WORDS[:2], "stars": [1, 1]},
        {"prompt": "q", "completions": WORDS[2:5], "stars": [1, 2, 3]},
    ]
    options = {"train": jsonl("r.jsonl", lines), "format": Rankings(scores="stars")}
    apart, merged = table(data(**options)), table(data(**options, group_by_prompt=5))
    assert everything(merged) == everything(apart)
    assert (merged.size, merged.completions_per_prompt.tolist(), merged.dropped) == (
        1,
        [5],
        {"all completions tie": 1},
    )
    assert (apart.size, apart.completions_per_prompt.tolist()) == (2, [3, 3])
    # a row that has more than the cap by itself
    assert table(data(**options, group_by_prompt=2)).completions_per_prompt.tolist() == [3, 3]


# --- what is too long -----------------------------------------------------------------------------------------------


def lines_of(*pairs: tuple[int, int]) -> list[dict]:
    """Pairs of completions of so many words; each length is a completion."""
    return [
        {"prompt": "one two three four", "chosen": " a" * better, "rejected": " a" * worse, "w": 1.0}
        for better, worse in pairs
    ]


def test_a_group_is_cut_once_for_its_longest_completion(data, jsonl) -> None:
    path = jsonl("long.jsonl", lines_of((2, 4), (4, 8)))
    whole = table(data(train=path))
    limit = int(whole.side_lengths.max()) - 2
    options = {"train": path, "max_length": limit, "truncation": "truncate_prompt"}
    apart, merged = table(data(**options)), table(data(**options, group_by_prompt=9))
    assert apart.prompt_lengths.tolist() == [whole.prompt_lengths[0], whole.prompt_lengths[0] - 2]
    assert merged.prompt_lengths.tolist() == [whole.prompt_lengths[0] - 2]
    assert merged.side_lengths.tolist() == [limit]
    assert merged.comparisons_count == 2


def test_a_completion_that_is_too_long_leaves_the_others_compared(data, jsonl, caplog) -> None:
    path = jsonl("long.jsonl", lines_of((2, 4), (4, 90), (2, 3)))
    options = {"train": path, "max_length": 60}
    with caplog.at_level(logging.INFO):
        merged = table(data(**options, group_by_prompt=9))
    assert everything(merged) == everything(table(data(**options)))
    assert merged.batch([0]).indices.tolist() == [0, 2]
    assert "train: 1 of 4 completions dropped with their comparisons: too long (truncation=drop)" in caplog.text


def test_a_prompt_that_loses_all_is_counted(data, jsonl, caplog) -> None:
    path = jsonl("long.jsonl", [*lines_of((4, 90), (90, 3)), *rows()])
    with caplog.at_level(logging.INFO):
        merged = table(data(train=path, max_length=60, group_by_prompt=9))
    assert merged.size == 6
    assert "train: 1 of 7 prompts dropped: longer than max_length=60 (truncation=drop)" in caplog.text


def test_an_error_names_the_row_that_is_too_long(data, jsonl) -> None:
    path = jsonl("long.jsonl", lines_of((2, 4), (4, 90), (2, 3)))
    with pytest.raises(DataError, match=r"long.jsonl, row 1 \(from 0\): longer than max_length=60 \(\d+ tokens"):
        table(data(train=path, max_length=60, truncation="error", group_by_prompt=9))


def test_a_model_that_cannot_read_a_completion_is_told_its_row(data, jsonl) -> None:
    path = jsonl("long.jsonl", lines_of((2, 4), (2, 3), (4, 50)))
    merged = table(data(train=path, group_by_prompt=9))
    assert merged.first_beyond(10_000, 60).startswith(f"{path}, row 2 (from 0): ")
    assert merged.first_beyond(10_000, None) is None
    assert "token id" in merged.first_beyond(3, None)


# --- said, cached, digested -----------------------------------------------------------------------------------------


def test_what_was_merged_is_said_and_what_merges_nothing_too(data, jsonl, caplog) -> None:
    with caplog.at_level(logging.INFO):
        merged = table(data(group_by_prompt=9))
    apart = table(data())
    share = merged.lengths.sum() / apart.lengths.sum()
    assert f"train: {merged.summary}; {share:.2f} of the tokens of as many pairs" in caplog.text
    assert merged.summary == f"6 prompts with {len(merged.completion_lengths)} completions and {apart.size} comparisons"
    caplog.clear()
    different = [{**row, "prompt": f"{number}"} for number, row in enumerate(rows())]
    with caplog.at_level(logging.INFO):
        alone = table(data(train=jsonl("d.jsonl", different), group_by_prompt=9))
    assert "train: `group_by_prompt=9` merges nothing" in caplog.text
    assert alone.holds_pairs
    with pytest.raises(ValueError, match="`group_by_prompt` >= 2"):
        data(group_by_prompt=1)


def test_the_second_time_comes_from_the_cache(data) -> None:
    first, second = table(data(group_by_prompt=9)), table(data(group_by_prompt=9))
    files = [one.encoded.cache_files[0]["filename"] for one in (first, second)]
    assert files[0] == files[1]
    assert everything(first) == everything(second)
    others = [
        table(data(**{"group_by_prompt": 9, **options})) for options in ({"group_by_prompt": 3}, {"max_length": 60})
    ]
    assert not {one.encoded.cache_files[0]["filename"] for one in others} & {*files}


def test_rows_in_memory_are_merged_without_a_file(data) -> None:
    merged = table(data(train=rows(), group_by_prompt=9))
    assert merged.encoded.cache_files == []
    assert everything(merged) == everything(table(data(group_by_prompt=9)))


def test_a_dataset_on_the_disk_is_merged_into_the_cache(data, tmp_path) -> None:
    """One whose bytes are not known, as of the hub: its own fingerprint tells it."""
    Dataset.from_list(rows()).save_to_disk(tmp_path / "saved")
    first, second = (table(data(train=load_from_disk(tmp_path / "saved"), group_by_prompt=9)) for _ in range(2))
    assert everything(first) == everything(table(data(group_by_prompt=9)))
    (file,) = first.encoded.cache_files
    assert [file] == second.encoded.cache_files
    assert Path(file["filename"]).is_file()


@pytest.mark.parametrize("values", [1, 3])
def test_ids_are_compared_and_not_only_their_hashes(data, monkeypatch, values: int) -> None:
    """With a hash of few values, and few groups at once."""
    expected = table(data(group_by_prompt=9))
    monkeypatch.setattr("lit_dpo.data.grouping.hash", lambda ids: len(ids) + ids[-4] % values, raising=False)
    monkeypatch.setattr("lit_dpo.data.grouping._AT_ONCE", 4)
    merged = table(data(train=rows(), group_by_prompt=9))  # from memory, so that they are merged anew
    assert everything(merged) == everything(expected)
    assert merged.digest == expected.digest


def test_the_digest_tells_what_is_compared_and_merged(data, jsonl) -> None:
    lines = [{"prompt": f"q{number % 2}", "completions": WORDS[:4], "stars": [4, 3, 2, 1]} for number in range(4)]
    ranked = {"train": jsonl("r.jsonl", lines), "format": Rankings(scores=None, ranks="stars")}
    choices = ("all", "best_worst", "best_rest", "adjacent")
    found = [
        *(table(data(group_by_prompt=cap)).digest for cap in (None, 3, 9)),
        *(table(data(**ranked, comparisons=choice)).digest for choice in choices),
        table(data(**ranked, group_by_prompt=9)).digest,
    ]
    assert len(set(found)) == len(found)
    assert table(data(group_by_prompt=3)).digest == found[1]


# --- batches ---------------------------------------------------------------------------------------------------------


def test_held_out_prompts_are_whole(data) -> None:
    module = data(group_by_prompt=3, val_split=0.4)
    train, val = table(module), table(module, "val")
    assert not {*train.prompt_keys.tolist()} & {*val.prompt_keys.tolist()}
    assert everything(train) + everything(val) == everything(table(data()))
    apart = data(val_split=0.4)
    assert everything(table(apart)) == everything(train)  # the same prompts as without merging


@pytest.mark.parametrize("options", [{}, {"batch_size": None, "max_tokens": 60}], ids=["prompts", "budget"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_comparison_is_trained_on_once_per_epoch(data, options: dict, ranks: int) -> None:
    module = data(group_by_prompt=4, **options)
    merged = table(module)
    for epoch in range(3):
        seen: Counter = Counter()
        for rank in range(ranks):
            order = {"seed": 3, "rank": rank, "num_replicas": ranks}
            sampler = (
                BudgetSampler(merged.lengths, 60, **order) if options else PromptSampler(merged.lengths, 2, **order)
            )
            sampler.set_epoch(epoch)
            batches = [merged.batch(indices) for indices in sampler if not isinstance(indices, Uncounted)]
            seen += sum(map(contents, batches), Counter())
            if options:
                assert all(batch.input_ids.shape[1] <= 60 for batch in batches)
            else:
                assert all(len(batch.prompt_lengths) <= 2 for batch in batches)
        assert seen == everything(merged)


def test_a_group_over_the_budget_stops_with_the_remedy(data) -> None:
    longest = int(table(data()).lengths.max())
    with pytest.raises(DataError) as error:
        table(data(group_by_prompt=9, max_tokens=longest))
    assert f"Expected prompts of up to `max_tokens`={longest} tokens (with all completions)" in str(error.value)
    assert "--data.group_by_prompt" in str(error.value)


@pytest.mark.parametrize("tokens", [float("inf"), 60])
def test_the_largest_microbatches_are_those_of_the_epoch(data, tokens: float) -> None:
    module = data(group_by_prompt=9)
    module.setup("fit")
    loader = module.train_dataloader()
    (flat, padded), several = loader.largest_microbatches(tokens)
    batches = list(loader)
    parts = [part for batch in batches for part in batch.cut(tokens)]
    assert several == (len(parts) > len(batches))
    assert sum(prompt + sum(completions) for prompt, completions in flat) == max(
        part.input_ids.shape[1] for part in parts
    )
    sizes = []
    for part in parts:
        prompts = part.prompt_lengths.repeat_interleave(part.completions_per_prompt)
        sizes.append(len(prompts) * int((prompts + part.completion_lengths).max()))
    assert sum(len(completions) for _, completions in padded) * max(
        prompt + max(completions) for prompt, completions in padded
    ) == max(sizes)


def test_lengths_are_those_of_the_batches(data) -> None:
    module = data(group_by_prompt=4, val_split=0.3)
    for of in (table(module), table(module, "val"), table(data())):
        batch = of.batch(range(of.size))
        for name in ("prompt_lengths", "completions_per_prompt", "completion_lengths", "comparisons_per_prompt"):
            assert getattr(of, name).tolist() == getattr(batch, name).tolist(), name
        assert of.comparisons.tolist() == batch.comparisons.tolist()
        assert of.lengths.tolist() == batch.row_lengths.tolist()
        parts = of.part_lengths(range(of.size))
        assert [prompt + sum(completions) for prompt, completions in parts] == of.lengths.tolist()
        assert [prompt + max(completions) for prompt, completions in parts] == of.side_lengths.tolist()


@pytest.mark.parametrize("options", [{}, {"batch_size": None, "max_tokens": 60}], ids=["prompts", "budget"])
def test_a_resumed_run_sees_the_remaining_batches(data, tmp_path, options: dict) -> None:
    options = {"group_by_prompt": 4, **options}
    straight = Recorder()
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_top_k=-1, every_n_train_steps=1)
    trainer(checkpoint).fit(straight, data(**options))
    merged = table(data(**options))
    for epoch in range(2):
        half = straight.seen[epoch * len(straight.seen) // 2 :][: len(straight.seen) // 2]
        assert sorted(chain(*half)) == list(range(merged.comparisons_count))
    files = sorted((tmp_path / "ckpt").iterdir())
    assert len(files) == len(straight.seen) > 5
    for file in files:
        state = torch.load(file, weights_only=True)["PreferenceDataModule"]
        done = state["epoch"] * len(straight.seen) // 2 + state["batches"]
        resumed = Recorder()
        trainer().fit(resumed, data(**options), ckpt_path=file)
        assert resumed.seen == straight.seen[done:], file.name


@pytest.mark.parametrize("other", [{}, {"group_by_prompt": 3}], ids=["apart", "another cap"])
def test_other_groups_cannot_continue_an_epoch(data, tmp_path, other: dict) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, filename="x")
    trainer(checkpoint, max_steps=2).fit(Recorder(), data(group_by_prompt=9))
    words = "prompts 6 -> " if other else f"pairs None -> {len(rows())}"
    with pytest.raises(ResumeError, match=words):
        trainer().fit(Recorder(), data(**other), ckpt_path=tmp_path / "x.ckpt")


# --- real data -------------------------------------------------------------------------------------------------------


def test_answers_of_stack_exchange_share_their_questions(shared) -> None:
    source = str(shared / "data/torchtune-tiny/stack_exchange_paired_tiny.json")
    options = {
        "train": source,
        "format": Triples("question", "response_j", "response_k"),
        "tokenizer": str(shared / "models/stories260K"),
        "max_length": None,
    }
    apart, merged = (table(PreferenceDataModule(**options, group_by_prompt=cap)) for cap in (None, 20))
    assert everything(merged) == everything(apart)
    assert apart.summary == "25 pairs"
    assert merged.summary == "8 prompts with 27 completions and 25 comparisons"
    assert merged.lengths.sum() / apart.lengths.sum() == pytest.approx(0.379, abs=1e-3)
