from __future__ import annotations

from dataclasses import dataclass

import pytest

from lit_dpo.data.formats import Preference, PreferenceFormat, Ranking, Rankings, Triples
from lit_dpo.errors import DataError

USER = {"role": "user", "content": "2 + 2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}


def test_columns_are_named_by_configuration() -> None:
    row = {"request": "q", "better": "a", "worse": "b"}
    assert Triples("request", chosen="better", rejected="worse").read(row) == Preference("q", "a", "b")
    assert Triples("request", chosen="worse", rejected="better").read(row) == Preference("q", "b", "a")


def test_messages_are_kept_without_the_nulls_that_arrow_adds() -> None:
    row = {"prompt": [{**USER, "name": None}], "chosen": [FOUR], "rejected": [{**FIVE, "tool_calls": None}]}
    preference = Triples().read(row)
    assert preference == Preference([USER], [FOUR], [FIVE])
    assert preference.is_conversation


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, ["`prompt`", "empty"]),
        ({"prompt": None}, ["`prompt`", "null"]),
        ({"chosen": None}, ["`chosen`", "null"]),
        ({"chosen": " \n"}, ["`chosen`", "completion"]),
        ({"rejected": ""}, ["`rejected`", "completion"]),
        ({"rejected": 4}, ["`rejected`", "int 4"]),
        ({"chosen": [FOUR]}, ["`prompt` is text", "`chosen` is messages"]),
        ({"chosen": [USER, FOUR]}, ["`chosen` is messages", "whole conversation"]),
    ],
)
def test_a_bad_text_cell_is_named(change: dict, words: list[str]) -> None:
    with pytest.raises(DataError) as error:
        Triples().read({"prompt": "q", "chosen": "a", "rejected": "b"} | change)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": []}, ["`prompt`", "empty"]),
        ({"prompt": [{"role": "user"}]}, ["message 0 of `prompt`", "`content`"]),
        ({"prompt": [{"from": "human", "value": "q"}]}, ["message 0 of `prompt`", "`role`"]),
        ({"prompt": ["q"]}, ["message 0 of `prompt`"]),
        ({"chosen": [{"role": "assistant", "content": None}]}, ["message 0 of `chosen`", "text"]),
        ({"chosen": [{"role": "assistant", "content": [{"type": "text"}]}]}, ["message 0 of `chosen`", "text"]),
        ({"chosen": [{"role": "assistant", "content": " "}]}, ["`chosen`", "assistant message with text"]),
        ({"rejected": [{"role": "tool", "content": "x"}]}, ["`rejected`", "assistant message with text"]),
        ({"rejected": [USER, FIVE]}, ["`rejected`", "only the completion", "prompt column"]),
    ],
)
def test_a_bad_conversation_is_named(change: dict, words: list[str]) -> None:
    with pytest.raises(DataError) as error:
        Triples().read({"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]} | change)
    assert all(word in str(error.value) for word in words), error.value


def test_one_column_for_two_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="different column names"):
        Triples(chosen="prompt")


def test_a_format_of_ones_own_needs_no_registration() -> None:
    @dataclass(frozen=True)
    class Pairs(PreferenceFormat):
        @property
        def columns(self) -> tuple[str, ...]:
            return ("answers",)

        def read(self, row) -> Preference:
            return Preference("q", *row["answers"])

    assert Pairs().read({"answers": ["a", "b"]}) == Preference("q", "a", "b")


@pytest.mark.parametrize("cell", [0.25, "0.25", 1, "1"])
def test_numbers_are_read_from_the_columns_that_are_named(cell) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "share": cell}
    assert Triples(probability="share").read(row).columns == {"probability": float(cell)}
    assert Triples(probability="share").columns == ("prompt", "chosen", "rejected", "share")
    assert Triples(weight="share").read(row) == Preference("q", "a", "b", {"weight": float(cell)})
    assert Triples(score_margin="share").read(row) == Preference("q", "a", "b", {"score_margin": float(cell)})
    assert Triples(numeric_columns=["share"]).read(row).columns == {"share": float(cell)}
    assert Triples(numeric_columns={"difficulty": "share"}).read(row).columns == {"difficulty": float(cell)}
    assert Triples().read(row) == Preference("q", "a", "b")


