"""Columns and cells that belong to a prompt, behind every format: read, mended, or refused by name."""

from __future__ import annotations

import csv
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lit_dpo.data.comparisons import Comparing, check_row
from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.data.formats import (
    Auto,
    ImplicitPrompt,
    Preference,
    PreferenceFormat,
    Ranking,
    SafeRLHF,
    ShareGPT,
    Triples,
)
from lit_dpo.data.formats.recognition import LAYOUTS
from lit_dpo.data.truncation import EQUAL_CUT
from lit_dpo.errors import DataError
from toy_tokenizers import CHAT, byte_level

PAIR = {"chosen": "a", "rejected": "b"}
ASK, FOUR, FIVE = (
    {"role": role, "content": text} for role, text in (("user", "q"), *(("assistant", one) for one in "45"))
)
MESSAGES: dict[str, Any] = {"prompt": [ASK], "chosen": [FOUR], "rejected": [FIVE]}


@pytest.fixture
def data(tokenizer_folder: str):
    """`data(rows, **options)`: a data module after `setup`."""

    def made(rows: Any, **options: Any) -> PreferenceDataModule:
        module = PreferenceDataModule(train=rows, **{"tokenizer": tokenizer_folder, **options})
        module.setup("fit")
        return module

    return made


def trained(module: PreferenceDataModule, index: int = 0) -> str:
    return module.loaded_tokenizer.decode(module._table("train").batch([index]).input_ids[0])


# --- columns that nobody reads ----------------------------------------------------------------------------------------

PROMPT_COLUMNS = ["system", "tools", "history", "input", "images", "context"]
LABEL_COLUMNS = ["winner", "label", "preference", "preferred", "better"]


@pytest.mark.parametrize("column", [*PROMPT_COLUMNS, *LABEL_COLUMNS])
@pytest.mark.parametrize("format", [Triples("question"), Auto(prompt="question")])
def test_a_column_that_nobody_reads_is_refused_for_a_named_format_too(column: str, format, data, jsonl) -> None:
    if column in format.optional_columns:
        return
    rows = [{"question": "q", **PAIR, column: value} for value in ("", "x")]  # not in the first row
    path = jsonl("a.jsonl", rows)
    kind = "part of the prompt" if column in PROMPT_COLUMNS else "label"
    with pytest.raises(DataError) as error:
        data(path, format=format)
    for words in (path, f"does not read `{column}`", kind, f"--data.ignore_columns '[{column}]'", "Triples"):
        assert words in str(error.value)
    assert data(path, format=format, ignore_columns=[column])._table("train").size == 2
    assert data(jsonl("b.jsonl", rows[:1]), format=format)._table("train").size == 1  # it says nothing
    with pytest.raises(DataError, match="`ignore_columns` but it has no `other`: it has `question`"):
        data(path, format=format, ignore_columns=["other"])


def test_all_rows_are_asked_whether_a_column_says_something(data, jsonl) -> None:
    rows = [{"prompt": "q", **PAIR, "system": "Be brief." if number == 150 else ""} for number in range(200)]
    with pytest.raises(DataError, match="does not read `system`"):
        data(jsonl("a.jsonl", rows), format=Triples())


def test_a_label_beside_two_outputs_is_not_left_over(data, jsonl) -> None:
    """Of AlpacaEval 761 of 805 pairs were backwards."""
    rows = [{"instruction": "q", "output_1": "a", "output_2": "b", "preference": label} for label in (1, 2)]
    named = Triples("instruction", "output_1", "output_2")
    with pytest.raises(DataError, match="does not read `preference`, and this looks like a label"):
        data(jsonl("a.jsonl", rows), format=named)
    assert data(jsonl("a.jsonl", rows))._table("train").comparisons.tolist() == [[0, 1], [1, 0]]


def test_a_second_label_is_not_needed(data, jsonl) -> None:
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1}
    for by, better in (("better", 0), ("safer", 1)):
        table = data(jsonl("a.jsonl", [row]), format=SafeRLHF(by=by))._table("train")
        assert table.comparisons.tolist() == [[better, 1 - better]]


