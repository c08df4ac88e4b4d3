"""Every test that needs a GPU runs here once on the CPU, so that nothing in it is wrong but the device."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


class Outcomes:
    """Counts how the tests of a session ended."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.tests: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
            self.tests.add(report.nodeid.partition("[")[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the device itself")
def test_the_tests_of_a_gpu_run_on_a_cpu():
    """In a session of its own: in this one they skip without a device, as `pytest` alone has them."""
    found = Outcomes()
    command = ["-q", "-m", "gpu", "--gpu-device", "cpu", "-p", "no:cacheprovider", "-p", "no:xdist", str(FOLDER)]
    # the same lines as with `bf16`, the type aside
    assert pytest.main([*command, "-k", "not fp16 and not fp32"], plugins=[found]) == 0
    assert set(found.counts) == {"passed"}
    assert len(found.tests) > 10
