"""A fake CUDA device (`fake_cuda.py`): every architecture reaches the kernel; nothing is elsewhere, or waited for."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

import tiny

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="needs a CUDA build of torch, but no device: `pip install torch`"
)
WALKS = (
    "rows",
    "some completions",
    "base reference",
    "adapter reference",
    "moving reference",
    "another model",
    "stored reference",
    "divergence",
    "module",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake")
    command = [sys.executable, str(Path(__file__).with_name("fake_cuda.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def _of(found, name):
    if "error" in found[name]:
        pytest.fail(f"{found[name]['error']}\n{found[name]['trace']}")
    return found[name]["found"]


@pytest.mark.parametrize("name", tiny.FLAT)
def test_each_layer_calls_the_kernel_in_16_bits_alone(found, name):
    """But for a soft-cap, which the kernel does not have, and windows, which it does not have in torch 2.10."""
    calls = [] if name == "gemma2" else ["torch.bfloat16"] * 2
    if "window_size" in inspect.signature(varlen_attn).parameters:
        assert _of(found, f"{name} bfloat16") == calls
    else:
        assert len(_of(found, f"{name} bfloat16")) <= len(calls)
    if f"{name} float32" in found:
        assert _of(found, f"{name} float32") == []


@pytest.mark.parametrize("name", ["falcon", "bloom"])
def test_padded_rows_need_no_kernel(found, name):
    assert _of(found, f"{name} bfloat16") == []


@pytest.mark.parametrize("name", WALKS)
def test_all_of_it_is_on_the_device(found, name):
    _of(found, name)
