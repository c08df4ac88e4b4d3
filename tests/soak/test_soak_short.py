"""Each kind of fault once, one after another, on one run: what is there in the end is that of a run without any."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import soak_faults
from soak_cases import Case, Config, Fault

from soak import Soak

_MODEL = {
    "policy": {"quantization": "nf4", "r": 4, "dropout": 0.1},
    "loss": {"class_path": "lit_dpo.losses.BCOLoss"},
    "reference": {"class_path": "lit_dpo.EMAReference", "init_args": {"alpha": 0.5, "every": 1}},
}
_FAULTS = (
    Fault("SIGKILL", "writes", 0.4, "one"),
    Fault("full", "writes", 0.25, "one"),
    Fault("SIGTERM", "writes", 0.2, "one"),
    Fault("read-only", "writes", 0.15, "one"),
    Fault("SIGINT", "writes", 0.15, "one"),
)


@pytest.fixture
def disks(tmp_path: Path) -> None:
    """Skip where no disk can be mounted."""
    (tmp_path / "try").mkdir()
    if soak_faults.libc.mount(b"tmpfs", os.fsencode(tmp_path / "try"), b"tmpfs", 0, b"size=64k"):
        pytest.skip(f"cannot mount a small disk: {os.strerror(ctypes.get_errno())}")
    soak_faults.libc.umount2(os.fsencode(tmp_path / "try"), 2)


@pytest.mark.usefixtures("disks")
def test_a_run_that_everything_happens_to_ends_as_the_one_that_nothing_does(tmp_path: Path) -> None:
    """Weights, optimizer, rows to the bit; all files whole after each fault; nothing half-written stays."""
    soak = Soak(tmp_path / "work")
    soak.configs = {"short": Config(_MODEL, trainer={"max_epochs": 1}, board=False)}
    found = soak.do(Case(0, "fit", "short", _FAULTS))
    assert not found.wrong, (tmp_path / "work" / "case-0.log").read_text()[-6000:]
    assert [hit.split()[0] for hit in found.hit] == [fault.name for fault in _FAULTS], found
    assert found.lost <= 2
    assert not found.traceback


@pytest.mark.usefixtures("disks")
def test_a_tool_clears_away_what_is_half_written_after_sigterm(tmp_path: Path) -> None:
    soak = Soak(tmp_path / "work")
    found = soak.do(Case(1, "inspect", "inspect", (Fault("SIGTERM", "writes", 0.99, "one"),)))
    assert not found.wrong
    assert found.statuses == (143, 0)
    assert "/.report." in found.hit[0]
    assert found.left == 0
