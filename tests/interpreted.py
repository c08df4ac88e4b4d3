"""Liger's kernels on a CPU, by Triton's interpreter: slow, and the same arithmetic.

The interpreter lacks what only a compiler brings: numbers among the arguments are tensors, and a GPU's library has
`rsqrt` and `tanh`. Both are put in here, by their definition.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
import pytest
import torch

from lit_dpo.policy import kernels

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined


@pytest.fixture
def interpreter() -> Any:
    """Skips where Liger or Triton is not installed, or a device is there that runs the kernels themselves."""
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there: see the tests marked gpu")
    pytest.importorskip("triton", reason="Triton is not installed")
    pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
    try:
        float(np.ones(1))  # as Triton's interpreter does, up to 3.6 at least
    except TypeError:
        pytest.skip(f"NumPy {np.__version__} makes no number of a list of one, and Triton's interpreter needs one")
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter._implicit_cvt

    def tensor(values: Any, dtype: Any, kind: Any) -> Any:
        return tl.tensor(interpreter.TensorHandle(values, dtype), kind)

    def convert(given: Any) -> Any:
        return tensor(np.float32([given]), tl.float32, tl.float32) if isinstance(given, float) else plain(given)

    def elementwise(function: Any) -> Any:
        return lambda given: tensor(function(given.handle.data), given.handle.dtype, given.type)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", convert)
        patch.setattr(
            importlib.import_module("liger_kernel.ops.rms_norm"), "rsqrt", elementwise(lambda x: 1 / np.sqrt(x))
        )
        patch.setattr(importlib.import_module("liger_kernel.ops.geglu"), "tanh", elementwise(np.tanh))
        patch.setattr(kernels, "_DEVICES", ("cpu",))
        yield interpreter
