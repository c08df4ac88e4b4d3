"""A pretend accelerator: CPU numbers in tensors that say they live on a device, and refuse to be mixed with others.

Training runs on it for real: forward, backward, optimizer, metrics, callbacks. Whatever would fail on a GPU because a
tensor was made elsewhere fails here, and whatever would make the CPU wait for a GPU is written down with its place:
a number that is read (`item`, `float`, `bool`, `tolist`, `cpu`, `equal`), a shape that depends on numbers (`nonzero`,
masks as indices), and a copy in either direction that is not `non_blocking`.

Importing it adds a device to this process; do so only in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # experimental; from torch 2.10 on

aten = torch.ops.aten


class _Module:
    """What `torch.pretend` is: torch and Lightning ask it."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, *_: Any) -> None:
        torch.set_rng_state(state)


_setup_privateuseone_for_python_backend("pretend", _Module())
torch.__future__.set_overwrite_module_params_on_conversion(True)  # `.to` makes new parameters
_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast is there, and casts nothing
torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(…, device=…)` is made on the CPU and copied, in sight
DEVICE = torch.device("pretend", 0)


class Wait(NamedTuple):
    """Where the CPU would wait for the device."""

    operation: str
    place: str


class Log:
    """What happened, in the parts of a run."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Wait]] = {"start": []}
        self.part = "start"

    def begin(self, part: str) -> None:
        self.part = part
        self.parts.setdefault(part, [])

    def wait(self, func: Any) -> None:
        self.parts[self.part].append(Wait(func.__name__, _place()))


LOG = Log()


def _place() -> str:
    """The innermost line that is neither torch's nor of here."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name, function = frame.f_code.co_filename, frame.f_code.co_name
        others = "site-packages" in name and "/torch/" not in name and function != "__torch_function__"
        if others or "lit_dpo/" in name:
            file = name.rsplit("site-packages/", 1)[-1].rsplit("/src/", 1)[-1]
            return f"{file}:{function}"
        frame = frame.f_back
    return "backward"


class Pretend(Tensor):
    """A tensor on the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        found.inner = inner
        return found

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a tensor of the device to numpy. Use Tensor.cpu() to copy it first.")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class OnDevice(TorchDispatchMode):
    """Lets constructors make tensors on the device, and checks the others."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_COPIES = (aten._to_copy.default, aten.copy_.default)
_READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.bincount.default,
    aten.is_nonzero.default,
}
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
# device and CPU numbers of no dimension go together
_SCALARS_TOO = {"add", "sub", "mul", "div", "rsub", "pow", "maximum", "minimum", "where", "lerp", "fill", "atan2"}
_SCALARS_TOO |= {"gt", "ge", "lt", "le", "eq", "ne", "logical_and", "logical_or", "bitwise_and", "bitwise_or"}
_SCALARS_TOO |= {"masked_fill", "clamp", "addcmul", "addcdiv", "xlogy", "remainder", "fmod", "floor_divide"}


def _leaves(thing: Any) -> Iterator[Any]:
    """What an operation is given; `torch.utils._pytree` takes any structure, and its time."""
    if isinstance(thing, list | tuple | dict):
        for one in thing.values() if isinstance(thing, dict) else thing:
            yield from _leaves(one)
    else:
        yield thing


def _mapped(change: Callable[[Any], Any], thing: Any) -> Any:
    if isinstance(thing, dict):
        return {name: _mapped(change, one) for name, one in thing.items()}
    if isinstance(thing, list | tuple):
        return type(thing)([_mapped(change, one) for one in thing])
    return change(thing)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    leaves = [*_leaves((args, kwargs))]
    given = [one for one in leaves if isinstance(one, Tensor)]
    mine = [one for one in given if isinstance(one, Pretend)]
    here = bool(mine)
    if func in _COPIES:
        here = _copied(func, args, kwargs)
    else:
        if kwargs.get("device") is not None:
            here = torch.device(kwargs["device"]).type == DEVICE.type
        if mine:
            _check(func, args, kwargs, [one for one in given if not isinstance(one, Pretend)])
    if here and any(isinstance(one, torch.Generator) for one in leaves):
        raise RuntimeError(
            f"{func.__name__}: Expected a generator of the device but found one of the CPU, at {_place()}"
        )
    if kwargs.get("device") is not None:
        kwargs = {name: one for name, one in kwargs.items() if name != "pin_memory"} | {"device": torch.device("cpu")}
    inside_args, inside_kwargs = _mapped(lambda one: one.inner if isinstance(one, Pretend) else one, (args, kwargs))
    made = func(*inside_args, **inside_kwargs)
    if not here:
        return made
    known = {id(one.inner): one for one in mine}

    def wrapped(one: Any) -> Any:
        return known[id(one)] if id(one) in known else Pretend(one) if isinstance(one, Tensor) else one

    return _mapped(wrapped, made)


def _copied(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a copy is on the device; between devices it waits unless told not to, and to a CPU in any case."""
    if func is aten.copy_.default:
        target, source = args[:2]
        here, there = isinstance(target, Pretend), isinstance(source, Pretend)
        non_blocking = (args[2] if len(args) > 2 else kwargs.get("non_blocking")) or False
    else:
        there = isinstance(args[0], Pretend)
        device = kwargs.get("device")
        here = there if device is None else torch.device(device).type == DEVICE.type
        non_blocking = kwargs.get("non_blocking") or False
    if here != there and (there or not non_blocking):
        LOG.wait(func)
    return here


def _check(func: Any, args: Any, kwargs: Any, others: list[Tensor]) -> None:
    name = func._schema.name.removeprefix("aten::").rstrip("_")
    if func in _INDEXED:
        indices = [one for one in args[1] if one is not None]
        if others and all(any(one is other for other in indices) for one in others) and isinstance(args[0], Pretend):
            LOG.wait(func)  # an index on the CPU is copied
            others = []
        if any(one.dtype in (torch.bool, torch.uint8) for one in indices):
            LOG.wait(func)
    elif (
        func in _READS
        or (name == "repeat_interleave" and kwargs.get("output_size") is None)
        or (name == "segment_reduce" and not kwargs.get("unsafe"))
    ):
        LOG.wait(func)
    scalars = name in _SCALARS_TOO and all(one.ndim == 0 for one in others)
    if others and not scalars and not (name.startswith("_foreach") and all(one.ndim == 0 for one in others)):
        shapes = [tuple(one.shape) for one in others]
        raise RuntimeError(f"{func.__name__}: tensors of shapes {shapes} are on the CPU, others not, at {_place()}")


class PretendAccelerator(Accelerator):
    """Lightning's view of the device."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> Any:
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "pretend"

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}


class PretendStrategy(SingleDeviceStrategy):
    """Runs on the device, and says which part of the run begins."""

    def __init__(self) -> None:
        super().__init__(device=DEVICE, accelerator=PretendAccelerator())
        self.trainer: Any = None

    def batch_to_device(self, batch: Any, device: Any = None, dataloader_idx: int = 0) -> Any:
        trainer = self.trainer
        if trainer is not None:
            loop = trainer.fit_loop.epoch_loop
            stage = trainer.state.stage.value
            number = loop.total_batch_idx + 1 if stage == "train" else len(LOG.parts)
            LOG.begin(f"{stage} {number}")
        return super().batch_to_device(batch, device, dataloader_idx)
