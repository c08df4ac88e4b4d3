"""Bytes of tensors that are there: those that operations make, and those that a model keeps."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, UntypedStorage, nn

from lit_dpo.compat import operation_mode

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


_Mode: Any = operation_mode()


class LiveBytes(_Mode):
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
        super().__init__()
        self.live: int = 0
        self.peak: int = 0
        self._made: dict[int, tuple[int, weakref.ref[UntypedStorage]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it made; views and results in place are no new memory."""
        result = func(*args, **(kwargs or {}))
        given: set[int] | None = None
        for made in _given(result):
            # one object for as long as there is memory, whichever tensor is asked
            storage = made.untyped_storage()
            if (key := id(storage)) in self._made:
                continue
            if given is None:
                given = {id(one.untyped_storage()) for one in _given((args, kwargs))}
            if key not in given:
                size = storage.nbytes()
                self._made[key] = size, weakref.ref(storage, partial(self._free, key))
                self.live += size
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, key: int, _: object) -> None:
        self.live -= self._made.pop(key)[0]


def stored_bytes(model: PeftModel | PreTrainedModel) -> tuple[int, int]:
    """Bytes of a model's tensors as they are stored, each storage once: those that are frozen, those that train."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    sizes: dict[bool, dict[int, int]] = {False: {}, True: {}}
    for tensor in _tensors(model, set()):
        storage = _here(tensor).untyped_storage()
        sizes[id(tensor) in trained][id(storage)] = storage.nbytes()
    return sum(sizes[False].values()), sum(sizes[True].values())


def _here(tensor: Tensor) -> Tensor:
    """Of a tensor in shards the part of this rank; of any other the tensor."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard


def _given(thing: object) -> Iterator[Tensor]:
    """Tensors of what an operation takes or gives."""
    if isinstance(thing, Tensor):
        yield _here(thing)
    elif isinstance(thing, list | tuple | dict):
        for one in thing.values() if isinstance(thing, dict) else thing:
            yield from _given(one)


def _tensors(thing: object, seen: set[int]) -> Iterator[Tensor]:
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
