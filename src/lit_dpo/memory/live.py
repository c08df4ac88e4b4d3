"""Bytes of tensors that are there: those that operations make, and those that a model keeps."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations make while it is on, until they are freed.

    Attributes:
        live: bytes alive now.
        peak: most bytes that were alive.

    Example:
        >>> import torch
        >>> with LiveBytes() as memory:
        ...     zeros = torch.zeros(100) + torch.zeros(100)
        >>> memory.live, memory.peak
        (400, 1200)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it made; views and results in place are no new memory."""
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and (key := made.untyped_storage()._cdata) not in given | self._sizes.keys():
                self._sizes[key] = made.untyped_storage().nbytes()
                self.live += self._sizes[key]
                weakref.finalize(made.untyped_storage(), self._free, key)
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def stored_bytes(model: Any) -> tuple[int, int]:
    """Bytes of a model's tensors as they are stored, each storage once: those that are frozen, those that train."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    sizes: dict[bool, dict[int, int]] = {False: {}, True: {}}
    for tensor in _tensors(model, set()):
        storage = tensor.untyped_storage()
        sizes[id(tensor) in trained][storage._cdata] = storage.nbytes()
    return sum(sizes[False].values()), sum(sizes[True].values())


def _tensors(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors of modules, and of what quantisation keeps with them."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    if isinstance(thing, Tensor | nn.Module) or type(thing).__module__.startswith("bitsandbytes"):
        thing = getattr(thing, "__dict__", {})
    if isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors(value, seen)
