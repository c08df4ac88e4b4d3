"""How the command's tools end, by themselves, by signals and by faults; and the lines that a run says meanwhile."""

from __future__ import annotations

import errno
import io
import logging
import math
import signal
import sys
import threading
from types import SimpleNamespace

import pytest
from lightning.pytorch.trainer.states import TrainerFn

import lit_dpo
from lit_dpo import __version__
from lit_dpo.cli import main
from lit_dpo.progress import Bar, Lines


class Output(io.StringIO):
    """Standard output to which the first thing that is written does something."""

    def __init__(self, does):
        super().__init__()
        self.does = does

    def write(self, text):
        self.does()
        return super().write(text)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_tool_with_the_status_that_a_shell_gives_it(number, status, monkeypatch, capsys):
    """And afterwards signals do what they did before."""
    before = signal.getsignal(number)
    monkeypatch.setattr(sys, "stdout", Output(lambda: signal.raise_signal(number)))
    with pytest.raises(SystemExit) as stopped:
        main(["configs"])
    assert stopped.value.code == status
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err == ("lit-dpo: interrupted\n" if number == signal.SIGINT else "")


def test_a_fault_that_nobody_knows_keeps_its_traceback_and_a_full_disk_is_a_sentence(monkeypatch, capsys):
    def fails(error):
        raise error

    monkeypatch.setattr(sys, "stdout", Output(lambda: fails(ValueError("unknown"))))
    with pytest.raises(ValueError, match="unknown"):
        main(["configs"])
    monkeypatch.setattr(sys, "stdout", Output(lambda: fails(OSError(errno.ENOSPC, "full"))))
    with pytest.raises(SystemExit) as stopped:
        main(["configs"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("lit-dpo: error: Cannot write: ")


def test_a_tool_runs_in_a_thread_too_and_the_version_is_said(capsys):
    """Only the main thread may set what a signal does."""
    thread = threading.Thread(target=main, args=(["configs"],))
    thread.start()
    thread.join()
    assert "losses/dpo" in capsys.readouterr().out
    assert dir(lit_dpo) == sorted(lit_dpo.__all__)
    main(["--version"])
    assert capsys.readouterr().out == f"lit_dpo {__version__}\n"


# ---- lines and bars ----


def _running(**facts):
    given = {"global_step": 0, "current_epoch": 0, "max_epochs": 3, "estimated_stepping_batches": 9}
    measures = {
        "loggers": [],
        "callback_metrics": {"val/loss": 0.5, "val/reward_margin": 2.0},
        "progress_bar_metrics": {},
    }
    return SimpleNamespace(**{**given, **measures, **facts})


def test_lines_say_what_is_due_once_and_nothing_while_they_are_disabled(caplog):
    lines = Lines()
    with caplog.at_level(logging.INFO):
        lines.on_train_start(_running(), None)
        fitting = SimpleNamespace(fn=TrainerFn.FITTING)
        for _ in range(2):
            lines.on_validation_end(_running(state=fitting, sanity_checking=False), None)
            lines.on_train_end(_running(), None)
            lines.on_train_end(_running(), None)
            lines.disable()
        lines.enable()
        lines.on_train_epoch_end(_running(global_step=3, estimated_stepping_batches=math.inf, max_epochs=-1), None)
    first, last = caplog.messages
    assert first == "epoch 1 of 3, step 0 of 9: loss 0.5".replace("loss", "val/loss"), "no pace yet, so no time left"
    assert last == "epoch 1, step 3: val/loss 0.5", "without an end there is nothing left"


def test_where_no_width_is_known_a_bar_shows_all_measures(capsys):
    found = Bar().get_metrics(_running(progress_bar_metrics={"train/reward_margin": 1.0, "train/loss": 2.0}), None)
    assert found == {"train/margin": 1.0, "train/loss": 2.0}
