"""What is found out before the first run: a plan, what runs share, and which are the same; or why one cannot run."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lit_dpo.errors import AblationError, LitDPOError
from lit_dpo.references.store import LogpStore
from lit_dpo.tools.ablate import main
from lit_dpo.tools.ablate.axes import grid, typed
from lit_dpo.tools.ablate.configuring import FitCLI
from lit_dpo.tools.ablate.measuring import judge_of
from lit_dpo.tools.ablate.planning import _hours
from lit_dpo.tools.ablate.preparing import Options, Prepared, _named, prepare
from lit_dpo.tools.ablate.recording import Recorder, Rows, read_rows
from lit_dpo.tools.ablate.records import Asked, Layout
from lit_dpo.tools.ablate.running import _passes, carry_out, differences
from lit_dpo.tools.ablate.sharing import _batches, share
from lit_dpo.tools.ablate.single import Work, do
from lit_dpo.tools.ablate.sweeping import arguments_of, run


@pytest.fixture(scope="module")
def cli() -> FitCLI:
    return FitCLI()


@pytest.fixture(scope="module")
def base(arguments, tmp_path_factory) -> list[str]:
    """A run of `fit` with a plain reference, that nothing needs to be written for."""
    folder = tmp_path_factory.mktemp("prepared")
    return [*arguments(folder, folder / "counts.txt")[:2], "--model.reference=BaseReference", "--model.loss=DPOLoss"]


def test_a_plan_counts_runs_and_adds_their_times_up(base, tmp_path, capsys, monkeypatch):
    """Those that cost the same are planned once; two at a time take half the time and twice the memory.

    What a step takes is proven where plans are; here a run of rank r takes 10 r to 20 r seconds, and r GiB.
    """
    planned: list[int] = []

    def plan(model, data, trainer, device):
        r = model.policy.r
        planned.append(r)
        assert (device, data.batch_size, trainer.max_epochs) == ("H100", 4, 2)
        return SimpleNamespace(seconds=(10.0 * r, 20.0 * r), step=SimpleNamespace(total=r * 2**30))

    monkeypatch.setattr("lit_dpo.tools.ablate.planning.plan", plan)
    out = tmp_path / "out"
    main([*base, "--vary", "beta=0.1,0.5", "--seeds", "1", "--out", str(out), "--jobs", "2", "--plan", "H100"])
    said = capsys.readouterr().out.splitlines()
    assert planned == [4]
    assert said[:3] == [
        "2 runs, 2 at a time; 1 pass of the reference",
        "40 to 80 seconds in all, without loading, measuring and sampling",
        "about 4.00 GiB for a step of each that runs, 8.00 GiB in all",
    ]
    assert "2 runs, such as beta=0.1,seed=1:" in said
    assert not out.exists()


def test_times_are_said_in_the_unit_that_fits():
    assert _hours(1.0, 60.0) == "1 to 60 seconds"
    assert _hours(60.0, 120.0) == "1 to 2 minutes"
    assert _hours(3600.0, 7200.0) == "1 to 2 hours"


NO_OPTIONS = [
    (["--jobs", "two"], "invalid int value"),
    (["--vary", "beta=1", "--jobs", "0"], "`--jobs` >= 1 but got 0"),
    (["--vary", "beta=1", "--completions", "-1"], "`--completions` >= 0 but got -1"),
    (["--vary", "beta=1", "--seed", "1,2"], "`--seed` is no option of ablate or fit. Near it: --seeds"),
]


@pytest.mark.parametrize(("given", "said"), NO_OPTIONS)
def test_options_that_are_none_end_the_program_with_a_line(given, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_seeds_are_asked_for_where_the_run_has_none_and_taken_once(base, tmp_path):
    """From the file of axes or from the command line, not from both."""
    file = tmp_path / "axes.yaml"
    file.write_text("beta: [0.1, 0.5]\nseeds: [1, 2]\n")
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(AblationError, match=r"seeds once but got `--seeds` and those in .*axes.yaml"):
        main([*base, *out, "--axes", str(file), "--seeds", "3"])
    file.write_text("beta: [0.1, 0.5]\n")
    with pytest.raises(AblationError, match="Expected `--seeds` as numbers but got `seed_everything` True"):
        main([*base, *out, "--axes", str(file), "--seed_everything", "true"])


def test_more_runs_than_cores_wait_and_are_told_so(base, tmp_path, caplog):
    """And seeds that cannot order the data say so: that order draws the held-out pairs too."""
    caplog.set_level(logging.INFO)
    given = [*base, "--vary", "beta=0.1", "--seeds", "1,2", "--out", str(tmp_path / "out"), "--jobs", "999"]
    with pytest.raises(LitDPOError, match="nothing"):
        main([*given, "--data.seed=1", "--judge", "lit_dpo.nothing"])
    assert "--jobs 999 on" in caplog.text
    assert "the order of the data is the same for all seeds: `data.seed` is given" in caplog.text


def test_ctrl_c_stops_what_runs_and_the_same_command_goes_on(base, tmp_path, capsys):
    """The process that was to make the runs is gone, and the folder is free."""
    layout = Layout(tmp_path / "out")
    began = threading.Event()

    def press() -> None:
        while not layout.asked.is_file():
            time.sleep(0.01)
        time.sleep(0.3)  # its worker is there
        began.set()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    given = [*base, "--vary", "beta=0.1", "--seeds", "1", "--out", str(layout.root)]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert began.is_set()
    assert stopped.value.code == 130
    assert "The same command goes on." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list(layout.root.glob("**/result.json"))
    other = json.loads(layout.asked.read_text())
    other["options"]["completions"] = 5  # as if `--completions 5` had been typed
    layout.asked.write_text(json.dumps(other))
    with pytest.raises(AblationError, match="`--completions` was 5 and is 32"):
        main(given)


# --- what runs share ---


def how(cli: FitCLI, base: list[str], tmp_path, *more: str) -> Any:
    config = cli.parse([*base, *more])
    return share(cli.built()[0], config, tmp_path / "cache")


SAID_WHY = [
    (["--model.reference=EMAReference"], "EMAReference follows the policy"),
    (["--model.loss=TDPOLoss"], "TDPOLoss reads the reference's whole distribution"),
    (["--model.reference=watched.Sums"], ""),
    (["--model.reference=watched.Nameless"], "Nameless() does not say what its log-probs depend on"),
]


@pytest.mark.parametrize(("given", "why"), SAID_WHY)
def test_a_reference_that_cannot_be_read_says_why(cli, base, tmp_path, given, why):
    found = how(cli, base, tmp_path, *given)
    assert why in found.why_not
    assert (found.key is None) == bool(why)


def test_sums_alone_are_no_reference_of_a_loss_that_reads_more(cli, base, tmp_path):
    """So that what is shared need not look at this."""
    with pytest.raises(AblationError, match=r"reads the reference's log-probs per token, which Sums\(\) has not"):
        how(cli, base, tmp_path, "--model.loss=LDDPOLoss", "--model.reference=watched.Sums")


def test_what_a_user_caches_is_the_users_and_a_run_without_a_reference_needs_the_held_out_pairs_alone(
    cli, base, tmp_path
):
    theirs = how(cli, base, tmp_path, "--model.reference=CachedReference", f"--model.reference.directory={tmp_path}")
    none = how(cli, base, tmp_path, "--model.loss=SimPOLoss", "--model.reference=NoReference")
    assert theirs.arguments == none.arguments == []
    assert theirs.key == none.key == how(cli, base, tmp_path).key
    assert none.measures_alone
    assert not theirs.measures_alone
    assert share(pl.LightningModule(), cli.parse(base), tmp_path).why_not == "LightningModule may have none"


def test_runs_that_are_the_same_are_made_once_and_what_is_not_shared_is_said_once(cli, base, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    asked = grid([typed("model.reference=BaseReference,EMAReference")], [1], base, of_data=True)
    again = asked[1]._replace(name="again")
    made = prepare([*asked, again], Layout(tmp_path), Options(), cli)
    assert [work.asked.name for work in made.works] == [one.name for one in asked]
    assert len(made.passes) == 1  # what follows the policy needs none
    assert f"{asked[1].name} and again are the same run: it is made once." in caplog.text
    assert caplog.text.count("the reference is computed in each run: EMAReference follows the policy.") == 1
    with pytest.raises(AblationError, match="at least one run"):
        prepare([], Layout(tmp_path), Options(), cli)


def test_two_losses_of_one_name_are_told_apart():
    losses: dict[str, Any] = {}
    names = [_named(losses, "dpo", {"beta": beta}) for beta in (0.1, 0.5, 0.1, 0.9)]
    assert names == ["dpo", "dpo (2)", "dpo", "dpo (3)"]
    assert losses[names[3]] == {"beta": 0.9}


class TwoSets(pl.LightningDataModule):
    """A user's own: validation sets by name."""

    def val_dataloader(self) -> dict[str, list[int]]:
        return {"a": [1, 2], "b": [3]}

    def train_dataloader(self) -> list[int]:
        return [4]


