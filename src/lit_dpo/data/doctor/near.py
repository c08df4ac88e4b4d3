"""Rows that are nearly the same, by MinHash: the share of phrases that two texts have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from lit_dpo.errors import LitDPOError

SIMILAR = 0.8
"""Share of their phrases that near duplicates have in common."""
_PERMUTATIONS = 96
_OF_PROMPT = 64
_BANDS = (12, 8)
"""So that of rows that share four fifths nine in ten meet, and of those that share nine tenths all."""
_CROWD = 50
"""Rows with like completions that are compared; where there are more, none comes to them."""
_MOST = 200_000
"""Rows that later ones are compared with: each takes some 5 KB of memory."""
_PHRASE = 3  # words
_FACTORS = np.array([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D], np.uint64)


class NearDuplicates:
    """Finds rows whose prompt and completions each share four fifths of their phrases with an earlier row's.

    A phrase is three words. A row is compared with those that are like none before them, fifty at most; so neither a
    thousand copies nor a thousand answers `yes` take longer than a thousand others. The same rows in the same order
    give the same pairs, on any machine.

    Raises:
        LitDPOError: if `datasketch` is not installed.
    """

    def __init__(self) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise LitDPOError("Expected the package `datasketch`: `pip install 'lit_dpo[inspect]'`.") from error
        self.pairs: list[tuple[int, int]] = []
        """Numbers of a row and of the earlier one that it is like."""
        self._empty, self._no_prompt = (MinHash(num_perm=n, hashfunc=int) for n in (_PERMUTATIONS, _OF_PROMPT))
        self._index = MinHashLSH(params=_BANDS, num_perm=_PERMUTATIONS)
        self._first: dict[int, tuple[Any, Any]] = {}  # the numbers of sketches, a third of their size
        self._exact: set[int] = set()
        self._words = _Words()

    def add(self, number: int, says: int, prompt: Sequence[str], completions: Sequence[Sequence[str]]) -> None:
        """Look at a row's words; what equals an earlier row (has the hash of what it says) is none of these."""
        if says in self._exact:
            return
        self._exact.add(says)
        sketch, asked = self._sketch(self._empty, completions), self._sketch(self._no_prompt, [prompt])
        numbers = sketch.hashvalues, asked.hashvalues
        others = sorted(self._index.query(sketch))
        for other in others[:_CROWD]:
            if all(_alike(*those) >= SIMILAR for those in zip(numbers, self._first[other], strict=True)):
                self.pairs.append((number, other))
                return
        if len(others) < _CROWD and not self.full:
            self._first[number] = numbers
            self._index.insert(number, sketch)

    @property
    def full(self) -> bool:
        """Whether there are so many rows that later ones are no more compared with each other."""
        return len(self._first) >= _MOST

    def _sketch(self, empty: Any, texts: Sequence[Sequence[str]]) -> Any:
        found = empty.copy()
        found.update_batch(self._phrases(texts).tolist())
        return found

    def _phrases(self, texts: Sequence[Sequence[str]]) -> NDArray[np.uint64]:
        """Return 32 bits for each three words in a row."""
        numbers: list[int] = []
        for text in texts:
            numbers += map(self._words.__getitem__, text)
            numbers.append(0)
        words = np.array(numbers, np.uint64)
        if len(words) < _PHRASE:
            return words
        end = len(words) - _PHRASE + 1
        mixed = words[:end] * _FACTORS[0] + words[1 : end + 1] * _FACTORS[1] + words[2 : end + 2] * _FACTORS[2]
        found: NDArray[np.uint64] = mixed >> np.uint64(32) ^ mixed & np.uint64(0xFFFFFFFF)
        return found


def _alike(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> float:
    """Estimate the share of phrases that two texts have in common, as `MinHash.jaccard` does."""
    return float((one == other).mean())


class _Words(dict[str, int]):
    """32 bits of each word, computed once."""

    def __missing__(self, word: str) -> int:
        number = self[word] = crc32(word.encode("utf-8", "surrogatepass"))
        return number
