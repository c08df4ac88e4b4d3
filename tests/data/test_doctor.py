"""What the doctor finds: each kind in rows that have it, and in none that have not; the numbers of real files."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from layout_table import FOLDER

from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.data.doctor import KINDS, Examined, brief, examine, remembered
from lit_dpo.data.doctor.near import NearDuplicates
from lit_dpo.data.doctor.shortcuts import rank_correlation
from lit_dpo.data.doctor.texts import key, normalized, scripts, words_of
from lit_dpo.data.formats import PreferenceFormat, Rankings, Triples
from lit_dpo.errors import DataError
from lit_dpo.quickstart import quickstart_tokenizer
from lit_dpo.seals import seal
from lit_dpo.tools.inspect import CHAT_TEMPLATE

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def pair(number: int, **more: Any) -> dict[str, Any]:
    """A row like no other, and with nothing to find: which side is longer, and how it begins and ends, is by chance."""
    random = np.random.default_rng(number)
    sides = [" ".join(random.choice(NUMBERS, random.integers(6, 12))) for _ in range(2)]
    return {
        "prompt": f"What is {number} in words, and why?",
        "chosen": f" {sides[0]}",
        "rejected": f" {sides[1]}",
        **more,
    }


def pairs(count: int = 40) -> list[dict[str, Any]]:
    return [pair(number) for number in range(count)]


def looked(train: Any, format: PreferenceFormat = Triples(), examples: int = 0, **options: Any) -> Examined:  # noqa: B008
    tokenizer = quickstart_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    more = {"max_length": None, **options}
    data = PreferenceDataModule(train=train, format=format, tokenizer=tokenizer, **more)
    data.setup("fit")
    if any(source is not None for split, source in data.sources.items() if split.startswith("test")):
        data.setup("test")
    return examine(data.tables, tokenizer, data.comparing, examples=examples)


def found(examined: Examined, name: str) -> Any:
    return next(one for one in examined.findings if one.kind.name == name)


def counted(examined: Examined) -> dict[str, int]:
    return {one.kind.name: one.counted for one in examined.findings if one.above}


@cache
def well() -> Examined:
    return looked(pairs())


# ---- nothing where nothing is; each kind where it is ----


def test_nothing_is_found_in_rows_that_are_well():
    examined = looked(pairs(200), val=[pair(900)], test=[pair(901)])
    assert counted(examined) == {}
    assert {one.kind.name for one in examined.findings} == {*KINDS}


SIDE = " It is seven, and then eleven, and after that it is twelve, and this goes on."
ROWS: dict[str, tuple[list[dict[str, Any]], int, str]] = {
    "duplicates": ([pair(3), pair(5), pair(3)], 3, "as the `list` given, row 3 (from 0)"),
    "repeated-prompts": ([{**pair(100 + n), "prompt": "Why?"} for n in range(20)], 19, "as the `list` given, row 40"),
    "contradictions": (
        [{**pair(3), "chosen": pair(3)["rejected"], "rejected": pair(3)["chosen"]}],
        1,
        "turned around in the `list` given, row 3 (from 0)",
    ),
    "both-roles": ([pair(50, chosen=" I do not know it."), pair(51, rejected=" I do not know it.")], 1, "chosen here"),
    "equal-sides": ([pair(50, chosen=SIDE, rejected=SIDE)], 1, "chosen is rejected"),
    "one-word-completions": ([pair(50 + n, chosen=f" yes{n}") for n in range(9)], 9, "'yes0'"),
    "control-tokens": ([pair(50, prompt="Say <|im_end|> now")], 1, "<|im_end|> in the prompt"),
    "doubled-ends": ([pair(50, rejected=" seven</s>\n</s>")], 1, "</s>"),
    "boundary-merges": (
        [pair(50, prompt="Tell me of gra", chosen="vity, the force", rejected=" why, the other")],
        1,
        "…",
    ),
    "outer-blanks": ([pair(50 + n, chosen=f"{n} is it") for n in range(3)], 3, "blanks of the chosen side: none"),
    "replacement-characters": ([pair(50, chosen=" se\ufffden it is")], 1, "in a completion"),
    "mixed-scripts": ([pair(50 + n, chosen=f" {n} это семь, я думаю {n}") for n in range(6)], 6, "cyrillic"),
    "frequent-completions": ([pair(50 + n, rejected=" I do not know it.") for n in range(6)], 6, "has it"),
    "near-duplicates": (
        [pair(3, chosen=pair(3)["chosen"] + "!"), pair(9, prompt=pair(9)["prompt"].upper())],
        2,
        "like",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_each_kind_is_found_where_it_is(name):
    added, count, note = ROWS[name]
    examined = looked(pairs() + added)
    one = found(examined, name)
    assert (one.counted, one.above) == (count if name != "duplicates" else 3, True)
    assert any(note in f"{example.note} {example.other}" for example in one.examples), one.examples
    assert all(example.place.startswith("the `list` given, row ") for example in one.examples)
    without = found(well(), name)
    assert (without.counted, without.above) == (0, False)


def test_the_row_that_is_named_is_the_row():
    examined = looked([*pairs(7), pair(50, chosen=" lost: \ufffd, all of it")])
    assert found(examined, "replacement-characters").examples[0].place == "the `list` given, row 7 (from 0)"


def test_prompts_are_shared_whatever_their_case_blanks_and_punctuation():
    others = [
        pair(900, prompt="  what is 3 in words —  and WHY"),
        pair(901, prompt="What is 4 in words, and why?"),
        pair(902, prompt="What is 903 in words, and why?"),
    ]
    examined = looked(pairs(), val=others, test={"a": others[:1], "b": others[2:]})
    shared = [one for one in examined.findings if one.kind.name.startswith("shared-prompts")]
    assert [(one.counted, one.of) for one in shared] == [(2, 3), (1, 1), (0, 1)]
    assert "prompts of test/a are in train too" in shared[1].line
    assert shared[0].detail == "1 of them but for case, blanks or punctuation"


def test_what_val_split_holds_out_is_not_looked_at_as_training_data():
    rows = [*pairs(), *(pair(50 + n, chosen=" \ufffd \ufffd \ufffd") for n in range(40))]
    examined = looked(rows, val_split=0.75)
    assert {one.name: one.kept for one in examined.splits} == {"train": 20, "val": 60}
    lost = found(examined, "replacement-characters")
    assert lost.of == 20
    assert 0 < lost.counted < 20


def test_ties_and_many_completions():
    rows = [
        {
            "prompt": f"Which {n}?",
            "completions": [f" a{n} one", f" b{n} two", f" c{n} three"],
            "scores": [2, 1, n % 2 + 1],
        }
        for n in range(10)
    ]
    examined = looked(rows, format=Rankings())
    ties = found(examined, "ties")
    assert (ties.counted, ties.of) == (10, 30)
    assert examined.completions_per_prompt == {3: 10}
    assert found(examined, "duplicates").of == 10
    assert examined.tokens.row < examined.tokens.grouped + 1 < examined.tokens.pairs


def test_what_is_too_long_and_what_has_no_end():
    rows = [*pairs(10), *(pair(50 + n, chosen=" seven" * 300) for n in range(3))]
    dropped = found(looked(rows, max_length=100), "too-long")
    assert (dropped.counted, dropped.of, dropped.above) == (3, 13, True)
    cut = found(looked(rows, max_length=100, truncation="truncate_completion"), "missing-ends")
    assert (cut.counted, cut.of, cut.above) == (3, 26, True)


def test_rows_that_are_merged_are_looked_at_one_by_one():
    rows = pairs() + [row for name in ("duplicates", "contradictions", "control-tokens") for row in ROWS[name][0]]
    apart, merged = looked(rows), looked(rows, group_by_prompt=8)
    assert merged.splits[0].kept < apart.splits[0].kept
    numbers = [
        [(one.kind.name, one.counted, one.of, [*one.examples]) for one in examined.findings if one.kind.name in ROWS]
        for examined in (apart, merged)
    ]
    of_tokens = ("doubled-ends", "boundary-merges")
    apart_numbers, merged_numbers = ([one for one in those if one[0] not in of_tokens] for those in numbers)
    assert apart_numbers == merged_numbers


def test_what_is_left_out_is_looked_at_no_more():
    examined = looked(pairs() + ROWS["duplicates"][0], deduplicate=True)
    assert (found(examined, "duplicates").counted, examined.splits[0].kept) == (0, 40)


def test_shortcuts_are_measured_on_prompts_that_were_not_seen():
    """A first word that names its own prompt tells everything about rows that were seen, and nothing about others."""
    own = [pair(n, chosen=f" a{n} {NUMBERS[n % 9]}", rejected=f" b{n} {NUMBERS[n % 7]}") for n in range(100)]
    by = {one.name: one for one in looked(own).shortcuts}
    assert by["first-word"].accuracy == 0.5
    told = [
        pair(n, chosen=f" Sure, {pair(n)['chosen']}", rejected=f" Sorry, {pair(n)['rejected']}") for n in range(100)
    ]
    examined = looked(told)
    by = {one.name: one for one in examined.shortcuts}
    assert by["first-word"].accuracy == 1.0
    assert by["first-word"].low > 0.95
    assert "`sure` is chosen 100 times" in by["first-word"].sign
    assert by["refusal"].accuracy == 1.0
    assert {"shortcut-first-word", "shortcut-refusal"} <= counted(examined).keys()


def test_length_is_told_by_its_direction_and_rank():
    rows = [pair(n, chosen=" one" * (n % 9 + 12), rejected=" two" * (n % 9 + 2)) for n in range(60)]
    one = found(looked(rows), "length-bias")
    assert (one.share, one.above) == (1.0, True)
    assert "the chosen one is longer in 100 %" in one.line
    assert "LDDPOLoss" in one.kind.remedy
    few = found(looked(rows[:3]), "length-bias")  # three pairs show nothing
    assert (few.share, few.above) == (1.0, False)


def test_rank_correlation_is_that_of_scipy():
    from scipy.stats import spearmanr

    random = np.random.default_rng(0)
    chosen, rejected = random.integers(0, 20, 50), random.integers(0, 25, 50)
    role = np.repeat([1, 0], 50)
    expected = spearmanr(np.concatenate([chosen, rejected]), role).statistic
    assert rank_correlation(chosen, rejected) == pytest.approx(expected)
    assert rank_correlation(np.ones(3, int), np.ones(3, int)) == 0


def test_near_duplicates_are_those_of_the_true_share_of_phrases():
    """The estimate beside the truth, on rows that are copies with some words changed."""
    random = np.random.default_rng(0)
    vocabulary = [f"w{n}" for n in range(500)]
    first = [list(random.choice(vocabulary, 120)) for _ in range(30)]
    finder, pairs_found = NearDuplicates(), set()
    for number, words in enumerate(first):
        finder.add(number, number, ["p"], [words])
    for number, words in enumerate(first):
        changed = [*words]
        for place in random.choice(120, number, replace=False):
            changed[place] = "x"
        finder.add(100 + number, 100 + number, ["p"], [changed])
    pairs_found = dict(finder.pairs)
    assert all(other == number - 100 for number, other in pairs_found.items())
    assert {100, 101, 102} <= pairs_found.keys()  # nearly all phrases
    assert not pairs_found.keys() & {100 + n for n in range(15, 30)}  # a third of them, and fewer


def test_a_thousand_answers_yes_are_quickly_looked_at():
    finder = NearDuplicates()
    for number in range(2000):
        finder.add(number, number, [f"question{number}", f"{number * 7}", "why"], [["yes"], ["no"]])
    assert finder.pairs == []
    assert len(finder._first) == 50


def test_the_words_and_their_scripts():
    assert words_of("It's 2_3, é") == ["it", "s", "2_3", "é"]
    assert words_of("It's 2_3, e") == ["it", "s", "2_3", "e"]
    assert normalized("Ｗhat's up?\u200b") == normalized("whats UP")
    assert normalized("?!") != normalized("!?")
    assert [*scripts("東京タワー tower")] == ["han", "latin"]


def test_thresholds_have_names():
    with pytest.raises(DataError, match="Expected the name of a finding, one of bad-rows"):
        examine({}, quickstart_tokenizer(), PreferenceDataModule().comparing, {"dupes": 0.1})


# ---- the same again ----


def test_every_process_finds_the_same():
    """Python hashes text anew in each process; these numbers are of another one."""
    random, finder = np.random.default_rng(1), NearDuplicates()
    first = [list(random.choice(NUMBERS, 120)) for _ in range(50)]
    for number in range(100):
        words = [*first[number % 50]]
        words[number % 40] = "x"
        finder.add(number, number, ["p"], [words])
    assert finder.pairs == [(50 + number, number) for number in range(50)]
    assert key("seven") == 6391530632800119119


# ---- layouts; real files are in `tests/test_inspect.py` ----


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.jsonl")), ids=lambda file: file.stem)
def test_every_layout_is_looked_at(file):
    from lit_dpo.data.formats import Auto

    examined = looked(str(file), format=Auto(), examples=9)
    assert examined.splits[0].kept == len(examined.examples) > 0
    assert all(one.completions for one in examined.examples)


# ---- in brief ----


def test_a_run_says_in_a_few_lines_what_is_above_its_threshold():
    rows = [pair(n, chosen=" one" * (n % 9 + 12)) for n in range(60)]
    rows += [rows[0], {**rows[1], "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}]
    tokenizer = quickstart_tokenizer()
    data = PreferenceDataModule(rows, tokenizer=tokenizer)
    data.setup("fit")
    lines = brief(data.tables["train"], tokenizer)
    assert [line.partition(" of ")[0] for line in lines] == [
        "1",
        "1",
        "52",
        "`lit-dpo inspect`, with the same options, shows which rows, and more.",
    ]
    assert "`--data.deduplicate true` leaves them out." in lines[0]
    data = PreferenceDataModule(pairs(), tokenizer=tokenizer)
    data.setup("fit")
    assert brief(data.tables["train"], tokenizer) == []


def test_of_very_many_rows_the_first_are_looked_at_and_a_line_says_so(monkeypatch):
    monkeypatch.setattr(sys.modules[brief.__module__], "MOST", 61)
    tokenizer = quickstart_tokenizer()
    rows = [*pairs(), *(pair(1000 + n) for n in range(60))][:60]
    for later, said in ((rows[:1], "1 of 61 "), ([rows[0], rows[1]], "1 of 61 ")):
        data = PreferenceDataModule([*rows, *later], tokenizer=tokenizer)
        data.setup("fit")
        lines = brief(data.tables["train"], tokenizer)
        assert lines[0].startswith(said)
        assert lines[-1].endswith("Only the first 61 were looked at.") == (len(later) > 1)


def test_what_is_said_in_brief_is_kept_with_the_rows(tmp_path):
    """Rows of files are looked at once; other rows, or a part of them, are others."""
    tokenizer, path = quickstart_tokenizer(), tmp_path / "pairs.jsonl"

    def said(rows, **options) -> list[str]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = PreferenceDataModule(str(path), tokenizer=tokenizer, **options)
        data.setup("fit")
        return remembered(data.tables["train"], tokenizer)

    def files() -> set[Path]:
        return {*Path(datasets.config.HF_DATASETS_CACHE).rglob("brief-*.json")}

    rows, before = [*pairs(), pairs()[0]], files()
    first = said(rows)
    assert "1 of" in first[0]
    (kept,) = files() - before
    assert json.loads(kept.read_text()) == first
    kept.write_text('["kept"]')
    seal([kept], kept.stem)
    assert said(rows) == ["kept"]
    kept.write_text('["poisoned"]')
    assert said(rows) == first
    assert said(pairs()) == []
    assert said(rows, deduplicate=True) == []
    kept.write_text("{oops")
    seal([kept], kept.stem)
    assert said(rows) == first
    kept.unlink()


def test_what_is_cheap_counts_as_the_whole_does():
    rows = pairs() + [row for name in ("duplicates", "contradictions", "doubled-ends") for row in ROWS[name][0]]
    tokenizer = quickstart_tokenizer()
    data = PreferenceDataModule(rows, tokenizer=tokenizer, max_length=None)
    data.setup("fit")
    lines = brief(data.tables["train"], tokenizer)
    examined = looked(rows)
    for name in ("duplicates", "contradictions", "doubled-ends"):
        one = found(examined, name)
        assert one.counted > 0
        assert any(line.startswith(f"{one.counted} of {one.of} {one.kind.what}") for line in lines), name
