"""What other libraries say, and a user can do nothing about: left out, so that what matters is seen."""

from __future__ import annotations

import logging
import warnings
from contextlib import suppress
from typing import Any

_SAID = {
    "lightning.pytorch.utilities.rank_zero": (
        "Tip: For seamless",
        "that has Tensor Cores",  # said whether or not a product is float32; `policy.devices.remark` says where one is
    ),
    "lightning.fabric.utilities.rank_zero": ("Tip: For seamless", "that has Tensor Cores"),
    "liger_kernel.backends.registry": ("could not be imported",),  # implementations for other machines than this one
    "bitsandbytes.backends.cpu.ops": ("gemm_4bit_forward",),  # a kernel for inference, from a hub
}
"""Of each logger, parts of what it shall not say."""

_WARNED: tuple[dict[str, Any], ...] = (
    {"message": ".*does not have many workers.*"},
    {"message": ".*Total length of `list` across ranks is zero.*"},
    {"message": ".*smaller than the logging interval.*"},  # what is left is logged
    {"message": ".*The dirpath has changed from.*"},
    {"message": ".*isinstance.treespec, LeafSpec.*"},
    {"message": '.*install "ipywidgets" for Jupyter support.*'},  # with each step; `lit_dpo.callbacks.Quiet` says it
    {"message": ".*fan_in_fan_out is set to False.*"},
    {"message": ".*", "category": FutureWarning, "module": "transformers"},
)


class Hush:
    """Leaves it out from `begin` to `end`; filters that were there before stay as they were."""

    def __init__(self) -> None:
        self._warned: list[Any] = []
        self._said: list[tuple[logging.Logger, Any]] = []

    def begin(self) -> None:
        """Leave it out from here; does nothing the second time."""
        if self._said:
            return
        for name, parts in _SAID.items():
            logger = logging.getLogger(name)
            self._said.append((logger, _without(parts)))
            logger.addFilter(self._said[-1][1])
        for given in _WARNED:
            before = [*warnings.filters]
            warnings.filterwarnings("ignore", **given)
            self._warned += [one for one in warnings.filters[:1] if one not in before]

    def end(self) -> None:
        """Let others speak again."""
        for logger, one in self._said:
            logger.removeFilter(one)
        for item in self._warned:
            with suppress(ValueError):  # somebody has begun anew, as `catch_warnings` does
                warnings.filters.remove(item)  # type: ignore[attr-defined]
        self._said, self._warned = [], []


def _without(parts: tuple[str, ...]) -> Any:
    return lambda record: not any(part in record.getMessage() for part in parts)


_OURS = Hush()


def hush() -> None:
    """Leave it out for the rest of a process that is ours, as the command's is."""
    _OURS.begin()
