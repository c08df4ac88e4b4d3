"""Every test that needs a GPU runs here once on the CPU, so that nothing in it is wrong but the device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the device itself")
def test_the_tests_of_a_gpu_run_on_a_cpu():
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--gpu-device", "cpu", "-p", "no:cacheprovider"]
    command += ["-k", "not fp16 and not fp32"]  # the same lines as with `bf16`, the type aside
    # in a process of its own: the tests here skip without a device, as `pytest` alone has them
    done = subprocess.run(
        [*command, "-p", "no:xdist", str(ROOT / "tests" / "gpu")], cwd=ROOT, capture_output=True, text=True
    )
    print(done.stdout[-20_000:], done.stderr[-2_000:])
    assert done.returncode == 0
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]
