"""Every rank runs the same passes of a sharded base, in the same order.

A pass of a sharded base gathers each layer from all ranks that share it: a rank that runs one pass more than another
waits for ever, or takes what was meant for another pass. But ranks have different data: one batch has three
micro-batches and another four, one rank has a validation batch more, one finds all its completions in a cache. So where
the base is sharded, ranks agree on how many passes come, and whoever has fewer runs some again, for nothing: what comes
of them is thrown away.

A unit is what the module does with one micro-batch (`pair_logps`), and its backward pass in training. Before some of
them all ranks say how many they have; one that is done says 0, until all do. So ranks with any numbers of batches stay
together. Where the base is whole, nothing is asked, and nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lit_dpo.policy.sharding import mesh_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lit_dpo.data.batch import CompletionBatch


def agreed(model: PeftModel | PreTrainedModel, number: int) -> int:
    """Return the largest number among the ranks that share a base; of a whole base this rank's own.

    Every one of these ranks must ask.
    """
    mesh = mesh_of(model)
    if mesh is None:
        return number
    import torch
    from torch import distributed

    largest = torch.tensor(int(number), device=mesh.device_type)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=mesh.get_group())
    return int(largest)


def idle(model: PeftModel | PreTrainedModel, parts: Sequence[CompletionBatch]) -> list[CompletionBatch]:
    """Return what a rank runs after its own parts, for nothing, so that all run as many: its smallest one, again."""
    smallest = min(parts, key=lambda part: part.input_ids.shape[1])
    return [smallest] * (agreed(model, len(parts)) - len(parts))