def test_a_pass_sees_every_set_by_name_and_training_last():
    assert list(_batches(TwoSets(), train=True)) == [1, 2, 3, 4]
    assert list(_batches(TwoSets(), train=False)) == [1, 2, 3]


# --- one run, in whatever process ---


def work(base: list[str], root: Any, *more: str, is_pass: bool = False) -> Work:
    return Work(Asked("one", {}, 1, []), [*base, *more], {}, "dpo", str(root), 0, None, is_pass)


def test_what_a_run_refuses_or_raises_becomes_a_paragraph_and_costs_nothing_else(cli, base, tmp_path, capfd):
    """What an earlier try has left is gone, but for its log; the command goes on to other runs."""
    folder = Layout(tmp_path).run("one")
    folder.mkdir(parents=True)
    for name in ("log.txt", "adapter_model.bin", "pairs.parquet", "rows.jsonl"):
        (folder / name).touch()
    assert "Expected a subclass of PreferenceLoss" in do(cli, work(base, tmp_path, "--model.loss=Nothing"))
    assert [one.name for one in folder.iterdir()] == ["log.txt"]
    lost = tmp_path / "no" / "counts.txt"
    counted = ["--model.reference=watched.Counted", f"--model.reference.counts={lost}"]
    assert do(cli, work(base, tmp_path, *counted, is_pass=True)).startswith("FileNotFoundError: ")
    assert "Traceback" in capfd.readouterr().err
    assert not hasattr(cli, "trainer")
    simpo = ["--model.loss=SimPOLoss", "--model.reference=NoReference"]
    assert do(cli, work(base, tmp_path, *simpo, is_pass=True)) == ""
    (store,) = (one for one in Layout(tmp_path).cache.iterdir() if one.is_dir())
    assert len(LogpStore(store)) == 42  # two completions of each of the held-out pairs


