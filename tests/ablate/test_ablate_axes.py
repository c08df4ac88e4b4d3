"""What is typed becomes runs, or a sentence that says what to type."""

from __future__ import annotations

import pytest
import yaml

from lit_dpo.errors import AblationError, LitDPOError
from lit_dpo.tools.ablate.axes import axis, from_file, grid, name_of, read_seeds, typed
from lit_dpo.tools.ablate.command import main
from lit_dpo.tools.ablate.configuring import FitCLI
from lit_dpo.tools.ablate.planning import setting_of
from lit_dpo.tools.ablate.records import Layout
from lit_dpo.tools.ablate.sweeping import arguments_of


def test_every_combination_once_and_a_class_before_what_is_within_it():
    asked = grid([typed("beta=0.1,0.5"), typed("loss=dpo,ipo")], [1, 2], ["--config=base.yaml"], of_data=True)
    assert len({one.name for one in asked}) == len(asked) == 8
    first = asked[0]
    assert (first.name, first.axes, first.seed) == ("beta=0.1,loss=dpo,seed=1", {"beta": "0.1", "loss": "dpo"}, 1)
    options = [one.partition("=")[0] for one in first.arguments]
    assert options == ["--config", "--model.loss", "--model.loss.beta", "--seed_everything", "--data.seed"]
    assert first.arguments[1].endswith("configs/losses/dpo.yaml")


def test_values_are_what_was_typed(tmp_path):
    (tmp_path / "mine.yaml").write_text("class_path: lit_dpo.losses.DPOLoss\n")
    assert [one.label for one in typed(f"model.loss={tmp_path}/mine.yaml,IPOLoss,my_lab.Focal").values] == [
        "mine",
        "IPOLoss",
        "Focal",
    ]
    assert typed("model.loss=dpo").key == "loss"
    assert [one.argument for one in typed("--model.optimizer.lr=1e-4,3e-4").values] == ["1e-4", "3e-4"]
    assert [one.argument for one in typed("data.val={a: x.jsonl, b: y.jsonl},'u,v'").values] == [
        "{a: x.jsonl, b: y.jsonl}",
        "'u,v'",
    ]


def test_a_file_says_the_same(tmp_path):
    file = tmp_path / "axes.yaml"
    whole = {"label": "soft", "class_path": "lit_dpo.losses.CDPOLoss", "init_args": {"label_smoothing": 0.2}}
    file.write_text(yaml.safe_dump({"loss": ["dpo", whole], "model.policy.use_dora": [True, False], "seeds": [3, 4]}))
    axes, seeds = from_file(file)
    assert seeds == [3, 4]
    assert [value.label for value in axes[0].values] == ["dpo", "soft"]
    assert '"label"' not in axes[0].values[1].argument
    assert [value.argument for value in axes[1].values] == ["true", "false"]


def test_a_value_of_a_file_is_called_by_its_label_its_class_or_itself():
    losses = axis("loss", [{"class_path": "my_lab.Focal"}, {"label": "plain", "value": "dpo"}])
    assert [one.label for one in losses.values] == ["Focal", "plain"]
    assert losses.values[1].argument.endswith("losses/dpo.yaml")
    rates = axis("lr", [{"label": "low", "value": 1e-5}, 3e-4, None])
    assert [tuple(one) for one in rates.values] == [("low", "1e-05"), ("0.0003", "0.0003"), ("null", "null")]
    with pytest.raises(AblationError, match="values of `lr` but got none"):
        axis("lr", [])


def test_names_are_folders_and_differ():
    names = [name_of({"data.train": path}, 1) for path in ("a/b.jsonl", "a-b.jsonl", "a:b.jsonl")]
    assert len(set(names)) == 3
    assert all("/" not in name and ":" not in name for name in names)
    assert len(name_of({"x": "y" * 500}, 1)) < 200


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: typed("loss=idpo"), "Near it: ipo, dpo"),
        (lambda: typed("loss=none.yaml"), "there is no none.yaml"),
        (lambda: typed("beta"), "KEY=V1,V2"),
        (lambda: typed("beta=0.1,0.1"), "0.1 is there twice"),
        (lambda: axis("loss", [{"init_args": {}}]), "Expected a `label`"),
        (lambda: read_seeds("1,1"), "seeds that differ"),
        (lambda: read_seeds("one"), "whole numbers"),
        (lambda: grid([typed("beta=1"), typed("model.loss.beta=2")], [1], [], of_data=True), "is varied twice"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, said):
    with pytest.raises(AblationError, match=said):
        wrong()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--vary", "loss=dpo,simpo", "--vary", "model.loss.gamma=1,2"], "loss=dpo has beta"),
        (["--vary", "model.policy.rank=4,8"], "Near it: model.policy.r"),
        (["--vary", "beta=0.1,much"], "beta=much,seed=1"),
        (["--vary", "beta=0.1", "--data.val", "null"], "--data.val_split"),
        (["--vary", "beta=0.1", "--trainer.devices", "2"], "--jobs"),
        (["--vary", "beta=0.1", "--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.directory=x"], "directory"),
        (["--vary", "beta=0.1", "--judge", "nobody"], "--judge"),
        ([], "something to compare"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(arguments, tmp_path, more, said):
    given = arguments(tmp_path / "out", tmp_path / "counts.txt", *(more or ["--jobs", "1"]))
    given[given.index("--seeds") + 1] = "1"
    with pytest.raises(LitDPOError, match=said):
        main(given)
    assert not Layout(tmp_path / "out").asked.exists()


def test_a_plan_is_made_once_for_runs_that_cost_the_same(arguments, tmp_path):
    cli = FitCLI()

    base = arguments(tmp_path, tmp_path / "counts.txt")[:2]

    def setting(*more):
        return setting_of(cli.parse([*base, *more]))

    assert setting("--model.loss.beta=0.1") == setting("--model.loss.beta=0.5", "--seed_everything=3")
    assert setting() != setting("--model.policy.r=8")
    assert setting() != setting("--model.loss=IPOLoss")


def test_a_sweepers_mapping_becomes_arguments():
    nested = {"trainer": {"max_epochs": 1}, "model": {"policy": {"r": 8}}, "config": "run.yaml"}
    assert arguments_of(nested) == ["--config=run.yaml", "--trainer.max_epochs=1", "--model.policy.r=8"]
    whole = {"model.loss": {"class_path": "IPOLoss", "init_args": {"beta": 0.1}}}
    assert arguments_of(whole) == ['--model.loss={"class_path": "IPOLoss", "init_args": {"beta": 0.1}}']
