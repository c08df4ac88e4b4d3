"""Rankings in the data module: which completions are compared, what is said, what travels along."""

from __future__ import annotations

import logging

import pytest

from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.data.formats import Preference, PreferenceFormat, Ranking, Rankings, Triples
from lit_dpo.errors import DataError

ROWS = [
    {"prompt": "q0", "completions": [" a", " b", " c", " d"], "stars": [3.0, 1.0, 4.5, 1.0], "w": 2.0},
    {"prompt": "q1", "completions": [" a", " b"], "stars": [1.0, 1.0], "w": 1.0},
    {"prompt": "q2", "completions": [" a", " b", " c"], "stars": [1.0, 2.0, 3.0], "w": 0.5},
]


@pytest.fixture
def data(jsonl, tokenizer_folder: str):
    path = jsonl("rankings.jsonl", ROWS)
    shared = {"train": path, "tokenizer": tokenizer_folder, "format": Rankings(scores="stars", weight="w")}
    return lambda **options: PreferenceDataModule(**{**shared, **options})


def table(module: PreferenceDataModule):
    module.setup("fit")
    return module._tables["train"]


def test_a_batch_is_what_the_rows_say(data, chat_tokenizer) -> None:
    module = data()
    batch = table(module).batch([1, 0])
    text = "q2 a<eos> b<eos> c<eos>q0 a<eos> b<eos> c<eos> d<eos>"
    assert chat_tokenizer.decode(batch.input_ids[0]) == text
    assert batch.comparisons.tolist() == [[2, 1], [2, 0], [1, 0], [2, 0], [2, 1], [2, 3], [0, 1], [0, 3]]
    assert batch.indices.tolist() == [2, 2, 2, 0, 0, 0, 0, 0]
    assert {name: column.tolist() for name, column in batch.columns.items()} == {
        "weight": [0.5] * 3 + [2.0] * 5,
        "score_margin": [1.0, 2.0, 1.0, 1.5, 3.5, 3.5, 2.0, 2.0],
    }
    assert module.preference("train", 2).scores == [1.0, 2.0, 3.0]
    assert [row for row, *_ in module.prompts("train", 5)] == [0, 2]


@pytest.mark.parametrize(
    ("options", "completions", "comparisons"),
    [
        ({"comparisons": "all"}, [4, 3], [5, 3]),
        ({"comparisons": "best_worst"}, [2, 2], [1, 1]),
        ({"comparisons": "best_rest"}, [4, 3], [3, 2]),
        ({"comparisons": "adjacent"}, [3, 3], [2, 2]),
        ({"comparisons": "all", "ties": "half"}, [4, 2, 3], [6, 1, 3]),
        ({"comparisons": "best_worst", "ties": "half"}, [2, 2, 2], [1, 1, 1]),
        ({"comparisons": "adjacent", "ties": "half"}, [4, 2, 3], [3, 1, 2]),
    ],
)
def test_options_decide_what_is_compared(data, options: dict, completions: list[int], comparisons: list[int]) -> None:
    module = data(**options)
    found = table(module)
    assert found.completions_per_prompt.tolist() == completions
    assert found.comparisons_per_prompt.tolist() == comparisons
    batch = found.batch(range(found.size))
    if "ties" in options:
        ties = batch.columns["score_margin"] == 0
        assert ties.any()
        assert batch.columns["probability"].equal(1 - ties.float() / 2)
    assert module.columns["train"] == {"weight", "score_margin"} | ({"probability"} if "ties" in options else set())


def test_a_row_where_all_tie_is_dropped_and_counted(data, caplog) -> None:
    with caplog.at_level(logging.INFO):
        table(data())
    assert "train: 1 of 3 prompts dropped: all completions tie" in caplog.text
    assert "train: 2 prompts with 7 completions and 8 comparisons; 0.39 of the tokens" in caplog.text  # 25 of 64
    with pytest.raises(DataError, match="no prompts are left, 1 of 1 prompts dropped: all completions tie"):
        table(data(train=[ROWS[1]]))


