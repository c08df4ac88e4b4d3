"""Every layout in which preferences are stored: recognised with no option typed, and read as a person would."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.data.formats import (
    Auto,
    ImplicitPrompt,
    LabelledPairs,
    OneRight,
    Preference,
    RankedObjects,
    SafeRLHF,
    ShareGPT,
    Skipped,
    Transcripts,
    Triples,
)
from lit_dpo.data.formats.recognition import LAYOUTS, option, recognise
from lit_dpo.data.formats.turns import messages, tools_in
from lit_dpo.data.sources import load_rows
from lit_dpo.errors import DataError
from toy_tokenizers import CHAT, byte_level

FOLDER = Path(__file__).parent / "layouts"
TOOLS = "{% if tools %}{{ '<|system|>' + tools[0]['function']['name'] + '<|end|>\\n' }}{% endif %}"
ROLES = {"system": "S", "user": "U", "assistant": "A", "tool": "O"}

SUMS, ICE, FIRE = ("U: 2 + 2?", "4", "5"), ("U: Ice is?", "cold", "warm"), ("U: Fire is?", "hot", "wet")
ICE_LATER = ("U: Hi | A: Hello! | U: Ice is?", "cold", "warm")
POST = "SUBREDDIT: r/math\n\nTITLE: Sums\n\nPOST: I add 2 and 2.\n\nTL;DR:"
LABELLED = [("U: 2 + 2?", ["4", "5"], [1, 2]), ("U: Ice is?", ["warm", "cold"], [2, 1])]
TIE = ("U: Fire is?", ["hot", "warm"], [1, 1])

# by the name of the file: what the command line would say, and what each of its rows says. Messages are `ROLE: text`,
# tools `T: name`, completions of the assistant alone their text. Pairs are (prompt, chosen, rejected), rankings
# (prompt, completions, ranks or scores or comparisons), rows that prefer nothing their reason.
EXPECTED: dict[str, tuple[str, list[Any]]] = {
    "explicit_text": (
        "Triples",
        [
            ("Q: 2 + 2?\nA:", " 4", " 5"),
            ("Q: Capital of France?\nA:", " Paris", " Lyon"),
            ("Q: Ice is?\nA:", " cold", " warm"),
        ],
    ),
    "explicit_conversations": (
        "Triples",
        [
            ("S: Be brief. | U: 2 + 2?", "4", "It is five."),
            ("U: Hi | A: Hello! | U: 2 + 2?", "4", "5"),
            ICE,
        ],
    ),
    "question_and_sides": (
        "Triples --data.format.prompt question",
        [("2 + 2?", " 4", " 5"), ("Ice is?", " cold", " warm"), ("Fire is?", " hot", " wet")],
    ),
    "implicit_prompt": (
        "ImplicitPrompt",
        [SUMS, ICE_LATER, ("U: Hi", "A: Hello! | U: Bye | A: Goodbye", "A: What? | U: Bye | A: No")],
    ),
    "ultrafeedback_binarized": ("ImplicitPrompt", [SUMS, ICE, FIRE]),
    "prompt_beside_answers": ("ImplicitPrompt", [SUMS, ICE, FIRE]),
    "typed_parts": (
        "ImplicitPrompt --data.format.chosen chosen_messages --data.format.rejected rejected_messages",
        [(f"S: Be brief. | {prompt}", *sides) for prompt, *sides in (SUMS, ICE, FIRE)],
    ),
    "transcripts": (
        "Transcripts",
        [
            SUMS,
            ICE_LATER,
            ("U: Hi", "A: Hello! | U: Bye | A: Goodbye", "A: What? | U: Never mind | A: Good"),
            "a completion is empty",
            ("U: Hi", "Hello!\n\nCan I help?", "What?"),
        ],
    ),
    "sharegpt_objects": (
        "ShareGPT",
        [SUMS, ("S: Be brief. | U: Hi | A: Hello! | U: Ice is?", "cold", "warm"), FIRE],
    ),
    "sharegpt_lists": ("ShareGPT", [("S: Be brief. | U: 2 + 2?", "4", "5"), ICE, FIRE]),
    "sharegpt_tools": (
        "ShareGPT",
        [
            ("T: add | U: 2 + 2?", "I add.", "5"),
            ("T: add | U: 2 + 2? | A: add({'a': 2}) | O: {\"sum\": 4}", "4", "5"),
            ICE,
        ],
    ),
    "when2call_pairs": (
        "ShareGPT --data.format.conversations messages --data.format.chosen chosen_response"
        " --data.format.rejected rejected_response",
        [("T: add | U: 2 + 2?", "I add.", "5"), ICE, FIRE],
    ),
    "when2call_choices": (
        "OneRight",
        [
            ("T: add | U: 2 + 2?", ["I cannot.", "4", "Which 2?", "<add>"], [(3, 0), (3, 1), (3, 2)]),
            ("U: Ice is?", ["I cannot.", "cold", "Which ice?"], [(1, 0), (1, 2)]),
            ("U: Fire is?", ["I cannot.", "wet"], [(0, 1)]),
        ],
    ),
    "alpaca": ("Alpaca", [("U: Add.\n2, 2", "4", "5"), ICE, FIRE]),
    "alpaca_history": (
        "Alpaca",
        [("S: Be brief. | U: 2 + 2? | A: 4 | U: And 3 + 3?", "6", "7"), ICE, FIRE],
    ),
    "alpaca_outputs": (
        "AlpacaOutputs",
        [
            ("U: Add.\n2, 2", ["4", "5"], [1, 2]),
            ("U: Ice is?", ["cold", "cool", "warm"], [1, 2, 3]),
            ("U: Fire is?", ["hot", "wet"], [1, 2]),
        ],
    ),
    "orca": (
        "Orca",
        [("S: Be brief. | U: 2 + 2?", "4", "It is five."), ICE, ("S: Be kind. | U: Fire is?", "hot", "wet")],
    ),
    "orca_input": (
        "Orca --data.format.question input",
        [("S: Be brief. | U: 2 + 2?", "4", "It is five."), ICE, ("S: Be kind. | U: Fire is?", "hot", "wet")],
    ),
    "stack_exchange": ("StackExchange", [SUMS, ("U: 2 + 2?", "4", "fish"), ICE]),
    "stack_exchange_scores": (
        "RankedObjects --data.format.prompt question --data.format.completions answers --data.format.text text"
        " --data.format.rank null --data.format.score pm_score",
        [
            ("U: 2 + 2?", ["4", "5", "fish"], [5, 0, 0]),
            ("U: Ice is?", ["warm", "cold"], [-1, 3]),
            TIE,
        ],
    ),
    "shp": (
        "SHP",
        [
            ("U: 2 + 2?", ["5", "4"], [2, 1]),
            ("U: Ice is?", ["cold", "warm"], [1, 2]),
            ("U: Fire is?", ["wet", "hot"], [2, 1]),
        ],
    ),
    "safe_rlhf": (
        "SafeRLHF",
        [*LABELLED, ("U: Fire is?", ["hot", "wet"], [1, 2])],
    ),
    "helpsteer2": (
        "SignedPairs",
        [
            ("U: 2 + 2?", ["4", "5"], [3, 0]),
            ("U: Ice is?", ["warm", "cold"], [0, 2]),
            ("U: Fire is?", ["hot", "warm"], [0, 0]),
            ("U: Hi | A: Hello! | U: 2 + 2?", ["5", "4"], [0, 1]),
        ],
    ),
    "helpsteer3": (
        "SignedPairs --data.format.prompt context --data.format.first response1 --data.format.second response2"
        " --data.format.preference overall_preference",
        [
            ("U: 2 + 2?", ["4", "5"], [2, 0]),
            ("U: Hi | A: Hello! | U: Ice is?", ["warm", "cold"], [0, 1]),
            ("U: Fire is?", ["hot", "warm"], [0, 0]),
        ],
    ),
    "openai": ("OpenAIPreferences", [SUMS, ICE, FIRE]),
    "nemo": (
        "RankedObjects",
        [
            ("U: 2 + 2?", ["4", "5"], [0, 1]),
            ("U: Hi | A: Hello! | U: Ice is?", ["cold", "cool", "warm"], [0, 1, 2]),
            ("U: Fire is?", ["hot", "wet"], [0, 1]),
        ],
    ),
    "nectar": (
        "RankedObjects --data.format.prompt prompt --data.format.completions answers --data.format.text answer",
        [
            ("U: 2 + 2?", ["4", "fish", "5"], [1, 3, 2]),
            ("U: Hi | A: Hello! | U: Ice is?", ["warm", "cold"], [2, 1]),
            ("U: Fire is?", ["hot", "wet"], [1, 2]),
        ],
    ),
    "ultrafeedback": (
        "RankedObjects --data.format.prompt instruction --data.format.text response --data.format.rank null"
        " --data.format.score overall_score",
        [
            ("U: 2 + 2?", ["4", "5", "4, I think", "fish"], [9, 2, 7.5, 1]),
            ("U: Ice is?", ["cold", "cool", "warm", "hot"], [8, 8, 2, 1]),
            ("U: Fire is?", ["hot", "warm", "red", "big"], [5, 5, 5, 5]),
        ],
    ),
    "webgpt": (
        "WebGPT",
        [
            ("U: 2 + 2?", ["4", "5"], [1, -1]),
            ("U: Ice is?", ["warm", "cold"], [-0.5, 0.5]),
            ("U: Fire is?", ["hot", "warm"], [0, 0]),
        ],
    ),
    "summaries": (
        "SummaryComparisons",
        [
            (POST, [" 4 comes out.", " 5 comes out."], [1, 2]),
            (POST, [" Fish.", " Someone adds."], [2, 1]),
            ("Ice is cold, they say.\n\nTL;DR:", [" Ice is cold.", " Ice is warm."], [1, 2]),
        ],
    ),
    "arena": (
        "Arena",
        [
            *LABELLED,
            TIE,
            "both completions are said to be bad",
            ("U: Hi", ["A: What? | U: Bye | A: No", "A: Hello! | U: Bye | A: Goodbye"], [2, 1]),
        ],
    ),
    "labelled": ("LabelledPairs", [("U: Add.\n2, 2", ["4", "5"], [1, 2]), LABELLED[1], TIE]),
    "labelled_shares": ("LabelledPairs", [*LABELLED, TIE]),
    "labelled_annotators": ("LabelledPairs", [*LABELLED, TIE]),
    "labelled_names": (
        "LabelledPairs --data.format.prompt prompt --data.format.first response_a --data.format.second response_b"
        " --data.format.label winner",
        [*LABELLED, TIE],
    ),
    "trees": (
        "Trees",
        [
            ("U: Hi", ["Hello!", "What?"], [0, 1]),
            ("U: Hi | A: Hello! | U: Ice is?", ["warm", "cold"], [1, 0]),
            ("U: Hi | A: What? | U: Fire is?", ["hot", "wet", "red"], [0, 2, 1]),
            ("U: 2 + 2?", ["4", "5"], [0, 1]),
            "no two answers are ranked",
        ],
    ),
    "rankings": (
        "Rankings",
        [
            ("2 + 2?", [" 4", " 5", " fish"], [2, 0.5, 0]),
            ("Ice is?", [" warm", " cold"], [0, 1]),
            ("Fire is?", [" hot", " warm"], [1, 1]),
        ],
    ),
}


def written(part: Any, template: Any = ()) -> str:
    """Messages as `EXPECTED` has them."""
    if isinstance(part, str):
        return part
    said = [f"T: {one['function']['name']}" for one in dict(template).get("tools", ())]
    for one in part:
        calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in one.get("tool_calls", ())]
        said.append(f"{ROLES[one['role']]}: {one['content'] or ', '.join(calls)}")
    return said[0][3:] if len(said) == 1 and part[0]["role"] == "assistant" else " | ".join(said)


def said(row: Any) -> Any:
    """What a row says as `EXPECTED` has it."""
    if isinstance(row, Skipped):
        return row.reason
    prompt = written(row.prompt, row.template)
    if isinstance(row, Preference):
        return prompt, written(row.chosen), written(row.rejected)
    worth = next(one for one in (row.scores, row.ranks, row.comparisons) if one is not None)
    return prompt, [written(one) for one in row.completions], worth


def rendered(text: str, start: bool) -> str:
    """What the tests' chat template makes of messages as `EXPECTED` has them."""
    names = {"S": "system", "T": "system", "U": "user", "A": "assistant"}
    turns = [f"<|{names[one[0]]}|>{one[3:]}<|end|>\n" for one in text.split(" | ")]
    return "".join(turns) + "<|assistant|>" * start


def test_each_layout_has_a_file() -> None:
    assert {file.stem for file in FOLDER.glob("*.jsonl")} == set(EXPECTED)
    recognised = {f"--data.format {typed}" for typed, _ in EXPECTED.values()}
    forms = {type(one).__name__ for one in LAYOUTS}
    assert {one.split()[1] for one in recognised} == forms


@pytest.fixture(scope="module")
def tools_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level(chat_template=TOOLS + CHAT).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_layout_is_recognised_and_read(name: str, tools_folder: str, caplog) -> None:
    typed, rows = EXPECTED[name]
    module = PreferenceDataModule(train=str(FOLDER / f"{name}.jsonl"), tokenizer=tools_folder)
    with caplog.at_level(logging.INFO):
        module.setup("fit")
    (line,) = (one.getMessage() for one in caplog.records if "read by" in one.getMessage())
    assert line.startswith(f"train: read by `--data.format {typed}`")
    table = module._table("train")
    assert [said(table.format.read(row)) for row in table.sources[0].rows] == rows

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


# --- recognition ------------------------------------------------------------------------------------------------------

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
    assert [option(module._table(one).format).split()[1] for one in ("train", "val")] == ["Orca", "Alpaca"]


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
        assert "no known layout fits" in stop(source.head(100))
