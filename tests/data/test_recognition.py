"""Which layout is chosen, what is refused, and what cells may hold."""

from __future__ import annotations

import re

import pytest
from layout_table import FOLDER, rendered, written

from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.data.formats import (
    Auto,
    ImplicitPrompt,
    LabelledPairs,
    OneRight,
    RankedObjects,
    SafeRLHF,
    ShareGPT,
    Transcripts,
    Triples,
)
from lit_dpo.data.formats.recognition import LAYOUTS, option, recognise
from lit_dpo.data.formats.turns import messages, tools_in
from lit_dpo.data.sources import load_rows
from lit_dpo.errors import DataError

PAIR = {"chosen": "a", "rejected": "b"}


def stop(rows: list[dict]) -> str:
    with pytest.raises(DataError) as error:
        recognise("f.jsonl", rows)
    return str(error.value)


def test_two_that_fit_are_both_named() -> None:
    message = stop([{"prompt": "p", "question": "q", **PAIR}])
    assert message == (
        "f.jsonl: the rows fit 2 layouts: name the one that is meant with `--data.format Triples` or "
        "`--data.format Triples --data.format.prompt question`."
    )


def test_conversations_written_as_strings_are_no_text() -> None:
    rows = [{name: str([{"role": "user", "content": "q"}, {"role": "assistant", "content": name}]) for name in PAIR}]
    assert recognise("f", rows) == ImplicitPrompt()
    assert written(recognise("f", rows).read(rows[0]).chosen) == "chosen"
    assert "fit 2 layouts" in stop([{"prompt": "q", **rows[0]}])  # three texts, for all that is known


def test_none_that_fits_shows_what_was_seen_and_the_nearest() -> None:
    message = stop([{"ask": "p", "good": "a", "bad": ["b"], "turns": [{"role": "user", "content": "x"}], "n": 1}])
    for words in ("`ask` (text)", "`bad` (list)", "`turns` (messages)", "`n` (int)", "nearest", "is missing"):
        assert words in message
    message = stop([{"prompt": "p", "chosen": "a", "rejected": 4}])
    assert "`--data.format Triples`: row 0 (from 0): Expected text or a list of messages in `rejected`" in message


def test_some_bad_rows_hide_no_layout() -> None:
    good, bad = {"prompt": "p", **PAIR}, {"prompt": None, **PAIR}
    assert recognise("f", [bad, good, good]) == Triples()
    assert recognise("f", [good, bad]) == Triples()  # and the bad row is named when it is read
    assert "no known layout" in stop([bad, good, bad])


def test_one_that_reads_more_of_the_row_is_taken() -> None:
    assert option(recognise("f", [{"question": "q", **PAIR}])) == "--data.format Triples --data.format.prompt question"
    assert option(recognise("f", [{"question": "q", "system": "s", **PAIR}])) == "--data.format Orca"
    assert recognise("f", [{"prompt": "q", "system": "s", **PAIR}]).read({"prompt": "q", "system": "s", **PAIR}).prompt


@pytest.mark.parametrize("column", ["images", "videos", "history"])
def test_what_belongs_to_the_prompt_and_is_not_read_is_named(column: str) -> None:
    message = stop([{"prompt": "q", column: ["x"], **PAIR}])
    assert f"does not read `{column}`" in message
    assert "`--data.format Triples`" in message
    assert recognise("f", [{"prompt": "q", column: [], **PAIR}]) == Triples()


def test_labels_that_may_mean_either_are_not_guessed() -> None:
    rows = [{"instruction": "q", "output_1": "a", "output_2": "b", "preference": label} for label in (0, 1, 1)]
    assert "nothing says which answer is better" in stop(rows)
    assert recognise("f", [*rows, {**rows[0], "preference": 2}]) == LabelledPairs()
    row = rows[1]
    for coding, ranks in (("first", [1, 2]), ("second", [2, 1])):
        assert LabelledPairs(coding=coding).read(row).ranks == ranks
        assert LabelledPairs(coding=coding).read({**row, "preference": True}).ranks == ranks
        assert LabelledPairs(coding=coding).read({**row, "preference": "0.5"}).ranks == [1, 1]
    share = LabelledPairs(coding="first", probability=True).read({**row, "preference": [0, 0, 1, 0]})
    assert (written(share.chosen), share.columns) == ("b", {"probability": 0.75})
    for coding, label in (("1_2", 3), ("1_2", True), ("first", 2), ("second", "A"), ("1_2", None), ("1_2", [1, "x"])):
        with pytest.raises(DataError, match="`preference`"):
            LabelledPairs(coding=coding).read({**row, "preference": label})


def test_with_an_option_it_is_triples() -> None:
    rows = [{"request": "q", **PAIR, "question": "x"}]
    assert Auto(prompt="request").of("f", rows) == Triples("request")
    assert Auto(weight="w", numeric_columns=["n"]).of("f", rows) == Triples(weight="w", numeric_columns=["n"])
    with pytest.raises(DataError, match="2 layouts"):
        Auto().of("f", rows)


def test_files_of_two_layouts_are_refused(tools_folder) -> None:
    files = [str(FOLDER / f"{name}.jsonl") for name in ("orca", "shp")]
    with pytest.raises(DataError, match=re.escape(f"{files[0]} is read by `--data.format Orca` and {files[1]} by")):
        PreferenceDataModule(train=files, tokenizer=tools_folder).setup("fit")


def test_train_and_val_may_have_two(tools_folder) -> None:
    train, val = (str(FOLDER / f"{name}.jsonl") for name in ("orca", "alpaca"))
    module = PreferenceDataModule(train=train, val=val, tokenizer=tools_folder)
    module.setup("fit")
    assert [option(module._table(one).formats[0]).split()[1] for one in ("train", "val")] == ["Orca", "Alpaca"]


