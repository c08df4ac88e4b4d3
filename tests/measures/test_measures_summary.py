"""The summary, recomputed from its own files by a few lines of pandas, and what must not change it."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from made_summary import BETAS, LOSSES, made_inputs, made_pairs, made_result
from rich.console import Console

from lit_dpo.errors import TrainingError
from lit_dpo.tools.ablate.records import Estimate, Layout, Result
from lit_dpo.tools.measures.definitions import MEASURES, families, measure
from lit_dpo.tools.measures.markdown import escaped, report
from lit_dpo.tools.measures.paired import COMPARED, MOST_ARMS, Arm, compared
from lit_dpo.tools.measures.pairs import read
from lit_dpo.tools.measures.summary import summarise
from lit_dpo.tools.measures.writing import FILES, table, write


@pytest.fixture(scope="module")
def inputs():
    return made_inputs()


@pytest.fixture(scope="module")
def summary(inputs):
    return summarise(*inputs)


@pytest.fixture(scope="module")
def written(inputs, summary, tmp_path_factory):
    layout = Layout(tmp_path_factory.mktemp("ablation") / "new")
    write(layout, summary, inputs[1])
    return layout


def _recomputed(pairs: pd.DataFrame) -> dict[str, float]:
    """As a reader of `pairs.parquet` would do it."""
    chosen = pairs.chosen_logps - pairs.reference_chosen_logps
    rejected = pairs.rejected_logps - pairs.reference_rejected_logps
    n_chosen, n_rejected = pairs.chosen_length, pairs.rejected_length
    margin, per_token = chosen - rejected, chosen / n_chosen - rejected / n_rejected
    wins, total = (margin > 0) + 0.5 * (margin == 0), n_chosen + n_rejected
    sure = 1 / (1 + np.exp(-(pairs.beta * margin).abs()))
    bins = np.minimum(np.floor((sure - 0.5) * 20), 9)
    return {
        "reward_accuracy": wins.mean(),
        "reward_accuracy_normalized": (per_token > 0).mean(),
        "margin": margin.mean(),
        "margin_per_token": per_token.mean(),
        "kl": (pairs.chosen_kl + pairs.rejected_kl).sum() / total.sum(),
        "displacement": chosen.sum() / n_chosen.sum(),
        "displaced": (chosen < 0).mean(),
        "calibration_error": (wins - sure).groupby(bins).sum().abs().sum() / len(pairs),
        "reward_accuracy/source=wiki": wins[pairs.source == "wiki"].mean(),
        "reward_accuracy/length=chosen_longer": wins[n_chosen > n_rejected].mean(),
        "reward_accuracy/length=short": wins[total <= total.quantile(1 / 3)].mean(),
        **{name: pairs[name].mean() for name in pairs if name.startswith(("loss/", "weight/"))},
    }


def test_figures_are_recomputed_from_the_pairs(written):
    pairs, runs, arms = (pd.read_parquet(written.root / f"{name}.parquet") for name in ("pairs", "runs", "runs"))
    assert len(pairs) == 23 * 90
    runs = runs[runs.status == "done"].set_index("run")
    for run, those in pairs.groupby("run", sort=False):
        for name, value in _recomputed(those).items():
            assert runs.loc[run, name] == pytest.approx(value, rel=1e-9), (run, name)
            assert runs.loc[run, f"{name}_low"] <= value <= runs.loc[run, f"{name}_high"] or "calibration" in name
    arms = pd.read_csv(written.root / "arms.csv").set_index("arm")
    for arm, those in runs.groupby("arm", sort=False):
        values = those["margin"]
        assert arms.loc[arm, "margin"] == pytest.approx(values.mean())
        if len(values) == 2:  # t(0.975, 1) = 12.7062, s/√2 is half of the difference
            half = 12.7062 * abs(values.iloc[0] - values.iloc[1]) / 2
            assert arms.loc[arm, "margin_high"] == pytest.approx(values.mean() + half, rel=1e-5)


def test_differences_are_recomputed_from_the_pairs(written):
    """Of two arms with two seeds each: mean over the seeds, by pair; prompts are resampled by another generator."""
    pairs = pd.read_parquet(written.root / "pairs.parquet")
    tests = pd.read_csv(written.root / "comparisons.csv")
    margin = (pairs.chosen_logps - pairs.reference_chosen_logps) - (
        pairs.rejected_logps - pairs.reference_rejected_logps
    )
    wins = (margin > 0).groupby([pairs.run.str.replace(r",seed=\d", "", regex=True), pairs["index"]]).mean()
    prompts = pairs.drop_duplicates("index").set_index("index").prompt
    one, other = "loss=ipo,beta=0.05", "loss=sft,beta=0.05"
    difference = wins[one] - wins[other]
    row = tests[(tests.measure == "reward_accuracy") & (tests.arm == one) & (tests.other == other)].iloc[0]
    assert row.difference == pytest.approx(difference.mean())
    by_prompt = difference.groupby(prompts).agg(["sum", "size"])
    drawn = [by_prompt.sample(frac=1, replace=True, random_state=seed).sum() for seed in range(1000)]
    low, high = np.quantile([draw["sum"] / draw["size"] for draw in drawn], [0.025, 0.975])
    assert (row.difference_low, row.difference_high) == pytest.approx((low, high), abs=0.015)
    of_measure = tests[tests.measure == "reward_accuracy"].sort_values("p")
    assert len(of_measure) == 12 * 11 / 2
    steps = (of_measure.p * np.arange(len(of_measure), 0, -1)).cummax().clip(upper=1)
    np.testing.assert_allclose(of_measure.p_holm, steps)


def test_the_order_of_rows_runs_and_sets_does_not_matter(inputs, summary):
    results, tables = inputs
    shuffled = {}
    for number, (name, pairs) in enumerate(reversed(tables.items())):
        order = np.random.default_rng(number).permutation(pairs.num_rows)
        shuffled[name] = pairs.take(order)
    again = summarise(results, shuffled)
    for run, other in zip(summary.runs, again.runs, strict=True):
        _same(run.measures, other.measures)
    for arm, other in zip(summary.arms, again.arms, strict=True):
        _same(arm.measures, other.measures)
    for one, other in zip(summary.comparisons, again.comparisons, strict=True):
        assert one == other
    assert again.margins == summary.margins


def _same(one, other):
    """To the last digit."""
    assert [*one] == [*other]
    for name, estimate in one.items():
        np.testing.assert_array_equal(estimate, other[name], err_msg=name)


def test_equal_arms_are_not_told_apart(inputs):
    pairs = made_pairs("ipo", 0.05, 0)
    arms = [Arm(name, 0.8, {0: read(pairs), 1: read(pairs)}) for name in ("a", "b", "c")]
    for one in compared(arms):
        assert one.difference == Estimate(0.0, 0.0, 0.0)
        assert one.p == one.p_holm == 1.0


def test_runs_with_other_pairs_are_compared_on_common_ones():
    """One arm lost rows, and its seeds hold out different prompts."""
    whole, other = read(made_pairs("ipo", 0.05, 0)), read(made_pairs("sft", 0.05, 0))
    first, last = np.arange(0, 50), np.arange(40, 90)
    arms = [Arm("a", 0.8, {0: whole, 1: whole}), Arm("b", 0.5, {0: other.take(first), 1: other.take(last)})]
    found = {one.measure: one for one in compared(arms)}
    wins = [(pairs.margins > 0).astype(float) for pairs in (whole, other)]
    expected = np.mean([(wins[0][rows] - wins[1][rows]).mean() for rows in (first, last)])
    assert found["reward_accuracy"].difference.value == pytest.approx(expected)
    assert found["reward_accuracy"].difference.low < expected < found["reward_accuracy"].difference.high
    apart = [Arm("a", 0.8, {0: whole.take(first[:40])}), Arm("b", 0.5, {0: other.take(last)})]
    assert compared(apart) == []
    assert compared([Arm("a", 0.8, {0: whole}), Arm("b", 0.8, {1: whole})]) == []


def test_many_arms_are_compared_with_the_first_and_the_best():
    pairs = [read(made_pairs(name, beta, seed)) for name in LOSSES for beta in BETAS for seed in (0, 1)][
        : MOST_ARMS + 2
    ]
    arms = [Arm(str(place), 0.9 if place == 5 else math.nan, {0: one}) for place, one in enumerate(pairs)]
    found = compared(arms)
    assert len(found) == len(COMPARED) * (2 * (len(arms) - 1) - 1)
    assert {one.arm for one in found} == {"0", "5"}
    assert len({frozenset((one.arm, one.other)) for one in found}) == len(found) / len(COMPARED)


def test_many_arms_are_said_to_be_compared_with_two(inputs):
    """In the file of the summary, and a measure that an arm has not is a dash."""
    one = made_result("dpo", 0.05, 0)
    arms = [one._replace(name=str(place), axes={"r": str(place)}) for place in range(MOST_ARMS + 1)]
    found = summarise(arms, {one.name: made_pairs("dpo", 0.05 + place / 50, 0) for place, one in enumerate(arms)})
    without = found.arms[1]._replace(measures={"reward_accuracy": found.arms[1].measures["reward_accuracy"]})
    said = report(found._replace(arms=[found.arms[0], without, *found.arms[2:]]))
    assert f"These are more than {MOST_ARMS} arms: each is compared with the first and with the most accurate" in said
    assert "| – |" in said


def test_a_loss_without_numbers_stays_without(inputs):
    result = made_result("dpo", 0.05, 0)
    pairs = made_pairs("dpo", 0.05, 0)
    pairs = pairs.append_column("loss/tdpo", pa.array([math.nan] * pairs.num_rows))
    found = summarise([result], {result.name: pairs})
    assert all(math.isnan(value) for value in found.arms[0].measures["loss/tdpo"])
    assert "tdpo" in found.losses
    assert found.comparisons == []
    assert "| – |" in report(found)


def test_a_run_without_pairs_or_completions_has_what_it_has():
    found = summarise(
        [Result("seed=0", {}, 0, "done", seconds=2.0, tokens=10), Result("x", {}, 1, "failed", "No.")], {}
    )
    assert [*found.runs[0].measures] == ["seconds", "tokens_per_second", "peak_memory"]
    assert found.runs[0].measures["tokens_per_second"].value == 5.0
    assert found.arms[0].name == "base"
    assert (found.pairs, found.margins, found.comparisons) == (0, {}, [])
    assert "- x: No." in report(found)
    assert table(found).row_count == 2


def test_margins_are_counted_in_the_same_bins(inputs, summary):
    edges = {tuple(one["edges"]) for one in summary.margins.values()}
    assert len(edges) == 1
    assert 0.0 in next(iter(edges))
    for arm in summary.arms:
        assert sum(summary.margins[arm.name]["counts"]) == 90 * len(arm.seeds)
    one = summary.margins["loss=dpo,beta=0.5"]
    below = sum(count for count, edge in zip(one["counts"], one["edges"], strict=False) if edge < 0)
    margins = np.concatenate([read(inputs[1][f"loss=dpo,beta=0.5,seed={seed}"]).margins for seed in (0, 1)])
    assert below == (margins < 0).sum()


def test_every_measure_is_defined(summary):
    for one in (*summary.runs, *summary.arms):
        for name, estimate in one.measures.items():
            assert measure(name).formula
            assert measure(name).possible(estimate) == pytest.approx(estimate, nan_ok=True)
    assert len({one.name for one in (*MEASURES, *families())}) == len(MEASURES) + 4
    with pytest.raises(KeyError):
        measure("loss/")


# ---- files ----


def test_all_files_are_there_or_none(inputs, summary, written, tmp_path):
    assert {path.name for path in written.root.iterdir()} == {*FILES}
    before = {name: (written.root / name).read_bytes() for name in FILES}
    write(written, summary, inputs[1])
    assert before == {name: (written.root / name).read_bytes() for name in FILES}
    broken = summary._replace(comparisons=[1])
    with pytest.raises(AttributeError):
        write(written, broken, inputs[1])
    assert before == {name: (written.root / name).read_bytes() for name in FILES}
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match="Cannot write"):
        write(Layout(tmp_path / "file"), summary, inputs[1])


def test_rows_name_what_is_varied(written, summary):
    runs = pd.read_csv(written.root / "runs.csv")
    assert len(runs) == 24
    assert sorted(runs.beta) == [0.05] * 12 + [0.5] * 12  # numbers
    assert (runs.status == "failed").sum() == 1
    assert runs[runs.status == "failed"].error.iloc[0].startswith("Expected `x`")
    assert runs[runs.status == "failed"].reward_accuracy.isna().all()
    strange = Result("seed=2", {"seed": "a", "loss": 'b,"c"'}, 2, "done")
    found = summarise([strange], {})
    assert "axis_seed" in _written(found, written.root.parent / "strange")


def _written(summary, root):
    write(Layout(root), summary, {})
    return pd.read_csv(root / "runs.csv").columns


def test_markdown_shows_texts_as_they_are(summary, tmp_path):
    text = report(summary)
    assert "Expected \\`x\\` &gt; 0 but got \\*0\\* \\| &lt;b&gt;." in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    bars = {line.replace("\\|", "").count("|") for line in lines if line.startswith("| loss=ipo,beta=0.05 |")}
    assert bars <= {line.count("|") for line in lines if line.startswith("| arm")}
    assert escaped("a\n| b\x1b[31m") == "a \\| b\\\\x1b\\[31m"
    best = max(summary.arms, key=lambda arm: arm.measures["reward_accuracy"].value)
    assert lines[2].startswith(f"| {escaped(best.name)} |")
    assert f"- {best.name} is better than loss=sft,beta=0.5 by " in text


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_fits_a_terminal(summary, width):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table(summary))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert lines[1].split()[:2] == ["arm", "accuracy"]
    assert lines[2].startswith("loss=ipo,beta=0.05 ")
    assert "±" in lines[2]
    assert "…" not in console.file.getvalue()


def test_every_measure_is_on_the_page_that_defines_them():
    page = (Path(__file__).parents[2] / "docs" / "measures.md").read_text()
    for one in (*MEASURES, *families()):
        formula = one.formula.replace("|", "\\|")
        assert f"| `{one.name}` | {one.unit} | {one.better} | {formula} | {one.says} |" in page


def test_a_policy_that_is_its_reference_is_at_one_half():
    """All pairs tie: accuracy ½, calibrated, nothing displaced."""
    pairs = made_pairs("dpo", 0.05, 0)
    for side in ("chosen", "rejected"):
        place = pairs.column_names.index(f"{side}_logps")
        pairs = pairs.set_column(place, f"{side}_logps", pairs.column(f"reference_{side}_logps"))
    found = summarise([made_result("dpo", 0.05, 0)], {made_result("dpo", 0.05, 0).name: pairs}).arms[0].measures
    for name, value in {
        "reward_accuracy": 0.5,
        "reward_accuracy_normalized": 0.5,
        "margin": 0.0,
        "displaced": 0.0,
    }.items():
        assert found[name] == Estimate(value, value, value), name
    assert found["calibration_error"].value == 0
    assert found["reward_accuracy/length=long"].value == 0.5
