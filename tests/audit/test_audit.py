"""`lit-dpo audit`, as a user types it: labels that were turned round come first, and its files train again."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_dpo.cli import main
from lit_dpo.errors import LitDPOError
from lit_dpo.tools.audit.command import audit
from lit_dpo.tools.audit.dynamics import Dynamics, score
from lit_dpo.tools.audit.verdicts import EASY, FLIPPED, HARD, UNMOVED, judge

HOSTILE = "[bold]x[/] \x1b[31m \u202e <b>"
FIT = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0"]


def rows() -> list[dict[str, str]]:
    """What is right is plain; text that would steer a terminal is among it."""
    said = random.Random(0)
    return [
        {
            "prompt": f"Is {number} a number? {HOSTILE if number % 9 == 0 else ''}",
            "chosen": said.choice([" Yes.", " Yes, yes.", " Oh yes!"]),
            "rejected": said.choice([" No.", " No, no.", " Oh no!"]),
        }
        for number in range(60)
    ]


def turned(row: dict[str, str]) -> dict[str, str]:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


@pytest.fixture(scope="module")
def flipped():
    return set(random.Random(1).sample(range(60), 6))


@pytest.fixture(scope="module")
def run(tiny_model, flipped, tmp_path_factory):
    """A run of the command on pairs of which a tenth are turned round."""
    folder = tmp_path_factory.mktemp("audited")
    pairs = [turned(row) if number in flipped else row for number, row in enumerate(rows())]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    options = ["--model.loss.beta=1", "--model.policy.quantization=none", "--model.optimizer=torch.optim.AdamW"]
    main(
        [
            *("fit", f"--model.policy.model={tiny_model}", *options, "--model.optimizer.lr=3e-3"),
            *(f"--data.train={folder / 'pairs.jsonl'}", "--data.batch_size=6", "--trainer.max_epochs=2", *FIT),
            *("--trainer.callbacks+=TrainingDynamics", f"--trainer.logger.save_dir={folder / 'runs'}"),
            "--trainer.log_every_n_steps=50",
        ]
    )
    return folder / "runs" / "version_0"


@pytest.fixture(scope="module")
def audited(run, tmp_path_factory):
    """What the command writes."""
    out = tmp_path_factory.mktemp("out")
    main(["audit", str(run), "--out", str(out), "--hard-weight", "0.5"])
    return out


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_labels_that_were_turned_round_come_first(run, audited, flipped):
    scores = pq.read_table(audited / "scores.parquet").to_pandas()
    first = set(scores["index"][:6])
    assert len(first & flipped) >= 5  # chance finds 0.6 of them
    said = [row for row in lines(audited / "relabel.jsonl") if row["verdict"] == FLIPPED]
    assert {row["index"] for row in said} <= first
    assert len({row["index"] for row in said} & flipped) >= 5


def test_rows_to_label_again_are_the_files_own(run, audited):
    there = lines(run.parents[1] / "pairs.jsonl")
    for rank, row in enumerate(lines(audited / "relabel.jsonl")):
        assert row["rank"] == rank + 1
        assert row["source"] == str(run.parents[1] / "pairs.jsonl")
        assert {name: row[name] for name in ("prompt", "chosen", "rejected")} == there[row["row"]]


def test_scores_are_sums_of_what_was_written(run, audited):
    """By an independent few lines."""
    rows = pq.read_table(run / "dynamics.parquet").to_pandas()
    scores = pq.read_table(audited / "scores.parquet").to_pandas().set_index("index").sort_index()
    of = rows.groupby("index")
    assert np.allclose(scores.confidence, of.confidence.mean())
    assert np.allclose(scores.variability, of.confidence.std(ddof=0), atol=1e-6)
    assert np.allclose(scores.correctness, of.margin.agg(lambda values: (values > 0).mean()))
    assert np.allclose(scores.area, of.reward_margin.mean(), atol=1e-6)
    equal = rows.gradient_share * rows.groupby("step")["index"].transform("count")
    assert np.allclose(scores.gradient, equal.groupby(rows["index"]).mean(), atol=1e-5)
    assert (scores.times == 2).all()


def test_the_data_with_weights_train_again(run, audited, tiny_model, capsys, tmp_path):
    main(["audit", str(run), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    *_, command = printed.strip().splitlines()
    assert "\x1b" not in printed
    assert "\u202e" not in printed
    assert "[bold]x[/]" in printed
    weighted = lines(tmp_path / "weights.jsonl")
    before = lines(run.parents[1] / "pairs.jsonl")
    assert [{name: row[name] for name in before[0]} for row in weighted] == before
    scores = pq.read_table(tmp_path / "scores.parquet").to_pandas()
    zero = set(scores["index"][scores.verdict == FLIPPED])
    assert [row["weight"] for row in weighted] == [0.0 if number in zero else 1.0 for number in range(60)]
    program, *arguments = shlex.split(command)
    assert program == "lit-dpo"
    main([*arguments, "--trainer.max_epochs=1", f"--trainer.logger.save_dir={tmp_path / 'runs'}"])
    again = pq.read_table(tmp_path / "runs" / "version_0" / "dynamics.parquet").to_pandas()
    assert set(again["index"][again.loss == 0]) == zero
    assert (again.gradient_share[again.loss == 0] == 0).all()


def test_weights_are_those_that_were_asked_for(audited):
    scores = pq.read_table(audited / "scores.parquet").to_pandas()
    wanted = {FLIPPED: 0.0, HARD: 0.5}
    assert scores.weight.tolist() == [wanted.get(verdict, 1.0) for verdict in scores.verdict]
    said = json.loads((audited / "audit.json").read_text())
    assert {name: one["count"] for name, one in said["verdicts"].items()} == {
        name: int((scores.verdict == name).sum()) for name in (FLIPPED, HARD, UNMOVED, EASY)
    }


def test_checkpoints_say_the_same_of_labels(run, flipped):
    judged = audit(run, 0.1, {}, recompute=True).judged
    assert len(set(judged.scores.row[judged.order[:6]]) & flipped) >= 5
    assert judged.scores.times.tolist() == [1] * 60  # one checkpoint of the last step


def test_other_data_or_no_dynamics_are_said(run, tmp_path):
    changed = [*lines(run.parents[1] / "pairs.jsonl")[1:], {"prompt": "New?", "chosen": " Yes.", "rejected": " No."}]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    with pytest.raises(LitDPOError, match="they are others now"):
        audit(run, 0.1, {}, overrides=[f"--data.train={tmp_path / 'other.jsonl'}"])
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(LitDPOError, match=r"--trainer\.callbacks\+=TrainingDynamics"):
        audit(tmp_path, 0.1, {})
    with pytest.raises(LitDPOError, match="Expected checkpoints"):
        audit(tmp_path, 0.1, {}, recompute=True)
    with pytest.raises(LitDPOError, match="directory of a run"):
        audit(tmp_path / "nothing", 0.1, {})


def test_dynamics_that_say_nothing_or_speak_of_other_rows_are_said(run, tmp_path):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    whole = pq.read_table(run / "dynamics.parquet")
    place = whole.schema.get_field_index("index")
    field = whole.schema.field(place)
    later = pa.array([1000 + one.as_py() for one in whole["index"]]).cast(field.type)
    for written, said in (
        (whole.slice(0, 0), "hold no comparison with finite numbers"),
        (whole.set_column(place, field, later), "rows that the data do not have"),
    ):
        pq.write_table(written, tmp_path / "dynamics.parquet")
        with pytest.raises(LitDPOError, match=said):
            audit(tmp_path, 0.1, {})


@pytest.mark.parametrize("given", [["--top", "0"], ["--top", "1.5"], ["--examples", "-1"], ["--idle-weight", "-1"]])
def test_what_cannot_be_asked_for_is_said(run, given, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["audit", str(run), *given])
    assert ended.value.code == 1
    assert f"`{given[0]}`" in capsys.readouterr().err


def _dynamics(margins: dict[int, list[float]], reference: dict[int, float], shares: dict[int, float]) -> Dynamics:
    """One of each epoch, an epoch a step."""
    found = [(epoch, row, margin) for row, those in margins.items() for epoch, margin in enumerate(those)]
    epochs, index, margin = (np.array(one) for one in zip(*found, strict=True))
    columns = {
        **dict.fromkeys(("chosen", "rejected"), np.zeros(len(index), int)),
        "epoch": epochs,
        "step": epochs,
        "index": index,
        "margin": margin,
        "reward_margin": margin,
        "confidence": 1 / (1 + np.exp(-margin)),
        "loss": np.log1p(np.exp(-margin)),
        "reference_margin": np.array([reference.get(row, 0.0) for row in index]),
        "gradient_share": np.array([shares.get(row, 1.0) for row in index]) / len(margins),
    }
    return Dynamics.of(pa.table(columns))


def test_verdicts_are_what_they_say():
    margins = {
        0: [-1.0, -2.0],
        1: [0.001, -0.001],
        2: [3.0, 4.0],
        3: [-1.0, 3.0],
        **{n: [1.0, 2.0] for n in range(4, 10)},
    }
    judged = judge(score(_dynamics(margins, {2: 5.0}, {2: 0.01})), top=0.1)
    assert judged.verdicts.tolist() == [FLIPPED, UNMOVED, EASY, HARD, *[""] * 6]
    assert judged.order[0] == 0
    # learned by heart: agreed with in the end, and on average
    by_heart = {0: [-0.5, 3.0, 3.0], **{number: [1.0 + number / 10, 3.0, 4.0] for number in range(1, 10)}}
    judged = judge(score(_dynamics(by_heart, {}, {})), top=0.5)
    assert judged.scores.confidence[0] > 0.5
    assert judged.of(FLIPPED).tolist() == [0]
    everything_right = {number: [1.0 + number, 2.0] for number in range(10)}
    assert not judge(score(_dynamics(everything_right, {}, {})), top=0.5).of(FLIPPED).size


def test_passes_that_are_not_finite_say_nothing():
    dynamics = _dynamics({0: [1.0, 2.0], 1: [1.0, np.nan]}, {}, {})
    assert score(dynamics).times.tolist() == [2, 1]
