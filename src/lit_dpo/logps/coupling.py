"""What other ranks have measured of the same batch, for a loss that couples pairs of different prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lit_dpo.logps.microbatch import join
from lit_dpo.logps.records import PairLogps

_HOSTS: dict[Any, Any] = {}  # a group of processes that exchange what is on the CPU, by the group that there is


class Others(NamedTuple):
    """The records of the other ranks' shares of a batch, without gradients.

    Attributes:
        before: of the ranks before this one.
        after: of those after it.
    """

    before: list[PairLogps]
    after: list[PairLogps]

    def around(self, pairs: PairLogps) -> PairLogps:
        """Join them with this rank's record, in the order of ranks; the same pairs as on one process."""

        def alike(record: PairLogps) -> PairLogps:
            return record._replace(state=pairs.state, completions=pairs.completions and record.completions)

        return join([*map(alike, self.before), pairs, *map(alike, self.after)])

    def own(self, values: Tensor, pairs: PairLogps) -> Tensor:
        """Take this rank's of the values of all pairs, or of all prompts.

        Args:
            values: of the joined record, `(B,)` or `(P,)`.
            pairs: this rank's record.
        """
        for count in (_pairs, _prompts):
            first, here = sum(map(count, self.before)), count(pairs)
            if len(values) == first + here + sum(map(count, self.after)):
                return values[first : first + here]
        raise ValueError(f"Expected values of all pairs or of all prompts but got {len(values)}.")


def meet(pairs: PairLogps) -> Others:
    """Exchange the records of a batch's shares; all ranks do so together, for each batch once.

    What is on a device goes there, as it is, and nothing waits for it; counts and places go from CPU to CPU.

    Args:
        pairs: of this rank.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine: list[Tensor] = []
    sent = _mapped(pairs.detach()._replace(state=None), lambda one: _leave(one, mine))
    everybody: list[Any] = [None] * ranks
    dist.all_gather_object(everybody, sent, group=_hosts())
    sizes = [sum(_found(one)) for one in everybody]
    if any(sizes):
        device = pairs.policy_chosen.total.device
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
        # all ranks' records have the same fields, so that there is something of each
        padded[: sizes[rank]] = torch.cat([one.contiguous().reshape(-1).view(torch.uint8) for one in mine])
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(parts, padded)
        everybody = [_filled(one, part) for one, part in zip(everybody, parts, strict=True)]
    return Others(everybody[:rank], everybody[rank + 1 :])


class _OnDevice(NamedTuple):
    """Stands for a tensor that is sent by itself."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def _leave(tensor: Tensor, mine: list[Tensor]) -> Any:
    if tensor.device.type == "cpu":
        return tensor
    mine.append(tensor)
    return _OnDevice(tuple(tensor.shape), tensor.dtype)


def _found(record: Any) -> list[int]:
    """Bytes of what a record sends by itself."""
    sizes: list[int] = []
    _mapped(record, lambda one: sizes.append(one.bytes) if isinstance(one, _OnDevice) else None)
    return sizes


def _filled(record: Any, sent: Tensor) -> Any:
    begin = 0

    def taken(one: Any) -> Any:
        nonlocal begin
        if not isinstance(one, _OnDevice):
            return one
        begin += one.bytes
        # a copy, because numbers of eight bytes begin at a multiple of eight
        return sent[begin - one.bytes : begin].clone().view(one.dtype).view(one.shape)

    return _mapped(record, taken)


def _mapped(record: Any, change: Callable[[Any], Any]) -> Any:
    """Change the tensors of a record, and of the records in it, in their order."""
    if record is None:
        return None
    if isinstance(record, Tensor | _OnDevice):
        return change(record)
    if isinstance(record, dict):
        return {name: _mapped(one, change) for name, one in record.items()}
    return type(record)(*(_mapped(one, change) for one in record))


def _hosts() -> Any:
    """Return the processes as a group that exchanges what is on the CPU; made by all of them, when first asked for."""
    world = dist.group.WORLD
    if dist.get_backend() == "gloo" or not dist.is_gloo_available():
        return world
    if world not in _HOSTS:
        _HOSTS.clear()
        _HOSTS[world] = dist.new_group(backend="gloo")
    return _HOSTS[world]


def _pairs(record: PairLogps) -> int:
    return len(record.policy_chosen.total)


def _prompts(record: PairLogps) -> int:
    return len(record.lists.completions_per_prompt)


def nothing_of(pairs: PairLogps) -> PairLogps:
    """Return a record of the same fields and no pairs."""
    none: PairLogps = _mapped(pairs._replace(state=None), lambda one: one[:0])
    return none._replace(state=pairs.state)
