"""The record that crosses from the data to the model: prompts and their completions in one row, without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KNOWN_COLUMNS = ("weight", "score_margin", "probability")
"""Columns of numbers that have a meaning here: the module reads the first, losses of ours the others."""


class EncodedPrompt(NamedTuple):
    """A prompt and its completions as token ids, each once, and which of them are compared.

    Every part holds at least one token: the last prompt token predicts the first token of each completion.

    Attributes:
        prompt: token ids.
        completions: token ids of each of the `K` completions. A preference pair has two.
        comparisons: places among the completions, the chosen one's first. By default the first is preferred to the
            second: a pair.

    Example:
        >>> EncodedPrompt([1, 2], [[3], [4, 5]])
        EncodedPrompt(prompt=[1, 2], completions=[[3], [4, 5]], comparisons=((0, 1),))
    """

    prompt: list[int]
    completions: list[list[int]]
    comparisons: Sequence[tuple[int, int]] = ((0, 1),)


class CompletionBatch(NamedTuple):
    """A batch of `P` prompts as one row of `T` tokens: `prompt | completion 1 | … | completion K`, prompt after prompt.

    Each of the `C` completions is there once, however many of the `B` comparisons it is part of. A batch of pairs is
    the case of two completions and one comparison per prompt. What counts and places say is on the CPU, and numbers
    nothing beyond a prompt: batches concatenate, and parts of them need no new numbers.

    A NamedTuple, because Lightning moves and pins tuples and skips dataclasses.

    Attributes:
        input_ids: `(1, T)` token ids.
        position_ids: `(1, T)`; each completion's positions continue its prompt's, as if no other were there.
        prompt_lengths: `(P,)` tokens.
        completions_per_prompt: `(P,)` how many completions each prompt has.
        completion_lengths: `(C,)` tokens.
        comparisons: `(B, 2)` chosen and rejected: places among their prompt's own completions. Comparisons lie prompt
            after prompt.
        comparisons_per_prompt: `(P,)` how many comparisons are between completions of each prompt.
        indices: `(B,)` row numbers in the data set, for reports; those of a row with many completions are alike.
        keys: `(C, 16)` bytes, a hash of the token ids of prompt and completion: the same ones have the same key in any
            data set.
        columns: numbers of the data, `(B,)` float32 each, by name; see `PairLogps`.
    """

    input_ids: Tensor
    position_ids: Tensor
    prompt_lengths: Tensor
    completions_per_prompt: Tensor
    completion_lengths: Tensor
    comparisons: Tensor
    comparisons_per_prompt: Tensor
    indices: Tensor
    keys: Tensor
    columns: dict[str, Tensor] = {}  # noqa: RUF012 - never changed in place

    @property
    def size(self) -> int:
        """Number of comparisons `B`; `len` of a NamedTuple is its number of fields."""
        return self.indices.shape[0]

    @property
    def chosen_lengths(self) -> Tensor:
        """`(B,)` tokens of each comparison's chosen completion."""
        return self.completion_lengths[torch.from_numpy(places(self)[:, 0])]

    @property
    def rejected_lengths(self) -> Tensor:
        """`(B,)` tokens of each comparison's rejected completion."""
        return self.completion_lengths[torch.from_numpy(places(self)[:, 1])]

    @property
    def row_lengths(self) -> Tensor:
        """`(P,)` tokens of each prompt with all its completions."""
        of = torch.repeat_interleave(self.completions_per_prompt)
        return self.prompt_lengths.index_add(0, of, self.completion_lengths)

    def indices_of(self, losses: int) -> Tensor:
        """Row numbers of so many losses: of `B` comparisons, or of `P` prompts by their first comparison."""
        if losses == self.size:
            return self.indices
        return self.indices[self.comparisons_per_prompt.cumsum(0) - self.comparisons_per_prompt]

    def to(self, device: torch.device | str, **_: Any) -> CompletionBatch:
        """Tokens on `device`; lengths stay on the CPU, where the layout is computed without a device sync.

        Lightning moves a batch by this method.
        """
        return self._replace(
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            columns={name: column.to(device, non_blocking=True) for name, column in self.columns.items()},
        )

    def of_completions(self, wanted: Sequence[int]) -> CompletionBatch:
        """Pick some of the completions, each with its prompt, as a batch that compares nothing.

        Args:
            wanted: places among the `C` completions, ascending.

        Example:
            >>> batch = collate([EncodedPrompt([1, 2], [[3], [4], [5]]), EncodedPrompt([6], [[7], [8, 9]])])
            >>> batch.of_completions([1, 4]).input_ids.tolist()
            [[1, 2, 4, 6, 8, 9]]
        """
        picked = torch.zeros(len(self.completion_lengths), dtype=torch.bool)
        picked[list(wanted)] = True
        of = torch.repeat_interleave(self.completions_per_prompt)
        counts = torch.zeros_like(self.completions_per_prompt).index_add(0, of, picked.long())
        kept: list[Tensor] = []
        start, place = 0, 0
        for prompt, here, count in zip(
            self.prompt_lengths.tolist(), self.completions_per_prompt.tolist(), counts.tolist(), strict=True
        ):
            if count:
                kept.append(torch.arange(start, start + prompt))
            start += prompt
            for length in self.completion_lengths[place : place + here].tolist():
                if picked[place]:
                    kept.append(torch.arange(start, start + length))
                start += length
                place += 1
        tokens = torch.cat(kept).to(self.input_ids.device, non_blocking=True)
        return CompletionBatch(
            input_ids=self.input_ids[:, tokens],
            position_ids=self.position_ids[:, tokens],
            prompt_lengths=self.prompt_lengths[counts > 0],
            completions_per_prompt=counts[counts > 0],
            completion_lengths=self.completion_lengths[picked],
            comparisons=self.comparisons[:0],
            comparisons_per_prompt=torch.zeros_like(counts[counts > 0]),
            indices=self.indices[:0],
            keys=self.keys[picked],
            columns={name: column[:0] for name, column in self.columns.items()},
        )

    def uncounted(self) -> CompletionBatch:
        """Return the first completion alone: what a rank runs that has no share of a batch, and that compares nothing.

        Example:
            >>> batch = collate([EncodedPrompt([1, 2], [[3], [4], [5]])]).uncounted()
            >>> batch.input_ids.tolist(), batch.size
            ([[1, 2, 3]], 0)
        """
        return self.of_completions([0])

    def cut(self, tokens: float) -> list[CompletionBatch]:
        """Cut the batch into micro-batches of whole prompts, of at most `tokens` tokens; a longer one is alone.

        They are views: nothing is copied, and nothing waits for a device.

        Example:
            >>> batch = collate([EncodedPrompt([1, 2], [[3], [4]]), EncodedPrompt([5], [[6], [7, 8]])])
            >>> [part.input_ids.tolist() for part in batch.cut(6)]
            [[[1, 2, 3, 4]], [[5, 6, 7, 8]]]
        """
        lengths = self.row_lengths.numpy()
        ends = {
            "tokens": _ends(lengths),
            "completions": _ends(self.completions_per_prompt.numpy()),
            "comparisons": _ends(self.comparisons_per_prompt.numpy()),
        }
        parts = []
        for first, last in pairwise(microbatch_borders(lengths, tokens)):
            of_tokens, of_completions, of_comparisons = (
                itemgetter(slice(borders[first], borders[last])) for borders in ends.values()
            )
            of_prompts: Callable[[Tensor], Tensor] = itemgetter(slice(first, last))
            parts.append(
                CompletionBatch(
                    input_ids=of_tokens(self.input_ids[0])[None],
                    position_ids=of_tokens(self.position_ids[0])[None],
                    prompt_lengths=of_prompts(self.prompt_lengths),
                    completions_per_prompt=of_prompts(self.completions_per_prompt),
                    completion_lengths=of_completions(self.completion_lengths),
                    comparisons=of_comparisons(self.comparisons),
                    comparisons_per_prompt=of_prompts(self.comparisons_per_prompt),
                    indices=of_comparisons(self.indices),
                    keys=of_completions(self.keys),
                    columns={name: of_comparisons(column) for name, column in self.columns.items()},
                )
            )
        return parts

    def split(self, tokens: float) -> list[CompletionBatch]:
        """Cut a batch of one prompt between its completions: parts of at most `tokens` tokens that compare nothing.

        Each has at least two completions, as a pair does, but for the last one, and its prompt.

        Example:
            >>> batch = collate([EncodedPrompt([1, 2], [[3], [4], [5], [6, 7]])])
            >>> [part.input_ids.tolist() for part in batch.split(4)]
            [[[1, 2, 3, 4]], [[1, 2, 5, 6, 7]]]
        """
        borders = completion_borders(int(self.prompt_lengths.sum()), self.completion_lengths.tolist(), tokens)
        return [self.of_completions(range(first, last)) for first, last in pairwise(borders)]


