"""Two ways to put a batch of pairs in front of a model; both lead to the same scored positions.

`flat_rows` is the batch as it comes: one row, a prompt once per pair, no padding, exact under the pair attention.
`padded_rows` is one row per completion, for architectures that mix tokens in ways the pair attention cannot separate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_dpo.data.batch import PairBatch


class Segment(NamedTuple):
    """Where one pair lies in the flat row: first token and the lengths of its three parts."""

    start: int
    prompt: int
    chosen: int
    rejected: int


class Rows(NamedTuple):
    """What a backbone reads and which of its hidden states are scored.

    Attributes:
        inputs: keyword arguments of the backbone: `input_ids`, `position_ids`, and what the layout adds.
        predictors: `(N,)` positions, in the flattened rows, of the hidden states that predict a completion token.
        targets: `(N,)` those tokens; all chosen completions in the order of pairs, then all rejected ones.
        lengths: the `2B` completion lengths in that order, summing to `N`.
        needed: positions in the flat row that cover `predictors`, each once; what the last layer makes of others is not
            read. None for padded rows.
    """

    inputs: dict[str, Any]
    predictors: Tensor
    targets: Tensor
    lengths: list[int]
    needed: Tensor | None = None


def segments(batch: PairBatch) -> list[Segment]:
    """Find the pairs' places in the flat row.

    Example:
        >>> from lit_dpo.data.batch import EncodedPair, collate_pairs
        >>> segments(collate_pairs([EncodedPair([1, 2], [3], [4]), EncodedPair([5], [6, 7], [8])]))
        [Segment(start=0, prompt=2, chosen=1, rejected=1), Segment(start=4, prompt=1, chosen=2, rejected=1)]
    """
    found, start = [], 0
    # lengths are on the CPU, wherever the tokens are: nothing waits for a device here
    lengths = (batch.prompt_lengths.tolist(), batch.chosen_lengths.tolist(), batch.rejected_lengths.tolist())
    for prompt, chosen, rejected in zip(*lengths, strict=True):
        found.append(Segment(start, prompt, chosen, rejected))
        start += prompt + chosen + rejected
    return found


def flat_rows(batch: PairBatch, pairs: list[Segment]) -> Rows:
    """Take the batch's own row; the caller adds the pair layout for the attention."""
    predictors, targets = [], []
    for s in pairs:
        completion = s.start + s.prompt
        # a state predicts the next token, so that the prompt's last one predicts the first of a completion
        predictors.append(torch.arange(completion - 1, completion + s.chosen - 1))
        targets.append(torch.arange(completion, completion + s.chosen))
    # after all chosen ones: this order is that of `lengths`, by which values are cut into sides
    for s in pairs:
        completion = s.start + s.prompt + s.chosen
        # the last prompt token predicts the first rejected token too, across the chosen completion
        predictors.append(torch.tensor([s.start + s.prompt - 1]))
        predictors.append(torch.arange(completion, completion + s.rejected - 1))
        targets.append(torch.arange(completion, completion + s.rejected))
    device = batch.input_ids.device
    # to the pair's end, though two last tokens predict nothing: so each position comes once, and in order
    ends = [torch.arange(s.start + s.prompt - 1, s.start + s.prompt + s.chosen + s.rejected) for s in pairs]
    return Rows(
        inputs={"input_ids": batch.input_ids, "position_ids": batch.position_ids},
        predictors=torch.cat(predictors).to(device, non_blocking=True),
        targets=batch.input_ids[0, torch.cat(targets).to(device, non_blocking=True)],
        lengths=_lengths(pairs),
        needed=torch.cat(ends).to(device, non_blocking=True),
    )


def padded_rows(batch: PairBatch, pairs: list[Segment]) -> Rows:
    """`2B` right-padded rows `prompt | completion`, chosen first. What the padding is does not matter: it is masked."""
    rows = [torch.arange(s.start, s.start + s.prompt + s.chosen) for s in pairs]
    for s in pairs:
        completion = s.start + s.prompt + s.chosen
        rows.append(
            torch.cat([torch.arange(s.start, s.start + s.prompt), torch.arange(completion, completion + s.rejected)])
        )
    # -1, since 0 is a place in the row
    source = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    width = source.shape[1]
    predictors, targets = [], []
    for number, (row, s) in enumerate(zip(rows, [*pairs, *pairs], strict=True)):
        # places in the rows laid end to end
        predictors.append(torch.arange(number * width + s.prompt - 1, number * width + len(row) - 1))
        targets.append(row[s.prompt :])
    device = batch.input_ids.device
    mask = source >= 0
    return Rows(
        inputs={
            "input_ids": batch.input_ids[0, source.clamp(min=0).to(device, non_blocking=True)],
            # padding is on the right, so that a token's column is its position
            "position_ids": torch.arange(width, device=device).expand(len(rows), -1),
            "attention_mask": mask.long().to(device, non_blocking=True),
        },
        predictors=torch.cat(predictors).to(device, non_blocking=True),
        targets=batch.input_ids[0, torch.cat(targets).to(device, non_blocking=True)],
        lengths=_lengths(pairs),
    )


def _lengths(pairs: list[Segment]) -> list[int]:
    return [s.chosen for s in pairs] + [s.rejected for s in pairs]
