"""The tests' own tool: ranks that do the same, and what it says where they do not."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

import ranks


def total(number: int) -> tuple[int, float]:
    """The sum of a number over all ranks."""
    torch.distributed.init_process_group("gloo")
    sum_of_all = torch.tensor(float(number + torch.distributed.get_rank()))
    torch.distributed.all_reduce(sum_of_all)
    return torch.distributed.get_rank(), float(sum_of_all)


def lonely() -> None:
    """What must not be: one rank waits for the other, which does not come."""
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == 0:
        torch.distributed.all_reduce(torch.zeros(1))
    else:
        time.sleep(60)


def wrong() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("this one")
    time.sleep(60)


def test_ranks_work_together(tmp_path: Path) -> None:
    assert ranks.run(total, 3, 5, folder=tmp_path) == [(0, 18.0), (1, 18.0), (2, 18.0)]


def test_a_rank_that_waits_is_shown_in_seconds(tmp_path: Path) -> None:
    with pytest.raises(ranks.RankError, match=r"(?s)its time was up.*rank-0.*in lonely.*rank-1.*in lonely"):
        ranks.run(lonely, 2, folder=tmp_path, seconds=2)


def test_what_one_rank_raises_is_raised(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(ranks.RankError, match="Rank 1 of 2 raised: ValueError: this one"):
        ranks.run(wrong, 2, folder=tmp_path, seconds=30)
    assert time.monotonic() - begin < 15


def test_a_command_in_a_second(tmp_path: Path) -> None:
    run = ranks.command(["configs"], log=tmp_path / "log", cwd=tmp_path)
    assert run.wait() == 0
    assert "quickstart.yaml" in run.output()
    run = ranks.command(["fit", "--nonsense"], log=tmp_path / "log", cwd=tmp_path)
    assert run.wait() == 2
    assert "nonsense" in run.output()
    run = ranks.command([], log=tmp_path / "log", before=os.kill, given=(0, signal.SIGKILL))
    assert run.wait() == -signal.SIGKILL
