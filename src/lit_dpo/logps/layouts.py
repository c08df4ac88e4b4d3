"""Two ways to put a batch in front of a model; both lead to the same scored positions.

`flat_rows` is the batch as it comes: one row, each prompt once, no padding, exact under the pair attention.
`padded_rows` is one row per completion, for architectures that mix tokens in ways the pair attention cannot separate.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_dpo.data.batch import CompletionBatch


class Segment(NamedTuple):
    """Where one prompt lies in the flat row: its first token, and the lengths of its parts."""

    start: int
    prompt: int
    completions: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest completion."""
        return self.prompt + max(self.completions)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each completion begins in the row, and where it ends."""
        ends = [*accumulate(self.completions, initial=self.start + self.prompt)]
        return list(pairwise(ends))


class Rows(NamedTuple):
    """What a backbone reads and which of its hidden states are scored.

    Attributes:
        inputs: keyword arguments of the backbone: `input_ids`, `position_ids`, and what the layout adds.
        predictors: `(N,)` positions, in the flattened rows, of the hidden states that predict a completion token.
        targets: `(N,)` those tokens, completion after completion.
        lengths: the `C` completion lengths, summing to `N`.
        needed: positions in the flat row that cover `predictors`, each once; what the last layer makes of others is not
            read. None for padded rows.
    """

    inputs: dict[str, Any]
    predictors: Tensor
    targets: Tensor
    lengths: list[int]
    needed: Tensor | None = None


def segments(batch: CompletionBatch) -> list[Segment]:
    """Find the prompts' places in the flat row.

    Example:
        >>> from lit_dpo.data.batch import EncodedPrompt, collate
        >>> segments(collate([EncodedPrompt([1, 2], [[3], [4]]), EncodedPrompt([5], [[6, 7], [8], [9]])]))
        [Segment(start=0, prompt=2, completions=(1, 1)), Segment(start=4, prompt=1, completions=(2, 1, 1))]
    """
    found, start = [], 0
    # lengths are on the CPU, wherever the tokens are: nothing waits for a device here
    lengths = iter(batch.completion_lengths.tolist())
    for prompt, count in zip(batch.prompt_lengths.tolist(), batch.completions_per_prompt.tolist(), strict=True):
        found.append(Segment(start, prompt, tuple(islice(lengths, count))))
        start += prompt + sum(found[-1].completions)
    return found


def flat_rows(batch: CompletionBatch, prompts: list[Segment]) -> Rows:
    """Take the batch's own row; the caller adds the pair layout for the attention."""
    predictors: list[int] = []
    targets: list[int] = []
    for s in prompts:
        last = s.start + s.prompt - 1
        for begin, end in s.spans:
            # a state predicts the next token, so that the prompt's last one predicts the first of each completion,
            # across those in between
            predictors += [last, *range(begin, end - 1)]
            targets += range(begin, end)
    device = batch.input_ids.device
    # to each end, though last tokens predict nothing: so each position comes once, and in order
    needed = [place for s in prompts for place in range(s.start + s.prompt - 1, s.spans[-1][1])]
    return Rows(
        inputs={"input_ids": batch.input_ids, "position_ids": batch.position_ids},
        predictors=_index(predictors, device),
        targets=batch.input_ids[0, _index(targets, device)],
        lengths=_lengths(prompts),
        needed=_index(needed, device),
    )


def padded_rows(batch: CompletionBatch, prompts: list[Segment]) -> Rows:
    """`C` right-padded rows `prompt | completion`. What the padding is does not matter: it is masked."""
    lengths = [(s.prompt, s.prompt + end - begin) for s in prompts for begin, end in s.spans]
    width = max(length for _, length in lengths)
    source = np.full((len(lengths), width), -1)  # 0 is a place in the row
    spans = ((s, begin, end) for s in prompts for begin, end in s.spans)
    for row, (s, begin, end) in zip(source, spans, strict=True):
        row[: s.prompt] = np.arange(s.start, s.start + s.prompt)
        row[s.prompt : s.prompt + end - begin] = np.arange(begin, end)
    # places in the rows laid end to end
    predictors = [n * width + at for n, (prompt, length) in enumerate(lengths) for at in range(prompt - 1, length - 1)]
    targets = source.ravel()[np.array(predictors) + 1]
    device = batch.input_ids.device
    places = torch.from_numpy(source)
    return Rows(
        inputs={
            "input_ids": batch.input_ids[0, places.clamp(min=0).to(device, non_blocking=True)],
            # padding is on the right, so that a token's column is its position
            "position_ids": torch.arange(width, device=device).expand(len(lengths), -1),
            "attention_mask": (places >= 0).long().to(device, non_blocking=True),
        },
        predictors=_index(predictors, device),
        targets=batch.input_ids[0, _index(targets, device)],
        lengths=_lengths(prompts),
    )


def _index(places: Sequence[int] | NDArray[np.int64], device: torch.device) -> Tensor:
    # by way of NumPy, which reads lists five times as fast as torch
    return torch.from_numpy(np.asarray(places, dtype=np.int64)).to(device, non_blocking=True)


def _lengths(prompts: list[Segment]) -> list[int]:
    return [length for s in prompts for length in s.completions]