def places(record: Any) -> NDArray[np.int64]:
    """`(B, 2)` places of the compared completions among all `C`.

    Args:
        record: with `comparisons`, `comparisons_per_prompt` and `completions_per_prompt`.

    Example:
        >>> places(collate([EncodedPrompt([1], [[2], [3]]), EncodedPrompt([4], [[5], [6]], [(1, 0)])])).tolist()
        [[0, 1], [3, 2]]
    """
    # by way of lists, which are numbers even where tensors are fake
    counts, compared = (record.completions_per_prompt.tolist(), record.comparisons_per_prompt.tolist())
    before = np.repeat(_ends(np.array(counts, np.int64))[:-1], compared)
    found: NDArray[np.int64] = np.array(record.comparisons.tolist(), np.int64).reshape(-1, 2) + before[:, None]
    return found


def _ends(counts: NDArray[np.int64]) -> list[int]:
    return [0, *accumulate(counts.tolist())]


def microbatch_borders(lengths: NDArray[np.int64], tokens: float) -> list[int]:
    """Where micro-batches of at most `tokens` tokens begin, and where the last one ends.

    Args:
        lengths: `(P,)` tokens of each prompt with its completions; one that is longer than that is a micro-batch of its
            own.
        tokens: most tokens of a micro-batch.

    Example:
        >>> microbatch_borders(np.array([30, 40, 120, 50, 50]), 100)
        [0, 2, 3, 5]
    """
    found, filled = [0], 0
    for prompt, length in enumerate(lengths.tolist()):
        if filled and filled + length > tokens:
            found.append(prompt)
            filled = 0
        filled += length
    return [*found, len(lengths)]


