"""Every layout in which preferences are stored: recognised with no option typed, and read as a person would."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest
from layout_table import EXPECTED, FOLDER, rendered, said, written

from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.data.formats import Auto, Preference, Skipped, Triples
from lit_dpo.data.formats.recognition import LAYOUTS, option, recognise
from lit_dpo.data.sources import load_rows
from lit_dpo.errors import DataError


def test_each_layout_has_a_file() -> None:
    assert {file.stem for file in FOLDER.glob("*.jsonl")} == set(EXPECTED)
    recognised = {f"--data.format {typed}" for typed, _ in EXPECTED.values()}
    forms = {type(one).__name__ for one in LAYOUTS}
    assert {one.split()[1] for one in recognised} == forms


@pytest.mark.parametrize("name", EXPECTED)
def test_a_layout_is_recognised_and_read(name: str, tools_folder: str, caplog) -> None:
    typed, rows = EXPECTED[name]
    module = PreferenceDataModule(train=str(FOLDER / f"{name}.jsonl"), tokenizer=tools_folder)
    with caplog.at_level(logging.INFO):
        module.setup("fit")
    (line,) = (one.getMessage() for one in caplog.records if "read by" in one.getMessage())
    assert line.startswith(f"train: read by `--data.format {typed}`")
    table = module._table("train")
    assert [said(table.formats[0].read(row)) for row in table.sources[0].rows] == rows

    prompt, *completions = rows[0]  # as it is trained on
    if isinstance(completions[0], list):
        completions = completions[0]
    if isinstance(table.preference(0).prompt, str):
        expected = prompt + "".join(f"{one}<eos>" for one in completions)
    else:
        expected = rendered(prompt, start=True) + "".join(f"{one}<|end|>\n" for one in completions)
    batch = table.batch([0])
    assert batch.indices.unique().tolist() == [0]
    assert module.loaded_tokenizer.decode(batch.input_ids[0]) == expected


def test_what_prefers_nothing_is_counted_by_reason(tools_folder, caplog) -> None:
    def lines(**options) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            module = PreferenceDataModule(train=str(FOLDER / "arena.jsonl"), tokenizer=tools_folder, **options)
            module.setup("fit")
        assert module._table("train").preference(4).ranks == [2, 1]  # rows keep their numbers
        return [one.getMessage() for one in caplog.records if "dropped" in one.getMessage()]

    bad = "both completions are said to be bad"
    assert lines() == [f"train: 2 of 5 pairs dropped: 1 all completions tie; 1 {bad}"]
    assert lines(ties="half") == [f"train: 1 of 5 pairs dropped: {bad}"]


def test_the_examples_of_a_tree_know_their_row(tools_folder, jsonl) -> None:
    module = PreferenceDataModule(train=str(FOLDER / "trees.jsonl"), tokenizer=tools_folder)
    module.setup("fit")
    assert [module.place("train", row).partition(", ")[2] for row in range(5)] == [
        f"row {number} (from 0)" for number in (0, 0, 0, 1, 2)
    ]
    assert module._table("train").size == 4
    good, bad = ({"role": "assistant", "text": "a", "rank": rank} for rank in (0, 1))
    trees = [{"text": "q", "role": "prompter", "replies": [good, {**bad, "text": text}]} for text in ("b", "b", "")]
    path = jsonl("trees.jsonl", [{"message_tree_id": "x", "prompt": tree} for tree in trees])
    with pytest.raises(DataError, match=r"trees.jsonl, row 2 \(from 0\): Expected text in `text`"):
        PreferenceDataModule(train=path, tokenizer=tools_folder).setup("fit")


def test_a_first_row_that_prefers_nothing(jsonl, tools_folder) -> None:
    path = jsonl("a.jsonl", [{"g": "q", "s": None}, {"g": "q", "s": [" a", " b", 0.5]}])
    module = PreferenceDataModule(train=path, tokenizer=tools_folder, format=Some())
    module.setup("fit")
    table = module._table("train")
    assert (table.size, table.columns, table.dropped) == (1, ("x",), Counter({"nobody said": 1}))
    with pytest.raises(LookupError, match="nobody said"):
        table.preference(0)


class Some(Triples):
    """A user's own, with a row that says nothing."""

    columns = ("g", "s")

    def read(self, row):
        return Preference(row["g"], *row["s"][:2], {"x": row["s"][2]}) if row["s"] else Skipped("nobody said")