def test_the_numbers_of_comparisons_that_are_left_stay_theirs(data, caplog) -> None:
    """The best completion is too long, and the first comparisons go with it."""
    long = {**ROWS[0], "completions": [" a", " b", " c" * 50, " d"]}
    for options in ({}, {"group_by_prompt": 9}):
        with caplog.at_level(logging.INFO):
            batch = table(data(train=[long], max_length=20, **options)).batch([0])
        assert batch.comparisons.tolist() == [[0, 1], [0, 2]]
        assert batch.columns["score_margin"].tolist() == [2.0, 2.0]
        assert "train: 1 of 4 completions dropped with their comparisons" in caplog.text
        caplog.clear()


def test_an_option_that_the_data_cannot_feel_is_said(data, jsonl, caplog) -> None:
    pairs = [{"prompt": "q", "chosen": " a", "rejected": " b"}, {"prompt": "q2", "chosen": " a", "rejected": " b"}]
    options = {"train": jsonl("pairs.jsonl", pairs), "format": Triples(), "comparisons": "best_rest", "ties": "half"}
    with caplog.at_level(logging.INFO):
        module = data(**options)
        assert table(module).holds_pairs
    assert module.columns["train"] == frozenset()
    assert [line for line in caplog.messages if "changes nothing" in line] == [
        "train: `comparisons=best_rest` changes nothing, for no row ranks more than two completions",
        "train: `ties=half` changes nothing, for no row has scores or ranks",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        table(data(comparisons="best_rest", ties="half"))
    assert "changes nothing" not in caplog.text


def test_rankings_of_two_are_pairs(data) -> None:
    pairs = [{**row, "completions": row["completions"][:2], "stars": [1, 0]} for row in ROWS]
    ranked = table(data(train=pairs, format=Rankings(scores="stars")))
    lines = [{"prompt": row["prompt"], "chosen": " a", "rejected": " b", "m": 1} for row in ROWS]
    written = table(data(train=lines, format=Triples(score_margin="m")))
    assert ranked.summary == written.summary == "3 pairs"
    assert ranked.digest == written.digest


def test_a_bad_ranking_stops_before_training_with_file_and_row(data, jsonl) -> None:
    path = jsonl("bad.jsonl", [*ROWS, {**ROWS[0], "stars": [1.0]}])
    with pytest.raises(DataError, match=r"bad.jsonl, row 3 \(from 0\): Expected a number in `stars` for each of the 4"):
        table(data(train=path))


class Annotators(PreferenceFormat):
    """A format of one's own: who prefers what, and how sure they are; a row of one comparison is a pair."""

    @property
    def columns(self) -> tuple[str, ...]:
        return "prompt", "completions", "said"

    def read(self, row) -> Preference | Ranking:
        said = [(int(better), int(worse)) for better, worse, _ in row["said"]]
        if len(said) == 1:
            ((better, worse),) = said
            pair = row["completions"][better], row["completions"][worse]
            return Preference(row["prompt"], *pair, {"probability": row["said"][0][2]})
        sure = [probability for *_, probability in row["said"]]
        return Ranking(row["prompt"], row["completions"], comparisons=said, columns={"probability": sure})


def test_a_format_may_say_itself_what_is_compared(data) -> None:
    lines = [
        {"prompt": "q0", "completions": [" a", " b", " c"], "said": [[0, 2, 0.75], [2, 0, 0.5], [0, 2, 1.0]]},
        {"prompt": "q1", "completions": [" a", " b"], "said": [[1, 0, 0.25]]},
    ]
    batch = table(data(train=lines, format=Annotators())).batch([0, 1])
    assert batch.completions_per_prompt.tolist() == [2, 2]  # nothing is compared with b
    assert batch.comparisons.tolist() == [[0, 1], [1, 0], [0, 1], [0, 1]]
    assert batch.columns["probability"].tolist() == [0.75, 0.5, 1.0, 0.25]
    wrong = [{**lines[0], "said": [[0, 3, 1.0], [0, 1, 1.0]]}]
    with pytest.raises(DataError, match=r"row 0 \(from 0\): Expected comparisons .* among 3 completions"):
        table(data(train=wrong, format=Annotators()))