def test_what_is_ignored_is_not_there(data, jsonl) -> None:
    """For a format that would read it as well, and for the choice of the format; and other columns encode anew."""
    path = jsonl("a.jsonl", [{"question": "q", "system": "Be brief.", **PAIR}])
    assert trained(data(path)).startswith("<|system|>Be brief.")
    assert trained(data(path, ignore_columns=["system"])) == "qa<eos>b<eos>"
    path = jsonl("b.jsonl", [{"chosen": [ASK, FOUR], "rejected": [ASK, FIVE], "system": "Be brief."}])
    for ignored, start in (([], "<|system|>"), (["system"], "<|user|>")):
        assert trained(data(path, format=ImplicitPrompt(), ignore_columns=ignored)).startswith(start)
    rows = [{"prompt": "p", "question": "q", **PAIR}]
    assert trained(data(jsonl("c.jsonl", rows), ignore_columns=["prompt"])) == "qa<eos>b<eos>"


def test_the_other_columns_are_named(data, jsonl, caplog) -> None:
    with caplog.at_level(logging.INFO):
        data(jsonl("a.jsonl", [{"prompt": "q", **PAIR, "id": 7, "source": "x"}]))
    assert any("not read: `id`, `source`" in one.getMessage() for one in caplog.records)


# --- conversations as they are stored -------------------------------------------------------------------------------

PARTS = [{"type": "text", "text": "4"}]


def test_typed_parts_are_text_and_images_are_none(data, jsonl) -> None:
    rows = [MESSAGES | {"chosen": [FOUR | {"content": PARTS}]}]
    assert trained(data(jsonl("a.jsonl", rows))) == "<|user|>q<|end|>\n<|assistant|>4<|end|>\n5<|end|>\n"
    for part, words in (({"type": "image_url", "image_url": "x"}, "image_url"), ({"type": "image"}, "image")):
        with pytest.raises(DataError, match=f"message 0 of `prompt` but it holds {words}: not supported"):
            Triples().read(MESSAGES | {"prompt": [ASK | {"content": [part]}]})


@pytest.mark.parametrize("format", [Triples(), ImplicitPrompt()])
def test_what_a_message_holds_besides_its_text_is_not_lost(format) -> None:
    """One call, as OpenAI wrote it once, becomes one of `tool_calls`; images are refused by name."""
    call = {"name": "add", "arguments": "{}"}
    whole = MESSAGES if format == Triples() else {side: [ASK, *MESSAGES[side]] for side in PAIR}
    read = format.read
    old = {"role": "assistant", "content": None, "function_call": call}
    found = read(whole | {"chosen": [*whole["chosen"][:-1], old]}).chosen
    assert found[0]["tool_calls"] == [{"type": "function", "function": call}]
    assert "function_call" not in found[0]
    for cell in (["x.png"], "x.png"):
        with pytest.raises(DataError, match=r"message . of `rejected` but it holds `images`: not supported"):
            read(whole | {"rejected": [*whole["rejected"][:-1], FIVE | {"images": cell}]})
    assert read(whole | {"rejected": [*whole["rejected"][:-1], FIVE | {"images": []}]}).rejected[0]["content"] == "5"


@pytest.mark.parametrize("arguments", [{"a": 2}, '{"a": 2}'])
def test_tool_calls_are_read_with_and_without_content(arguments: Any) -> None:
    call = {"id": None, "type": "function", "function": {"name": "add", "arguments": arguments, "strict": None}}
    for content in ({}, {"content": None}, {"content": ""}):
        row = MESSAGES | {"chosen": [{"role": "assistant", "tool_calls": [call], **content}]}
        (message,) = Triples().read(row).chosen
        function = {"name": "add", "arguments": arguments}
        assert message == {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": function}],
        }
    padded = {"role": "assistant", "content": "4", "reasoning_content": "2, 3", "tool_calls": None, "name": None}
    assert Triples().read(MESSAGES | {"chosen": [padded]}).chosen == [FOUR | {"reasoning_content": "2, 3"}]


