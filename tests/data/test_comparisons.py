"""From scores and ranks to comparisons."""

from __future__ import annotations

from itertools import permutations

import pytest

from lit_dpo.data.comparisons import Comparing, check_row
from lit_dpo.data.formats import Preference, Ranking
from lit_dpo.errors import DataError

CHOICES = ["all", "best_worst", "best_rest", "adjacent"]
NAMES = ["a", "b", "c", "d"]


def ranking(**given) -> Ranking:
    return Ranking("q", NAMES, **given)


def compared(row: Ranking, *options: str) -> list[str]:
    """`"ab"`: a is preferred to b."""
    return [
        row.completions[better] + row.completions[worse] for better, worse in Comparing(*options).of(row).comparisons
    ]


STRICT = [3, 1, 2, 4]  # b > c > a > d


@pytest.mark.parametrize(
    ("choice", "pairs"),
    [
        ("all", ["bc", "ba", "bd", "ca", "cd", "ad"]),
        ("best_worst", ["bd"]),
        ("best_rest", ["bc", "ba", "bd"]),
        ("adjacent", ["bc", "ca", "ad"]),
    ],
)
def test_a_strict_order_is_compared_as_the_choice_says(choice: str, pairs: list[str]) -> None:
    assert compared(ranking(ranks=STRICT), choice) == pairs
    assert compared(ranking(scores=[-rank for rank in STRICT]), choice) == pairs
    assert compared(ranking(ranks=STRICT), choice, "half") == pairs


@pytest.mark.parametrize(
    ("choice", "dropped", "ties"),
    [
        # a = c > b = d
        ("all", ["ab", "ad", "cb", "cd"], ["ac", "bd"]),
        ("best_worst", ["ad"], []),  # the first of the best, the last of the worst
        ("best_rest", ["ab", "ad"], ["ac"]),
        ("adjacent", ["cb"], ["ac", "bd"]),
    ],
)
def test_ties_are_left_out_or_half(choice: str, dropped: list[str], ties: list[str]) -> None:
    row = ranking(ranks=[1, 2, 1, 2])
    assert compared(row, choice) == dropped
    assert set(compared(row, choice, "half")) == {*dropped, *ties}
    half = Comparing(choice, "half").of(row)
    said = dict(zip(compared(row, choice, "half"), half.columns["probability"], strict=True))
    assert said == {**dict.fromkeys(dropped, 1.0), **dict.fromkeys(ties, 0.5)}
    assert "probability" not in Comparing(choice).of(row).columns


@pytest.mark.parametrize("choice", CHOICES)
def test_where_all_tie_nothing_is_compared_unless_ties_are_half(choice: str) -> None:
    row = ranking(scores=[2, 2, 2, 2])
    assert compared(row, choice) == []
    assert len(compared(row, choice, "half")) == {"all": 6, "best_worst": 1}.get(choice, 3)
    assert set(Comparing(choice, "half").of(row).columns["probability"]) == {0.5}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("scores", [[0.1, 4, 2.5, -3], [1, 2, 3, 4]])
def test_the_order_of_the_completions_does_not_matter(choice: str, scores: list[float]) -> None:
    """Nor does it for their margins."""
    found = set()
    for order in permutations(range(4)):
        row = Ranking("q", [NAMES[place] for place in order], scores=[scores[place] for place in order])
        margins = Comparing(choice).of(row).columns["score_margin"]
        found.add(frozenset(zip(compared(row, choice), margins, strict=True)))
    assert len(found) == 1


def test_all_without_ties_is_the_same_for_every_order_of_the_completions() -> None:
    scores = [1, 2, 1, 3]
    found = {
        frozenset(compared(Ranking("q", [NAMES[p] for p in order], scores=[scores[p] for p in order])))
        for order in permutations(range(4))
    }
    assert found == {frozenset({"da", "db", "dc", "ba", "bc"})}


def test_score_margins_are_differences_of_scores() -> None:
    columns = Comparing("all").of(ranking(scores=[0.5, 2.0, -1.0, 1.0])).columns
    assert columns == {"score_margin": [1.0, 1.5, 3.0, 0.5, 2.0, 1.5]}
    assert Comparing("all").of(ranking(ranks=STRICT)).columns == {}


def test_a_number_of_the_row_is_each_comparison_s() -> None:
    assert Comparing("adjacent").of(ranking(ranks=STRICT, columns={"weight": 2})).columns == {"weight": [2.0] * 3}
    given = [(0, 1), (3, 2)]
    assert Comparing("best_worst", "half").of(ranking(comparisons=given, columns={"weight": [1, 2], "x": 5})) == (
        given,
        {"weight": [1.0, 2.0], "x": [5.0, 5.0]},
    )
    assert Comparing().of(Preference("q", "a", "b", {"x": 1})) == (((0, 1),), {"x": [1.0]})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (Ranking("q", ["a"], scores=[1]), "at least two completions but got 1"),
        (ranking(), "one of `scores`, `ranks` and `comparisons` but got none"),
        (ranking(scores=STRICT, ranks=STRICT), "but got scores and ranks"),
        (ranking(scores=[1, 2, 3]), "as many scores as completions but got 3 for 4"),
        (ranking(ranks=[1, 2, 3, float("nan")]), "finite numbers as ranks but got nan"),
        (ranking(scores=[1, 2, 3, None]), "finite numbers as scores but got None"),
        (ranking(scores=STRICT, columns={"score_margin": 1.0}), "no column `score_margin`"),
        (ranking(scores=STRICT, columns={"probability": 1.0}), "no column `probability`"),
        (ranking(scores=STRICT, columns={"weight": [1.0] * 6}), "one number for the row in the column `weight`"),
        (
            ranking(scores=STRICT, columns={"weight": -1.0}),
            r"number in \[0, inf\] for the column `weight` but got -1.0",
        ),
        (ranking(comparisons=[]), "at least one comparison"),
        (ranking(comparisons=[(0, 4)]), r"among 4 completions but got \(0, 4\)"),
        (ranking(comparisons=[(1, 1)]), "two different places"),
        (ranking(comparisons=[(0, 1, 2)]), "two different places"),
        (ranking(comparisons=[(0, 1), (1, 2)], columns={"weight": [1.0]}), "each of the 2 comparisons .* but got 1"),
        (ranking(comparisons=[(0, 1)], columns={"probability": [2.0]}), "`probability` but got 2.0"),
        (Ranking("q", ["a", [{"role": "assistant", "content": "b"}]], scores=[1, 2]), "all as text"),
        (Preference("q", "a", None), "all as text"),
    ],
)
def test_a_row_that_does_not_hold_together_is_refused(row: Ranking, words: str) -> None:
    with pytest.raises(DataError, match=words):
        check_row(row, Comparing("all", "half"))
