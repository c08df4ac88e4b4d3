"""Liger's kernels for norms, rotary positions and MLPs, in one model: no other model of its kind is touched.

Liger patches the modules of a model, and functions in transformers' source, there for all models. Of the modules that
is kept; the source is put back, and attention that calls such a function gets a copy which calls the kernel instead.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from lit_dpo.errors import first_line

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)

_DEVICES = ("cuda",)
"""Where the kernels run. Elsewhere the plain code does: after training a trainer moves its model to the CPU."""

_NOTHING = object()


class Kernels:
    """The kernels of one model, to put on and to take off.

    Args:
        changes: of some modules, attributes of their own while the kernels are on.

    Attributes:
        on: whether they are.
    """

    def __init__(self, changes: list[tuple[Any, dict[str, Any]]]) -> None:
        self.on = False
        self._changes = changes

    def use(self, on: bool) -> None:
        """Put them on or take them off; every attribute is then what it was."""
        if on != self.on:
            self._changes = [(module, _exchange(module, values)) for module, values in self._changes]
            self.on = on

    def __str__(self) -> str:
        """Name the kinds of modules that have one."""
        return ", ".join(sorted({type(module).__name__ for module, _ in self._changes}))


def _exchange(module: nn.Module, values: dict[str, Any]) -> dict[str, Any]:
    """Set attributes of an instance, and give what they were."""
    own = vars(module)
    before = {name: own.pop(name, _NOTHING) for name in values}
    own.update({name: value for name, value in values.items() if value is not _NOTHING})
    return before


def kernels_of(base: PreTrainedModel) -> Kernels | None:
    """Those that `use_kernels` has given to a model."""
    found: Kernels | None = vars(base).get("lit_dpo_kernels")
    return found


@contextmanager
def without_kernels(base: PreTrainedModel) -> Iterator[Any]:
    """Run the model's own code; the kernels, if there are any, are on again afterwards if they were."""
    found = kernels_of(base)
    before = found is not None and found.on
    if found is not None:
        found.use(False)
    try:
        yield found
    finally:
        if found is not None:
            found.use(before)


def use_kernels(base: PreTrainedModel) -> None:
    """Give a transformers model Liger's kernels, where it is on a CUDA device and Liger is there and knows its kind.

    They are taken for norms, for MLPs whose activation they compute, and for rotary positions; `kernels_of` then has
    them. Whether they compute what the model does is for the start-up probe to say (`choose_layout`).
    """
    # code that comes with a model may stand under a known name
    of_transformers = type(base).__module__.startswith("transformers.models.")
    if base.device.type not in _DEVICES or not of_transformers or find_spec("liger_kernel") is None:
        return
    own = {module: dict(vars(module)) for module in base.modules()}
    try:
        functions = _apply(base)
    except Exception as error:  # of any kind: a release of the one need not fit a release of the other
        functions = {}
        log.warning("%s: Liger's kernels are not used: %s", type(base).__name__, first_line(error))
    changes = []
    for module, before in own.items():
        patched = {name: value for name, value in vars(module).items() if before.get(name, _NOTHING) is not value}
        _exchange(module, {name: before.get(name, _NOTHING) for name in patched})
        if values := _of_module(module, patched) if functions else {}:
            changes.append((module, values))
        elif forward := _calling(functions, module):
            changes.append((module, {"forward": forward}))
    if changes:
        base.lit_dpo_kernels = Kernels(changes)
        base.lit_dpo_kernels.use(True)


def _apply(base: PreTrainedModel) -> dict[str, Any]:
    """Let Liger patch a model; the functions of transformers' source that it replaced, which are put back."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if (patch := MODEL_TYPE_TO_APPLY_LIGER_FN.get(base.config.model_type)) is None:
        return {}
    losses = {"cross_entropy", "fused_linear_cross_entropy"} & inspect.signature(patch).parameters.keys()
    sources = {type(module).__module__ for module in base.modules()}
    before = {name: dict(vars(sys.modules[name])) for name in sources if name.startswith("transformers.models.")}
    try:
        patch(model=base, **dict.fromkeys(losses, False))
    finally:
        replaced = {}
        for source, names in before.items():
            for name, value in names.items():
                if (given := vars(sys.modules[source])[name]) is not value:
                    setattr(sys.modules[source], name, value)
                    replaced[f"{source}.{name}"] = given
    return {name: given for name, given in replaced.items() if not isinstance(given, type)}


def _of_module(module: nn.Module, patched: dict[str, Any]) -> dict[str, Any]:
    """Choose what to keep of a patched module: its forward and what that reads, for norms and MLPs; else nothing."""
    kernel = getattr(patched.get("forward"), "__func__", None)
    if kernel is None or not (kernel.__qualname__.startswith("LigerRMSNorm") or _same_activation(module, kernel)):
        return {}
    values = {name: value for name, value in patched.items() if not isinstance(value, MethodType)}
    return {**values, "forward": MethodType(_by_device(kernel, type(module).forward, 1), module)}


def _same_activation(module: nn.Module, kernel: Any) -> bool:
    """Whether a gated MLP has the activation that its kernel does: Liger takes that for granted."""
    import torch
    from torch.nn.functional import gelu, silu

    given = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    if given is None or not any(kind in kernel.__qualname__ for kind in ("SwiGLU", "GEGLU")):
        return False
    x = torch.linspace(-8, 8, 101)
    expected = gelu(x, approximate="tanh") if "GEGLU" in kernel.__qualname__ else silu(x)
    return torch.allclose(given(x), expected, rtol=0, atol=1e-5)


def _calling(functions: dict[str, Any], module: nn.Module) -> Any:
    """Make a module's forward with kernels in place of functions of its source; None if it calls none of them."""
    source, forward = type(module).__module__, inspect.unwrap(type(module).forward)
    own = forward.__globals__
    called = {name: functions[key] for name in forward.__code__.co_names if (key := f"{source}.{name}") in functions}
    if not called or "forward" in vars(module) or own is not vars(sys.modules[source]):
        return None
    kernels = {name: _by_device(kernel, own[name], 0) for name, kernel in called.items()}
    copy = FunctionType(forward.__code__, {**own, **kernels}, forward.__name__, None, forward.__closure__)
    copy.__defaults__, copy.__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__
    return MethodType(copy, module)


def _by_device(kernel: Callable[..., Any], plain: Callable[..., Any], first: int) -> Callable[..., Any]:
    """Call the kernel where argument number `first` is on a device for it, else the plain code."""

    def call(*given: Any, **named: Any) -> Any:
        on = (*given[first:], *named.values())[0].device.type
        return (kernel if on in _DEVICES else plain)(*given, **named)

    return call