def test_whatever_a_row_holds_a_reader_reads_it_or_says_why_not() -> None:
    """Each reader on the rows of every file, and on these with spoilt cells: no error but a `DataError`."""
    for file in FOLDER.glob("*.jsonl"):
        (source,) = load_rows(str(file), None)
        for row in source.rows:
            spoilt = [dict.fromkeys(row, cell) for cell in (None, "", 3, [{}], [[1]], "[{", {"text": {}})]
            for format in LAYOUTS:
                for cells in (row, *spoilt):
                    assert isinstance(format.fits([cells]), bool)


# --- cells ------------------------------------------------------------------------------------------------------------

ASK = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("format", "row", "words"),
    [
        (ImplicitPrompt(), {"chosen": [ASK], "rejected": [ASK]}, "a user's message before"),
        (
            ImplicitPrompt(),
            {"chosen": [ASK, ASK], "rejected": [ASK, ASK]},
            "assistant's message at the end of `chosen`",
        ),
        (ImplicitPrompt(), {"prompt": "z?", "chosen": [ASK, ASK], "rejected": [ASK, ASK]}, "`prompt` to be in what"),
        (ImplicitPrompt(), {"prompt": [ASK], "chosen": [ASK, ASK], "rejected": [ASK]}, "begin with `prompt`"),
        (ImplicitPrompt(), {"chosen": "a", "rejected": "b"}, "a list of messages in `chosen`"),
        (Transcripts(), {"chosen": "a", "rejected": "b"}, "a transcript in `chosen`"),
        (ShareGPT(), {"conversations": [{"from": "alien", "value": "q"}], **PAIR}, "a role in message 0"),
        (ShareGPT(), {"conversations": [ASK], "chosen": [ASK], "rejected": "b"}, "only the completion in `chosen`"),
        (ShareGPT(), {"conversations": [ASK], **PAIR, "tools": "x"}, "list of tools in `tools`"),
        (SafeRLHF(), {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 2}, "0 or 1 in"),
        (RankedObjects(), {"context": "q", "completions": [{"completion": "a"}] * 2}, r"`completions\[0\].rank`"),
        (OneRight(), {"question": "q", "answers": {"a": "1", "b": "2"}, "correct_answer": "c"}, "one of them 'c'"),
    ],
)
def test_a_bad_cell_is_named(format, row: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        format.read(row)


def test_the_safer_one_by_option() -> None:
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1}
    assert SafeRLHF().read(row).ranks == [1, 2]
    assert SafeRLHF(by="safer").read(row).ranks == [2, 1]
    assert SafeRLHF(by="safer").columns[-1] == "safer_response_id"


def test_messages_are_read_however_they_are_written() -> None:
    expected = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    human = [{"from": "human", "value": "q", "weight": None}, {"from": "gpt", "value": "a", "id": "7"}]
    parts = [{"role": one["role"], "content": [{"type": "text", "text": one["content"]}]} for one in expected]
    for cell in (expected, human, parts, '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'):
        assert messages("c", cell) == expected
    assert messages("c", repr(expected)) == expected  # as pandas writes a list to `.csv`
    assert messages("c", {"from": "human", "value": "q"}) == expected[:1]
    with pytest.raises(DataError, match="it holds image_url"):
        messages("c", [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}])
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert messages("c", [{"role": "assistant", "content": None, "tool_calls": [call]}])[0]["tool_calls"] == [call]
    padded = {**call, "function": {"name": "f", "arguments": {"a": 1, "of_another_row": None}}, "id": None}
    (found,) = messages("c", [{"role": "assistant", "content": None, "tool_calls": [padded]}])
    assert found["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    assert messages("c", [{"from": "function_call", "value": "Action: f"}])[0]["content"] == "Action: f"


def test_tools_are_read_however_they_are_written() -> None:
    function = {"name": "f", "parameters": {}}
    wrapped = [{"type": "function", "function": function}]
    text = '[{"name": "f", "parameters": {}}]'
    for cell in (function, [function], wrapped, text, [text[1:-1]], [{**function, "strict": None}]):
        assert tools_in("tools", {"tools": cell}) == {"tools": wrapped}
    for cell in (None, "", [], "[]"):
        assert tools_in("tools", {"tools": cell}) == {}


def test_tools_of_explicit_conversations_are_trained_on(jsonl, tools_folder) -> None:
    sides = {name: [{"role": "assistant", "content": name}] for name in PAIR}
    rows = [{"prompt": [ASK], **sides, "tools": [{"name": name, "parameters": {}}]} for name in ("f", "g")]
    module = PreferenceDataModule(train=jsonl("a.jsonl", rows), tokenizer=tools_folder, group_by_prompt=4)
    module.setup("fit")
    table = module._table("train")
    decode = module.loaded_tokenizer.decode
    assert [decode(ids) for _, ids, _ in table.prompts(9)] == [
        rendered(f"T: {name} | U: q", start=True) for name in "fg"
    ]
    text = jsonl("b.jsonl", [{"prompt": "q", **PAIR, "tools": [{"name": "f"}]}])
    with pytest.raises(DataError, match="tools given with text"):
        PreferenceDataModule(train=text, tokenizer=tools_folder).setup("fit")


def test_tools_that_the_template_does_not_read_are_refused(tokenizer_folder) -> None:
    file = str(FOLDER / "sharegpt_tools.jsonl")
    with pytest.raises(DataError, match=r"row 0 .*the chat template does not read the row's `tools`"):
        PreferenceDataModule(train=file, tokenizer=tokenizer_folder).setup("fit")