def test_arguments_that_parquet_pads_are_those_of_the_row(tmp_path: Path, jsonl) -> None:
    """Each call in a column of structs has all the arguments of all others, with null."""
    from datasets import Dataset

    say = CHAT.replace("m['content']", "m['content'] + (m['tool_calls'] | tojson if m['tool_calls'] else '')")
    tokenizer = byte_level(chat_template=say)
    rows = [
        MESSAGES | {"chosen": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": own}]}]}
        for own in ({"a": 1}, {"b": {"c": 2}})
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for path in (str(tmp_path / "a.parquet"), jsonl("a.jsonl", rows)):
        module = PreferenceDataModule(train=path, tokenizer=tokenizer)
        module.setup("fit")
        assert '[{"name": "f", "arguments": {"a": 1}}]' in trained(module, 0)
        assert '[{"name": "f", "arguments": {"b": {"c": 2}}}]' in trained(module, 1)


def numpy_like(messages: list[dict]) -> str:
    """As pandas writes an array of objects."""
    return "[" + "\n ".join(map(repr, messages)) + "]"


@pytest.mark.parametrize("write", [json.dumps, repr, numpy_like])
def test_conversations_written_as_strings_are_read(write, data, tmp_path: Path, caplog) -> None:
    asked = [{"role": "system", "content": "It's {a}\n{b}"}, ASK]
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([MESSAGES.keys(), [write(one) for one in (asked, [FOUR], [FIVE])]])
    for format in (Triples(), Auto()):
        with caplog.at_level(logging.INFO):
            module = data(str(tmp_path / "a.csv"), format=format)
        assert trained(module).startswith("<|system|>It's {a}\n{b}<|end|>\n<|user|>q<|end|>\n<|assistant|>4<|end|>\n")
    line = "train: conversations are written as strings in `chosen`, `prompt`, `rejected`, and read as messages"
    assert [one.getMessage() for one in caplog.records].count(line) == 2


def test_text_that_begins_with_a_bracket_stays_text(data, jsonl) -> None:
    texts = ['[{"role": 1}]', "[1] See above.", "[", '[{"role": "user"', "[]", '{"role": "user", "content": "x"}']
    for text in texts:
        assert (
            trained(data(jsonl("a.jsonl", [{"prompt": text, "chosen": text, "rejected": "b"}])))
            == f"{text}{text}<eos>b<eos>"
        )
    written = json.dumps([FOUR])
    one = data(jsonl("b.jsonl", [{"prompt": "q", "chosen": written, "rejected": "b"}]))  # asked for JSON, perhaps
    assert trained(one) == f"q{written}<eos>b<eos>"
    for column, row in (
        ("chosen", {"prompt": "q", "chosen": written, "rejected": written}),
        ("prompt", {"prompt": json.dumps([ASK]), **PAIR}),
    ):
        with pytest.raises(DataError, match=f"`{column}` but it is a conversation that is written as a string"):
            data(jsonl("c.jsonl", [row]), format=Triples())
    path = jsonl("d.jsonl", [{"prompt": json.dumps([ASK]), **PAIR}])
    assert trained(data(path, format=ShareGPT("prompt"))) == "<|user|>q<|end|>\n<|assistant|>a<|end|>\nb<|end|>\n"


# --- sides that repeat the prompt, or one another ---------------------------------------------------------------------

LONG = "Question: what is the answer?\n\nAnswer:"


def rows(doubled: int, right: int, prompt: str = LONG) -> list[dict]:
    good = {"prompt": prompt, "chosen": " four", "rejected": " five"}
    return [good | {side: prompt + good[side] for side in PAIR}] * doubled + [good] * right


def test_text_sides_that_repeat_the_prompt_are_refused_where_most_do(data, caplog) -> None:
    said = "3 of 4 pairs in which every completion begins with the whole prompt"
    with pytest.raises(DataError, match=said):
        data(rows(3, 1))
    with caplog.at_level(logging.INFO):
        assert data(rows(2, 2))._table("train").size == 4
    assert [one.getMessage() for one in caplog.records if "begins with" in one.getMessage()] == [
        "train: 2 of 4 pairs in which every completion begins with the whole prompt"
    ]
    assert not data(rows(3, 0, "Hi"))._table("train").remarks  # "Hi!", "Hi there"
    assert not data([rows(1, 0)[0] | {"rejected": " five"}])._table("train").remarks  # one side alone


def test_an_answer_that_repeats_the_question_is_counted(data) -> None:
    prompt = [{"role": "user", "content": LONG}]
    sides = {side: [{"role": "assistant", "content": f"{LONG} {side}"}] for side in PAIR}
    table = data([{"prompt": prompt, **sides}])._table("train")
    assert dict(table.remarks) == {"in which every completion begins with the whole question": 1}


def test_pairs_that_become_equal_are_counted_by_reason(data, caplog) -> None:
    given = [{"prompt": "p", "chosen": "a" * 50 + end, "rejected": "a" * 50} for end in ("", "b")]
    with caplog.at_level(logging.INFO):
        table = data([*given, {"prompt": "p", **PAIR}], max_length=20, truncation="truncate_completion")._table("train")
    lines = [one.getMessage() for one in caplog.records if "train:" in one.getMessage()]
    assert (table.size, table.identical, dict(table.dropped)) == (2, 1, {EQUAL_CUT: 1})
    assert f"train: 1 of 3 pairs dropped: {EQUAL_CUT}" in lines
    assert any("1 of 2 pairs have two equal completions; kept" in line for line in lines)
    grouped = data(
        [*given, {"prompt": "p", **PAIR}], max_length=20, truncation="truncate_completion", group_by_prompt=8
    )
    assert grouped._table("train").comparisons_count == 2
    assert "of which comparisons between equal completions are left out" in grouped._table("train").remarks


# --- whatever a format says -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Returns(PreferenceFormat):
    """A user's own, which says what it is told to."""

    said: Any = None

    @property
    def columns(self) -> tuple[str, ...]:
        return ("x",)

    def read(self, row: Any) -> Any:
        return self.said


BAD = [
    (None, "to return a `Preference`, a `Ranking` or `Skipped` but got None"),
    ({"prompt": "q"}, "to return a `Preference`"),
    (Preference(None, "a", "b"), "`prompt` is None"),
    (Preference("q", "a", [FOUR]), "`rejected` is messages"),
    (Preference("q", "a", 5), "`rejected` is 5"),
    (Preference("", "a", "b"), "text in `prompt` but it is empty"),
    (Preference("q", " ", "b"), "a completion in `chosen` but got ' '"),
    (Preference([], [FOUR], [FIVE]), "at least one message in `prompt`"),
    (Preference([ASK], [FOUR], []), "at least one message in `rejected`"),
    (Preference([{"content": "q"}], [FOUR], [FIVE]), "a `role` in message 0 of `prompt`"),
    (Preference(["q"], [FOUR], [FIVE]), "a `role` in message 0 of `prompt`"),
    (Preference([ASK], [{"role": "assistant"}], [FIVE]), "text as the `content` of message 0 of `chosen` but got None"),
    (Preference([ASK], [FOUR | {"content": PARTS}], [FIVE]), "text as the `content` of message 0 of `chosen`"),
    (
        Preference([ASK], [FOUR | {"images": ["x"]}], [FIVE]),
        "`tool_calls` in message 0 of `chosen` but it holds `images`",
    ),
    (Preference([ASK], [FOUR], [FIVE | {"function_call": {"name": "f"}}]), "but it holds `function_call`"),
    (Preference([ASK], [FOUR | {"content": " "}], [FIVE]), "an assistant message with text in `chosen`"),
    (Preference([ASK], [FOUR], [ASK | {"content": "r"}]), "an assistant message with text in `rejected`"),
    (
        Preference([ASK], [ASK, FOUR], [FIVE]),
        "only the completion in `chosen` but it begins with the messages of `prompt`",
    ),
    (Preference("q", "a", "b", {"weight": -5}), r"\[0, inf\] for the column `weight` but got -5"),
    (Preference("q", "a", "b", {"weight": float("nan")}), "column `weight` but got nan"),
    (Preference("q", "a", "b", {"x": None}), "column `x` but got None"),
    (Preference("q", "a", "b", None), "values by name in `columns` but got None"),
    (Preference([ASK], [FOUR], [FIVE], template=[1]), r"values by name in `template` but got \[1\]"),
    (Ranking("q", None, scores=[1, 2]), "a list of `completions` but got None"),
    (Ranking("q", ["a", None], scores=[1, 2]), r"`completions\[1\]` is None"),
    (Ranking("q", ["a", "\n"], scores=[1, 2]), r"a completion in `completions\[1\]`"),
    (Ranking([ASK], [[FOUR], [ASK, FIVE]], scores=[1, 2]), r"`completions\[1\]` but it begins with the messages"),
]


@pytest.mark.parametrize(("said", "words"), BAD)
def test_a_format_may_say_nothing_that_cannot_be_trained(said: Any, words: str, data) -> None:
    with pytest.raises(DataError, match=words):
        check_row(said, Comparing())
    with pytest.raises(DataError, match=rf"row 0 \(from 0\): .*{words}"):
        data([{"x": 1}], format=Returns(said))


def test_what_a_format_may_say() -> None:
    for said in (
        Preference([ASK], [FOUR, ASK, FIVE], [FIVE]),
        Preference([ASK, FOUR], [ASK, FIVE], [ASK, FOUR | {"content": "6"}]),
        Preference([ASK], [FOUR | {"role": "model"}], [FIVE]),
        Preference("q", "a", "b", {"weight": 0, "x": -3.5}),
    ):
        check_row(said, Comparing())


def test_every_layout_keeps_the_column_of_template_arguments() -> None:
    assert not [one for one in LAYOUTS if "chat_template_kwargs" in one.columns]
