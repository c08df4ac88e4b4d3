"""The page of an ablation: its figures are the summary's, it says what was tested, and it stands in a browser."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest

from browser import look
from lit_dpo.tools.ablate.records import ArmSummary, Comparison, Estimate, Layout, Result, RunSummary, Summary
from lit_dpo.tools.measures.summary import summarise
from lit_dpo.tools.reports.ablation import curves, frontier, page, vocabulary
from lit_dpo.tools.reports.ablation.paired import probability
from lit_dpo.tools.reports.ablation.vocabulary import COLUMNS, arms
from lit_dpo.tools.reports.planes import Scale, line, named, scale
from measures.made_summary import made_inputs, made_summary

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> \u202e \x1b[31m"
NAN = math.nan


class _Read(HTMLParser):
    """Tables as rows of cells, each with its attributes and its text; and all text that is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.tables, self.said, self._quiet, self._cell = [], [], False, None

    def handle_starttag(self, tag, attrs):
        self._quiet = self._quiet or tag == "style"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []
            self.tables[-1][-1].append((dict(attrs), self._cell))

    def handle_endtag(self, tag):
        self._quiet = self._quiet and tag != "style"
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        if not self._quiet:
            self.said.append(data)
            if self._cell is not None:
                self._cell.append(data)


def read(source: str) -> _Read:
    reader = _Read()
    reader.feed(source)
    return reader


@pytest.fixture(scope="module")
def summary() -> Summary:
    return made_summary()


def _number(said: str) -> float:
    return float(said.replace("−", "-").replace(",", "").replace(" %", ""))


def test_every_figure_of_the_table_is_the_summarys(summary):
    table = read(page(summary)).tables[0]
    titles = ["".join(text) for _, text in table[0]]
    assert titles == ["arm", "seeds", *(one.title for one in COLUMNS)]
    accuracies = [_number(row[2][1][0]) for row in table[1:]]
    assert accuracies == sorted(accuracies, reverse=True)
    seen = 0
    for arm, row in zip(arms(summary), table[1:], strict=True):
        assert f"{arm.number}{arm.name}" in "".join(row[0][1])
        assert row[1][1] == [str(len(arm.summary.seeds))]
        for column, (attributes, text) in zip(COLUMNS, row[2:], strict=True):
            given = arm.summary.measures[column.key]
            exact = [float(part) for part in re.findall(r"[-\d.e]+", attributes["title"].replace(" to ", " "))]
            finite = [end for end in given if math.isfinite(end)]
            assert exact == finite
            shown, step = _number(text[0]) * column.unit, _step(text[0]) * column.unit
            assert shown == pytest.approx(given.value, abs=step * 0.51)
            for end, number in zip(given[1:], _ends(shown, text[1:], column.unit), strict=True):
                assert number == pytest.approx(end, abs=step * 1.02, nan_ok=True)
            seen += 1
    assert seen == len(summary.arms) * len(COLUMNS)


def _step(said: str) -> float:
    return 10.0 ** -len(said.replace(" %", "").partition(".")[2])


def _ends(value: float, text: list[str], unit: float) -> tuple[float, float]:
    if not text:
        return NAN, NAN
    if text[0].startswith("± "):
        half = _number(text[0][2:]) * unit
        return value - half, value + half
    low, high = (_number(part) * unit for part in text[0].split(" to "))
    return low, high


def test_the_verdict_names_those_that_the_tests_do_not_tell_apart(summary):
    best, *others = arms(summary)
    alike = {
        one.name
        for one in others
        for test in summary.comparisons
        if test.measure == "reward_accuracy" and {test.arm, test.other} == {best.summary.name, one.summary.name}
        if test.p_holm >= 0.05
    }
    assert 0 < len(alike) < len(others)
    (said,) = re.findall(r'<p class="verdict">(.*?)</p>', page(summary))
    named_there = re.split(r", (?=\w+, β)| and ", re.sub("<.*?>", "", said.partition("on these pairs: ")[2]).strip("."))
    assert set(named_there) == alike
    assert f">{best.name}</b>" in said


def test_where_all_are_as_good_none_is_called_the_best(summary):
    same = [one._replace(measures={"reward_accuracy": Estimate(1.0, 1.0, 1.0)}) for one in summary.arms]
    source = page(summary._replace(arms=same))
    assert "All have the same held-out reward accuracy, 100.0 %" in source
    assert "<b>100.0 %</b>" not in source


def test_a_difference_is_seen_from_the_best_arm_whichever_way_it_was_tested(summary):
    turned = [
        one._replace(arm=one.other, other=one.arm, difference=Estimate(*(-one.difference[at] for at in (0, 2, 1))))
        for one in summary.comparisons
    ]

    def words(given: Summary) -> list[str]:
        return re.findall(r"<li>(?:Above|Below|Cannot).*?</li>", page(given))

    assert len(words(summary)) == 33  # eleven others, by three measures
    assert words(summary) == words(summary._replace(comparisons=turned))