def completion_borders(prompt: int, completions: Sequence[int], tokens: float) -> list[int]:
    """Where the parts of one prompt begin, of at least two completions but for the last, and where the last one ends.

    Args:
        prompt: its tokens, which are in every part.
        completions: tokens of each.
        tokens: most tokens of a part that has more than two.

    Example:
        >>> completion_borders(2, [1, 1, 1, 2], 4)
        [0, 2, 4]
    """
    found, filled = [0], prompt
    for place, length in enumerate(completions):
        if place - found[-1] > 1 and filled + length > tokens:
            found.append(place)
            filled = prompt
        filled += length
    return [*found, len(completions)]


def collate(
    prompts: Sequence[EncodedPrompt],
    indices: Sequence[int] | None = None,
    columns: Mapping[str, Sequence[float]] | None = None,
) -> CompletionBatch:
    """Lay prompts and their completions out in one row.

    Args:
        prompts: with their completions and comparisons, in order.
        indices: `(B,)` row numbers of the comparisons; the prompts' numbers, from 0, if not given.
        columns: what the data say besides: a number for each comparison, by name.

    Raises:
        ValueError: if a prompt or a completion is empty, a comparison is not between two of its prompt's, or there are
            not as many row numbers or numbers of a column as comparisons.

    Example:
        >>> batch = collate([EncodedPrompt([1, 2, 3], [[4, 5], [6]]), EncodedPrompt([7, 8], [[9], [10, 11]])])
        >>> batch.input_ids.tolist()
        [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
        >>> batch.position_ids.tolist()
        [[0, 1, 2, 3, 4, 3, 0, 1, 2, 2, 3]]
    """
    ids: list[int] = []
    positions: list[int] = []
    for number, one in enumerate(prompts):
        if not (one.prompt and one.completions and all(one.completions)):
            raise ValueError(f"Expected at least one token in each part of prompt {number} but got {one}")
        if not all(0 <= place < len(one.completions) for pair in one.comparisons for place in pair):
            raise ValueError(f"Expected comparisons of {len(one.completions)} completions but got {one.comparisons}")
        ids += one.prompt
        start = len(one.prompt)
        positions += range(start)
        for completion in one.completions:
            ids += completion
            positions += range(start, start + len(completion))
    flat = np.array(ids, dtype=np.int64)
    rows = [number for number, one in enumerate(prompts) for _ in one.comparisons] if indices is None else list(indices)
    count = sum(len(one.comparisons) for one in prompts)
    for name, values in {"indices": rows, **(columns or {})}.items():
        if len(values) != count:
            raise ValueError(f"Expected {count} {name}, one for each comparison, but got {len(values)}.")
    return CompletionBatch(
        input_ids=torch.from_numpy(flat[None]),
        position_ids=_numbers([positions]),
        prompt_lengths=_numbers([len(one.prompt) for one in prompts]),
        completions_per_prompt=_numbers([len(one.completions) for one in prompts]),
        completion_lengths=_numbers([len(completion) for one in prompts for completion in one.completions]),
        comparisons=_numbers([pair for one in prompts for pair in one.comparisons]).view(-1, 2),
        comparisons_per_prompt=_numbers([len(one.comparisons) for one in prompts]),
        indices=_numbers(rows),
        keys=_keys(prompts, flat),
        columns={name: torch.tensor(values, dtype=torch.float32) for name, values in (columns or {}).items()},
    )


def _numbers(values: Sequence[Any]) -> Tensor:
    # by way of NumPy, which reads lists five times as fast as torch
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _keys(prompts: Sequence[EncodedPrompt], ids: NDArray[np.int64]) -> Tensor:
    """`(C, 16)` hashes of the ids of prompt and completion, given all ids in one row."""
    content, start = ids.astype(np.int32).tobytes(), 0
    keys = bytearray()
    for one in prompts:
        end = start + 4 * len(one.prompt)
        # with the prompt's length, or the border between the two would not count
        prompt = np.int32(len(one.prompt)).tobytes() + content[start:end]
        for completion in one.completions:
            start, end = end, end + 4 * len(completion)
            keys += hashlib.blake2b(prompt + content[start:end], digest_size=16).digest()
        start = end
    return torch.frombuffer(keys, dtype=torch.uint8).view(-1, 16)