# --- real files -------------------------------------------------------------------------------------------------------

REAL = {
    "finetuning-lab-tinystories/preference_pairs.jsonl": ("Triples --data.format.prompt request", 113, 65),
    "hh-rlhf-harmless-base-test/test.jsonl.gz": ("Transcripts", 2312, 2306),  # 2310 with those of the empty ones
    "llamafactory-demo/dpo_en_demo.json": ("ShareGPT", 300, 295),
    "llamafactory-demo/dpo_zh_demo.json": ("ShareGPT", 300, 289),
    "llamafactory-demo/v1_dpo_demo.jsonl": (
        "ImplicitPrompt --data.format.chosen chosen_messages --data.format.rejected rejected_messages",
        10,
        10,
    ),
    "medicalgpt/dpo_zh_500.jsonl": ("ShareGPT", 500, 500),
    "medicalgpt/toolcall_dpo_zh_demo.jsonl": ("ShareGPT", 11, 11),
    "ps-llm-long-prompts/train.jsonl": ("Triples", 52, 52),
    "rasbt-instruction-preference/instruction-data-with-preference.json": ("Alpaca", 1100, 1075),
    "torchtune-tiny/hh_rlhf_tiny.json": ("ImplicitPrompt", 1, 1),
    "torchtune-tiny/stack_exchange_paired_tiny.json": ("StackExchange", 25, 8),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_recognised_and_read(name: str, shared: Path) -> None:
    typed, pairs, prompts = REAL[name]
    (source,) = load_rows(str(shared / "data" / name), None)
    format = Auto().of(name, source.head(100))
    assert option(format) == f"--data.format {typed}"
    rows = [format.read(row) for row in source.rows]
    kept = [row for row in rows if isinstance(row, Preference)]
    assert len(rows) == pairs
    assert len({written(row.prompt, row.template) for row in kept}) == prompts
    equal = sum(row.chosen == row.rejected for row in kept)
    edges = {"hh-rlhf-harmless-base-test/test.jsonl.gz": (4, 0)}
    edges["rasbt-instruction-preference/instruction-data-with-preference.json"] = (0, 6)
    assert (len(rows) - len(kept), equal) == edges.get(name, (0, 0))
    if typed == "Alpaca":
        inputs = [cells["input"] for cells in source.rows]
        ends = [written(row.prompt).endswith(f"\n{one}") for row, one in zip(rows, inputs, strict=True) if one]
        assert (len(ends), all(ends)) == (325, True)


def test_files_without_pairs_are_refused(shared: Path) -> None:
    for name in ("llamafactory-demo/kto_en_demo.json", "finetuning-lab-tinystories/requests_train.jsonl"):
        (source,) = load_rows(str(shared / "data" / name), None)
        with pytest.raises(DataError, match="no known layout fits"):
            recognise(name, source.head(100))


SMALL = {name: REAL[name] for name in REAL if not name.startswith(("hh-", "llamafactory-demo/dpo", "ps-llm"))}


@pytest.mark.parametrize("name", SMALL)
def test_real_files_are_encoded_with_no_option(name: str, shared: Path, tools_folder: str) -> None:
    module = PreferenceDataModule(train=str(shared / "data" / name), tokenizer=tools_folder, max_length=None)
    module.setup("fit")
    table = module._table("train")
    assert (table.size, table.bad) == (SMALL[name][1], [])
