"""What losses over lists read of the comparisons: who was preferred to whom, and the order that follows.

Comparisons and counts are on the CPU, so nothing here waits for a device but a refusal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_dpo.logps.records import CompletionLogps, PairLogps


def there(lists: CompletionLogps) -> Tensor:
    """`(P, K)` whether a prompt has that many completions; `K` is the most that one has."""
    counts = lists.completions_per_prompt
    return torch.arange(int(counts.max())) < counts[:, None]


def listed(pairs: PairLogps) -> tuple[CompletionLogps, Tensor]:
    """Return the completions, and `(C,)` log π/π_ref of each, nats.

    Raises:
        ValueError: if there is no reference.
    """
    pairs.require("reference_chosen")
    lists = pairs.lists
    reference: Any = lists.reference
    return lists, lists.policy.total - reference.total


def take(values: Tensor, lists: CompletionLogps, order: Tensor) -> Tensor:
    """`(P, k)` of `(C,)` values, those of each prompt in one line.

    Args:
        values: of all completions.
        lists: which of them are of which prompt.
        order: `(P, k)` places among each prompt's own; beyond its last one, those of its first are taken again.
    """
    counts = lists.completions_per_prompt
    own = torch.where(order < counts[:, None], order, 0)
    found = (own + (counts.cumsum(0) - counts)[:, None]).flatten()
    return values.index_select(0, found.to(values.device, non_blocking=True)).view(order.shape)


def preferred(lists: CompletionLogps) -> Tensor:
    """`(P, K, K)` whether a prompt's one completion was preferred to its other, as the comparisons say."""
    prompts, most = there(lists).shape
    found = torch.zeros(prompts, most, most, dtype=torch.bool)
    of, (better, worse) = torch.repeat_interleave(lists.comparisons_per_prompt), lists.comparisons.T
    found[of, better, worse] = True
    return found


def ranking(lists: CompletionLogps, top: int | None = None) -> Tensor:
    """`(P, K)` places of each prompt's completions, the best one first, and what it does not have last.

    A completion that was preferred to another is also above those that the other is above: comparisons of neighbours
    are enough.

    Args:
        lists: with the comparisons.
        top: how many positions have to be clear; those after them are in any order. None: all.

    Raises:
        ValueError: if the comparisons of a prompt leave open which completion has one of these positions.

    Example:
        >>> from lit_dpo.logps import SequenceLogps
        >>> logps, count = SequenceLogps(torch.zeros(3), torch.ones(3)), torch.tensor
        >>> ranking(CompletionLogps(logps, None, count([1, 1, 1]), count([3]), count([[0, 1], [2, 0]]), count([2])))
        tensor([[2, 0, 1]])
    """
    counts, above = lists.completions_per_prompt, preferred(lists)
    most = above.shape[1]
    for _ in range((most - 1).bit_length()):  # each time, over twice as many steps
        above = above | (above.float() @ above.float() > 0)
    beaten_by = above.sum(1)
    # compared with all others, and not in a circle, where one is above itself
    clear = (beaten_by + above.sum(2) == counts[:, None] - 1) & ~above.diagonal(dim1=1, dim2=2)
    wanted = (counts - 1).clamp(max=top or most)  # the last position is what is left
    clear &= there(lists) & (beaten_by < wanted[:, None])
    open_ones = (clear.sum(1) < wanted).nonzero().flatten().tolist()
    if open_ones:
        raise ValueError(_open(open_ones[0], *(int(one[open_ones[0]]) for one in (counts, wanted))))
    position = torch.where(clear, beaten_by, most).masked_fill(~there(lists), most + 1)
    return position.argsort(dim=1, stable=True)


def _open(prompt: int, count: int, wanted: int) -> str:
    what = "which one is best" if wanted == 1 else f"which ones are the best {wanted}, in order"
    if wanted == count - 1:
        what = "which one is above which"
    advice = "" if wanted == 1 else "; `top: 1`, of `PlackettLuceLoss`, asks for the best one alone"
    return (
        f"Expected comparisons that say of the {count} completions of prompt {prompt} of the batch (the first is 0) "
        f"{what}, but they leave it open: some are not compared, equally good, or in a circle. "
        f"`--data.comparisons all` compares all that differ{advice}."
    )
