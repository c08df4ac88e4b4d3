"""From text to token ids, with what a tokenizer puts before a text and after it; see `encode.py` for the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_dpo.data.cuts import is_plain, last_cut
from lit_dpo.data.digests import code_digest, content_digest
from lit_dpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHOR = "\n"


@dataclass(frozen=True)
class Tokens:
    """What a tokenizer makes of texts.

    Args:
        tokenizer: a transformers tokenizer.
        with_cuts: False tokenizes every text as a whole, which gives the same ids and takes longer: the referee.
    """

    tokenizer: PreTrainedTokenizerBase
    with_cuts: bool = True

    @cached_property
    def _prefix(self) -> list[int]:
        """What the tokenizer puts before a text, usually BOS or nothing. What it puts after a text is never used."""
        probe = self.tokenizer("a", return_special_tokens_mask=True)
        ids, mask = probe["input_ids"], probe["special_tokens_mask"]
        length = mask.index(0) if 0 in mask else 0
        return list(ids[:length])

    def start(self, prompt: list[int], is_conversation: bool) -> list[int]:
        """Return the prompt with the tokenizer's BOS, once; templates write theirs themselves."""
        prefix = [] if is_conversation or prompt[: len(self._prefix)] == self._prefix else self._prefix
        return [*prefix, *prompt] or ([] if self.bos is None else [self.bos])

    def encode(self, texts: Sequence[tuple[str, Sequence[str]]]) -> list[tuple[list[int], list[list[int]]]]:
        """Return the ids of each prompt, and those of each of its completions after them.

        What several texts begin with, or hold, is tokenised once: of a prompt, all before its last safe cut.

        Args:
            texts: each a prompt with its completions.
        """
        cuts = [self._cut(prompt) if self.with_cuts else 0 for prompt, _ in texts]
        parts = [(prompt[:cut], prompt[cut:], those) for cut, (prompt, those) in zip(cuts, texts, strict=True)]
        pairs = [(tail, one) for _, tail, those in parts for one in those]
        heads = [head for head, _, _ in parts if head]
        ids = self._ids([*heads, *(tail for _, tail, _ in parts), *map("".join, pairs)])
        after = iter(self._after(pairs, ids))
        return [
            (ids[head] + ids[tail] if head else ids[tail], [next(after) for _ in those]) for head, tail, those in parts
        ]

    def _after(self, pairs: Sequence[tuple[str, str]], ids: Mapping[str, list[int]]) -> list[list[int]]:
        """Return the ids of each pair's second text after those of the first, given those of both together."""
        found = [_beyond(ids[start], ids[start + text]) for start, text in pairs]
        merged = [text for one, (_, text) in zip(found, pairs, strict=True) if one is None]
        apart = dict(zip(merged, self._apart(merged), strict=True))
        return [apart[text] if one is None else one for one, (_, text) in zip(found, pairs, strict=True)]

    def _apart(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Give the ids of texts on their own, without a space that the tokenizer would put before them."""
        ids = self._ids([_ANCHOR, *texts, *(_ANCHOR + text for text in texts)]) if texts else {}
        for text in texts:
            anchored = ids[_ANCHOR + text]
            beyond = _beyond(ids[_ANCHOR], anchored)
            same = beyond is not None and self._decode(anchored) == self._decode(ids[_ANCHOR]) + text
            yield beyond if beyond is not None and same else ids[text]

    def _ids(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Tokenize each text once, without the special tokens that the tokenizer would put around it."""
        different = list(dict.fromkeys(texts))
        if not different:
            return {}
        if self._is_plain:  # what transformers does too, but for offsets, which nobody reads
            backend = self.tokenizer.backend_tokenizer
            backend.no_padding()
            backend.no_truncation()
            backend.encode_special_tokens = False
            found = [one.ids for one in backend.encode_batch_fast(different, add_special_tokens=False)]
        else:
            options = {"verbose": False, "return_attention_mask": False, "return_token_type_ids": False}
            found = self.tokenizer(different, add_special_tokens=False, **options)["input_ids"]
        return dict(zip(different, found, strict=True))

    @cached_property
    def _is_plain(self) -> bool:
        return self.with_cuts and is_plain(self.tokenizer)

    @cached_property
    def _cut(self) -> Callable[[str], int]:
        return last_cut(self.tokenizer)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def terminated(self, completion: list[int], text: str, is_conversation: bool) -> list[int]:
        """Return the completion with an EOS, once; none follows a special token that a template ends in.

        Raises:
            DataError: if the tokenizer has no EOS.
        """
        if is_conversation and text.rstrip().endswith(self._special_tokens):
            return completion
        if self._eos is None:
            raise DataError(
                f"Expected a tokenizer with an EOS token but `{self.tokenizer.name_or_path}` has none: the model would "
                "never learn where a completion ends. Set `eos_token` in its `tokenizer_config.json`."
            )
        return completion if completion[-1] == self._eos else [*completion, self._eos]

    @cached_property
    def bos(self) -> int | None:
        """Kept, as the EOS is, because a tokenizer looks it up anew each time: a tenth of the time of encoding."""
        found: int | None = self.tokenizer.bos_token_id
        return found

    @cached_property
    def _eos(self) -> int | None:
        found: int | None = self.tokenizer.eos_token_id
        return found

    @cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return tuple({*added, *self.tokenizer.all_special_tokens})


def _beyond(start: list[int], whole: list[int]) -> list[int] | None:
    """Return what follows the start of a list, None for one that begins otherwise."""
    return whole[len(start) :] if whole[: len(start)] == start else None


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All of the tokenizer but its padding and truncation, which calls switch on and off."""
    code = code_digest(type(tokenizer))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: merges and scores are in its files
        named = (getattr(tokenizer, name, None) for name in tokenizer.vocab_files_names)
        files = [Path(file) for file in named if isinstance(file, str) and Path(file).is_file()]
        return [code, content_digest(files), sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs]
    padding, truncation = backend.padding, backend.truncation
    backend.no_padding()
    backend.no_truncation()
    try:
        return [code, backend.to_str()]
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)
