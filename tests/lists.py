"""Random records of many completions of a prompt, and the same comparisons written out as pairs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from random import Random

import torch
from torch import Tensor

from lit_dpo.logps import CompletionLogps, PairLogps, SequenceLogps


def random(counts: Sequence[int] = (4, 2, 7), seed: int = 0) -> CompletionLogps:
    """Prompts with so many completions, in no order, all of a ranking's comparisons, and everything a loss may read."""
    shuffled, of = Random(seed), torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (sum(counts),), generator=of)
    size = int(lengths.sum())

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=of, dtype=torch.float64)

    def model() -> SequenceLogps:
        side = SequenceLogps(lengths.double(), lengths.double(), draw(-1, 0), draw(-3, 0), draw(0, 2))
        return side._replace(total=side.sums(side.per_token))

    comparisons = []
    for count in counts:
        ranking = shuffled.sample(range(count), count)
        every = [*combinations(ranking, 2)]
        comparisons += shuffled.sample(every, len(every))
    return compared(CompletionLogps(model(), model(), lengths, torch.tensor(counts), None, None), comparisons)


def compared(
    lists: CompletionLogps, comparisons: Sequence[tuple[int, int]], per_prompt: Sequence[int] | None = None
) -> CompletionLogps:
    """The record with these comparisons; by default all that there are between any two."""
    counts = lists.completions_per_prompt
    numbers = counts * (counts - 1) // 2 if per_prompt is None else torch.tensor(per_prompt)
    chosen_and_rejected = torch.tensor(comparisons, dtype=torch.long).view(-1, 2)
    return lists._replace(comparisons=chosen_and_rejected, comparisons_per_prompt=numbers)


def ranked(*ratios: Sequence[float], top: bool = False) -> CompletionLogps:
    """Prompts of completions with these log-ratios, best first; `top`: only the best one is compared with others."""
    flat = torch.tensor([one for prompt in ratios for one in prompt], dtype=torch.float64)
    ones = torch.ones_like(flat)
    every = [[(0, j) for j in range(1, len(one))] if top else [*combinations(range(len(one)), 2)] for one in ratios]
    counts = torch.tensor([len(prompt) for prompt in ratios])
    lists = CompletionLogps(
        SequenceLogps(flat - 5, ones), SequenceLogps(-5 * ones, ones), ones.long(), counts, None, None
    )
    return compared(lists, [pair for one in every for pair in one], [len(one) for one in every])


def with_tokens(lists: CompletionLogps, tokens: Tensor) -> CompletionLogps:
    """The record with other log-probs of the policy's tokens, of which the totals are the sums."""
    return lists._replace(policy=lists.policy._replace(per_token=tokens, total=lists.policy.sums(tokens)))


def written_out(lists: CompletionLogps) -> PairLogps:
    """Each comparison as a pair of its own."""
    firsts = [
        sum(lists.completions_per_prompt.tolist()[:prompt]) for prompt in range(len(lists.completions_per_prompt))
    ]
    of = [
        first
        for first, number in zip(firsts, lists.comparisons_per_prompt.tolist(), strict=True)
        for _ in range(number)
    ]
    sides = [
        [first + pair[side] for first, pair in zip(of, lists.comparisons.tolist(), strict=True)] for side in (0, 1)
    ]
    return PairLogps(*(_picked(model, lists, side) for model in lists[:2] for side in sides))


def rearranged(lists: CompletionLogps, order: Sequence[tuple[int, Sequence[int]]]) -> tuple[CompletionLogps, Tensor]:
    """Some of the prompts with their completions in another order, and where their tokens were.

    Args:
        lists: to pick from.
        order: for each prompt to be, which it was, and the places that its completions had.
    """
    counts, numbers = lists.completions_per_prompt.tolist(), lists.comparisons_per_prompt.tolist()
    picked, comparisons = [], []
    for prompt, places in order:
        picked += [sum(counts[:prompt]) + place for place in places]
        begin = sum(numbers[:prompt])
        for pair in lists.comparisons[begin : begin + numbers[prompt]].tolist():
            comparisons.append(tuple(places.index(place) for place in pair))
    found = CompletionLogps(
        *(_picked(model, lists, picked) for model in lists[:2]), lists.lengths[picked],
        torch.tensor([counts[prompt] for prompt, _ in order]), None, None,
    )  # fmt: skip
    tokens = torch.cat([torch.arange(int(lists.lengths.sum())).split(lists.lengths.tolist())[one] for one in picked])
    return compared(found, comparisons, [numbers[prompt] for prompt, _ in order]), tokens


def _picked(model: SequenceLogps, lists: CompletionLogps, completions: list[int]) -> SequenceLogps:
    def pick(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        parts = values.split(lists.lengths.tolist())
        return torch.cat([parts[one] for one in completions])

    return SequenceLogps(model.total[completions], model.length[completions], *(pick(values) for values in model[2:]))