def _bare(*arms_: ArmSummary, runs=(), **kwargs) -> Summary:
    given = {"failed": [], "comparisons": [], "losses": [], "margins": {}, "pairs": 9, "prompts": 9, **kwargs}
    return Summary(runs=runs, arms=arms_, **given)


def test_what_is_missing_is_a_dash_or_left_out_and_never_a_nan():
    nothing = Estimate(NAN, NAN, NAN)
    one = ArmSummary("a", {"loss": "a"}, "a", [0], {"reward_accuracy": Estimate(0.5, NAN, NAN), "kl": nothing})
    other = ArmSummary("b", {"loss": "b"}, "b", [0], {"margin": Estimate(0.0, 0.0, 0.0), "loss/x": nothing})
    curve = Result("a", {"loss": "a"}, 0, "done", curves=[{"step": 1.0, "train/loss": NAN}, {"epoch": 1.0}])
    margins = {"a": {"edges": [0.0, 1.0], "counts": [0]}, "b": {"edges": [-1.0, 1.0], "counts": [3]}}
    given = _bare(one, other, runs=[RunSummary(curve, {})], margins=margins, losses=["x"])
    shown = read(page(given))
    assert not re.search(r"\b(nan|inf|None)\b", " ".join(shown.said), re.IGNORECASE)
    rows = [["".join(text) for _, text in row] for row in shown.tables[0]]
    assert rows == [["arm", "seeds", "accuracy", "margin"], ["1a", "1", "50.0 %", "–"], ["2b", "1", "–", "0.00± 0.00"]]
    for section in ("What accuracy costs", "Curves", "Trained with", "Completions", "Can they be told apart?"):
        assert section not in shown.said
    failed = Result("c", {}, 0, "failed", error="Expected `x` but got y.")
    assert "Expected `x` but got y." in read(page(_bare(failed=[failed]))).said


def test_a_difference_without_a_number_is_said_to_be_none():
    """And one whose interval is missing is drawn as a dot alone; arms that are not on the page are not compared."""
    arm, other, third = (
        ArmSummary(
            name, {"beta": beta}, name, [0], {"reward_accuracy": Estimate(at, NAN, NAN), "kl": Estimate(1, NAN, NAN)}
        )
        for name, beta, at in (("a", "0.1", 0.9), ("b", "0.5", 0.8), ("c", "0.9", 0.7))
    )
    differences = [
        Comparison("reward_accuracy", "a", "b", Estimate(NAN, NAN, NAN), NAN, NAN),
        Comparison("reward_accuracy", "a", "c", Estimate(0.2, NAN, NAN), NAN, NAN),
        Comparison("margin", "gone", "lost", Estimate(0.2, 0.1, 0.3), 0.01, 0.01),
    ]
    curve = Result("a", {"beta": "0.1"}, 0, "done")
    completions = [{"prompt": "Why?", "policy": text, "reference": "So."} for text in ("First.", "Second.")]
    runs = [RunSummary(curve._replace(completions=completions), {})]
    shown = read(page(_bare(arm, other, third, runs=runs, comparisons=differences)))
    said = " ".join(shown.said)
    assert re.search(r"Not compared with .*: there is no number", said)
    assert re.search(r"Cannot be told from .*: 20.0 points", said)
    assert "no p" in said
    assert "gone" not in said
    assert not re.search(r"\b(nan|inf)\b", said)
    assert ("First." in said, "Second." in said) == (True, False)  # of a prompt that was sampled twice
    assert (probability(NAN), probability(1e-9)) == ("no p", "p < 0.001")


def test_a_measure_that_is_defined_nowhere_is_a_number():
    mine = vocabulary.column("of_mine")
    assert (mine.title, mine.better) == ("of mine", 0)
    assert mine.written(0.25, 1.0) == ["0.250", "1.000"]


def test_a_short_logarithmic_axis_has_a_tick_and_one_point_is_a_dot():
    assert Scale(2.1, 2.9, log=True).ticks() == [2.1, 2.9]
    x = Scale(0.0, 2.0)
    assert "small-dot" in str(line([(1.0, 1.0), (NAN, 1.0)], x, x, "mine"))


def test_the_lines_that_compute_it_again_give_the_accuracies(summary, tmp_path):
    layout = Layout(tmp_path)
    for name, table in made_inputs()[1].items():
        layout.run(name).mkdir(parents=True)
        pq.write_table(table, layout.run(name) / "pairs.parquet")
    (source,) = re.findall(r'<pre class="card"><code>(.*?)</code>', page(summary), re.DOTALL)
    (code,) = read(source).said
    lines = f"{code}\nimport json; print(json.dumps(accuracy.to_dict()))"
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {run.result.name: pytest.approx(run.measures["reward_accuracy"].value) for run in summary.runs}


def test_curves_are_means_over_seeds_with_their_lowest_and_highest():
    runs = [
        Result("", {}, seed, "done", curves=[{"step": step, "train/loss": step * (seed + 1)} for step in (1.0, 2.0)])
        for seed in range(3)
    ]
    assert curves.over_seeds(runs, "train/loss") == [(1.0, 2.0, 1.0, 3.0), (2.0, 4.0, 2.0, 6.0)]
    many = Result("", {}, 0, "done", curves=[{"step": float(step), "x": float(step)} for step in range(1, 1001)])
    thin = curves.over_seeds([many], "x")
    assert len(thin) <= 80
    assert np.mean([point.mean for point in thin]) == pytest.approx(500.5, rel=0.01)