def test_a_pass_that_fails_leaves_no_mark_so_that_the_same_command_tries_it_again(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    asked = work([], tmp_path, is_pass=True)
    prepared, layout = Prepared([], {"key": asked}, {}, Options()), Layout(tmp_path)
    told: list[Work] = []

    class Workers:
        """Say what a process said."""

        error = "there is no disk"

        def do(self, works, done):
            told.extend(works)
            for one in works:
                done(one, self.error)

    workers: Any = Workers()
    _passes(workers, prepared, layout)
    assert "the pass of the reference failed, and runs compute it: there is no disk" in caplog.text
    workers.error = ""
    for _ in range(2):
        _passes(workers, prepared, layout)
    assert told == [asked, asked]  # the third time there is a mark


def test_a_folder_of_something_else_is_not_written_into(tmp_path):
    Layout(tmp_path).run("mine").mkdir(parents=True)
    prepared = Prepared([], {}, {}, Options())
    with pytest.raises(AblationError, match="holds other runs"):
        carry_out(prepared, Layout(tmp_path), jobs=1)
    with pytest.raises(AblationError, match="Expected a new folder for the run"):
        run(["--config", "x.yaml"], tmp_path)
    assert arguments_of(["--config", tmp_path]) == ["--config", str(tmp_path)]
    assert arguments_of(tmp_path / "run.yaml") == [f"--config={tmp_path / 'run.yaml'}"]
    assert differences(dict.fromkeys("abcde", ""), {"a": ""}) == "was b, c, d (and 1 more)"


class Ours:
    """A judge of one's own."""

    def __call__(self, *_: Any) -> float:
        return 1.0


class NoJudge:
    """Judges nothing."""


def test_a_judge_is_a_function_or_a_class_of_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "our_judges", sys.modules[__name__])
    assert isinstance(judge_of("our_judges.Ours"), Ours)
    with pytest.raises(AblationError, match=r"Expected a function at `--judge` but our_judges.NoJudge is a NoJudge"):
        judge_of("our_judges.NoJudge")
    assert judge_of("our_judges.judge_of") is judge_of


# --- what is kept of a run ---


def test_rows_of_a_step_are_one_row_and_a_torn_line_is_left_out(tmp_path):
    rows = Rows(tmp_path, Recorder())
    rows.log_hyperparams({"r": 4})
    rows.log_metrics({"loss": 1.0}, 2)
    rows.log_metrics({"loss": 3.0}, 1)
    with (tmp_path / "rows.jsonl").open("a") as stream:
        stream.write('{"step": 2.0, "lo\n')
    rows.log_metrics({"val": 2.0}, 2)
    assert [(row["step"], row["loss"], row.get("val")) for row in read_rows(tmp_path)] == [
        (1, 3.0, None),
        (2, 1.0, 2.0),
    ]
    assert (rows.name, rows.version, rows.log_dir) == ("rows", 0, None)


def test_tokens_count_when_their_step_is_made(tmp_path):
    """Of two accumulated batches both, after the second."""
    recorder, trainer = Recorder(), SimpleNamespace(global_step=0)
    batch = SimpleNamespace(input_ids=torch.zeros(1, 7))
    recorder.on_train_start(trainer, None)
    counted = []
    for step in (0, 1, 1, 2):
        trainer.global_step = step
        recorder.on_train_batch_end(trainer, None, None, batch, 0)
        counted.append(recorder.tokens)
    assert counted == [0, 14, 14, 28]
    other = Recorder()
    other.load_state_dict({**recorder.state_dict(), "seconds": 5.0, "memory": 1 << 50})
    assert (other.tokens, other.seconds, other.memory) == (28, 5.0, 1 << 50)