@pytest.mark.parametrize(
    ("column", "cell", "words"),
    [
        ("weight", -1, "a number >= 0 in `x` but got -1"),
        ("weight", None, "a number >= 0 in `x` but got nothing"),
        ("probability", 1.5, r"a number in \[0, 1\] in `x` but got 1.5"),
        ("probability", True, r"a number in \[0, 1\] in `x` but got True"),
        ("score_margin", "high", "a number in `x` but got 'high'"),
        ("score_margin", float("nan"), "a number in `x` but got nan"),
    ],
)
def test_a_bad_number_is_named(column: str, cell, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Triples(**{column: "x"}).read({"prompt": "q", "chosen": "a", "rejected": "b", "x": cell})


# --- rankings ---------------------------------------------------------------------------------------------------------

ROW = {"prompt": "q", "completions": ["a", "b", "c"], "scores": [1, 3.5, 2], "rank": [2, 1, 1], "w": "0.5", "x": 7}


def test_rankings_are_read_from_lists() -> None:
    assert Rankings().read(ROW) == Ranking("q", ["a", "b", "c"], scores=[1.0, 3.5, 2.0])
    read = Rankings(scores=None, ranks="rank", weight="w", numeric_columns={"y": "x"}).read(ROW)
    assert read == Ranking("q", ["a", "b", "c"], ranks=[2.0, 1.0, 1.0], columns={"weight": 0.5, "y": 7.0})
    assert Rankings(scores=None, ranks="rank", weight="w").columns == ("prompt", "completions", "rank", "w")


def test_rankings_of_messages_are_kept_without_the_nulls_that_arrow_adds() -> None:
    row = {"prompt": [USER], "completions": [[FOUR], [{**FIVE, "name": None}]], "scores": [1, 0]}
    assert Rankings(scores="scores").read(row) == Ranking([USER], [[FOUR], [FIVE]], scores=[1.0, 0.0])
    assert Rankings(scores="scores").read(row).is_conversation


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, "text in `prompt` but it is empty"),
        ({"prompt": None}, "`prompt` but got nothing"),
        ({"completions": "abc"}, "a list in `completions` but got str 'abc'"),
        ({"completions": None}, r"a list in `completions` but got nothing \(null\)"),
        ({"completions": ["a"], "scores": [1]}, "at least two completions in `completions` but got 1"),
        ({"completions": ["a", " ", "c"]}, r"a completion in `completions\[1\]` but got ' '"),
        ({"completions": ["a", None, "c"]}, r"`completions\[1\]` but got nothing"),
        ({"completions": ["a", [FOUR], "c"]}, r"text in `completions\[1\]`, as in `prompt`, but it is messages"),
        ({"prompt": [USER], "completions": [[FOUR], [USER], [FIVE]]}, r"only the completion in `completions\[1\]`"),
        ({"prompt": [USER], "completions": [[FOUR], [], [FIVE]]}, r"at least one message in `completions\[1\]`"),
        ({"scores": [1, 2]}, "a number in `scores` for each of the 3 completions in `completions` but got 2"),
        ({"scores": 4}, "a list in `scores` but got int 4"),
        ({"scores": [1, None, 2]}, r"a number in `scores\[1\]` but got nothing"),
        ({"scores": [1, 2, float("inf")]}, r"a number in `scores\[2\]` but got inf"),
        ({"scores": [1, 2, True]}, r"a number in `scores\[2\]` but got True"),
        ({"w": -1}, "a number >= 0 in `w` but got -1"),
    ],
)
def test_a_bad_ranking_is_named(change: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Rankings(scores="scores", weight="w").read(ROW | change)


def test_rankings_need_one_column_of_values_and_different_names() -> None:
    for options in ({"scores": None}, {"ranks": "b"}):
        with pytest.raises(ValueError, match="one of `scores` and `ranks`"):
            Rankings(**options)
    with pytest.raises(ValueError, match="different column names"):
        Rankings(scores="prompt")
    with pytest.raises(ValueError, match="numeric_columns"):
        Rankings(scores="s", numeric_columns=["score_margin"])