def test_no_point_beats_one_of_the_frontier_and_each_other_is_beaten():
    points = [(round(random.Random(n).random(), 1), round(random.Random(-n).random(), 1)) for n in range(60)]
    best = frontier.pareto(points)

    def beats(one, other):
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    front = {points[at] for at in best}
    assert not [p for p in front if any(beats(other, p) for other in points)]
    assert all(p in front or any(beats(other, p) for other in front) for p in points)


@pytest.mark.parametrize("given", [[0.0], [1.0, 1.0], [-3.0, 5.0], [1e-6, 2.0], [1e-9, 2e-9], [999.0, 1001.0, NAN]])
def test_an_axis_holds_its_values_and_has_a_few_ticks(given):
    axis = scale(given)
    assert isinstance(axis, Scale)
    places = [axis.at(value) for value in given if math.isfinite(value)]
    assert all(0 <= place <= 100 for place in places)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 12
    assert len({axis.at(tick) for tick in ticks}) == len(ticks)
    assert scale([NAN]) is None


def test_names_lie_on_no_dot_and_on_no_other_name():
    points = [(random.Random(n).uniform(0, 100), random.Random(n + 99).uniform(0, 100)) for n in range(20)]
    found = named(points, [(f"name {n}", "") for n in range(20)], 900, 400, "")
    boxes = []
    for one in found:
        left, top, down, across = map(
            float, re.findall(r"left:(\S+)%;top:(\S+)%;margin:(\S+)px 0 0 (\S+)px", one.source)[0]
        )
        (side,) = re.findall(r"mark (\w+)", one.source)
        width = 6.6 * len("name 10") + 4
        x = left * 9 + across - {"right": 0, "left": width}.get(side, width / 2)
        boxes.append((x, top * 4 + down - 8, x + width, top * 4 + down + 8))
    dots = [(a * 9 - 5, b * 4 - 5, a * 9 + 5, b * 4 + 5) for a, b in points]
    assert len(found) > 12
    for n, box in enumerate(boxes):
        assert not [
            o for o in [*boxes[:n], *dots] if box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3]
        ]


MEASURED = """
    cut: [...inside.querySelectorAll("h1, h2, h3, p, .card, figure, .plane, .tick, .mark, .row-name")].filter(
      (one) => (right(one) > width || one.getBoundingClientRect().left < 0) && !one.closest(".scroll")).length,
    over: (() => {
      const boxes = [...inside.querySelectorAll(".plane")].flatMap((plane) => {
        const texts = [...plane.querySelectorAll(".tick, .mark, .name, .row-name")];
        const seen = texts.map((one) => one.getBoundingClientRect()).filter((box) => box.width);
        return seen.flatMap((a, i) => seen.slice(0, i).filter((b) => a.left < b.right - 1 && b.left < a.right - 1 &&
          a.top < b.bottom - 1 && b.top < a.bottom - 1));
      });
      return boxes.length;
    })(),
    plots: [...inside.querySelectorAll("svg")].filter((one) => one.getBoundingClientRect().width < 60).length,
    marks: [...inside.querySelectorAll(".mark")].filter((one) => one.getBoundingClientRect().width).length,
    text: inside.body.innerText"""


def test_the_page_in_a_browser(summary, tmp_path):
    """It fits, no text of a plot lies on another, and nothing of what data, models or errors say runs."""
    results, tables = made_inputs()
    said = [{"prompt": HOSTILE, "reference": HOSTILE, "policy": HOSTILE, "judged": 0.5}]
    results = [one._replace(completions=said, error=one.error and HOSTILE) for one in results]
    few = [one for one in results if one.seed == 0 and one.axes["beta"] == "0.5"][:2]
    few = [one._replace(axes={"<b>" + HOSTILE: one.axes["loss"]}) for one in few]
    two = summarise(few, {one.name: tables[one.name] for one in few})
    big = page(summary._replace(runs=[one._replace(result=r) for one, r in _same(summary, results)], failed=[
        one for one in results if one.status == "failed"]))  # fmt: skip
    for seen, marks in zip(
        look([(big, 1200), (big, 390), (page(two), 390)], tmp_path, MEASURED), (6, 4, 2), strict=True
    ):
        assert "owned" not in (seen["title"], seen["own"])
        assert (seen["fits"], seen["cut"], seen["over"], seen["plots"], seen["scripts"]) == (True, 0, 0, 0, 0)
        assert seen["marks"] >= marks
        assert "<script>document.title='owned'</script>" in seen["text"]
        assert "\\u202e \\x1b[31m" in seen["text"]


def _same(summary: Summary, results: list[Result]):
    by_name = {one.name: one for one in results}
    return [(one, by_name[one.result.name]) for one in summary.runs]
