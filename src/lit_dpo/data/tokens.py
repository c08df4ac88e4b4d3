"""From text to token ids, with what a tokenizer puts before a text and after it; see `encode.py` for the rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """

    tokenizer: PreTrainedTokenizerBase

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Ids without the special tokens that the tokenizer would put around a text."""
        if not texts:
            return []
        encoded = self.tokenizer(
            texts, add_special_tokens=False, verbose=False, return_attention_mask=False, return_token_type_ids=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

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

        Args:
            texts: each a prompt with its completions.
        """
        prompts = self.ids([prompt for prompt, _ in texts])
        wholes = iter(self.ids([prompt + one for prompt, completions in texts for one in completions]))
        return [
            (prompt, [self._completion(prompt, one, next(wholes)) for one in completions])
            for prompt, (_, completions) in zip(prompts, texts, strict=True)
        ]

    def _completion(self, prompt: list[int], completion: str, whole: list[int]) -> list[int]:
        """Ids of the completion after the ids of the prompt, given those of both together."""
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        anchor, anchored, apart = self.ids([_ANCHOR, _ANCHOR + completion, completion])
        same_start = anchored[: len(anchor)] == anchor
        if same_start and self._decode(anchored) == self._decode(anchor) + completion:
            return anchored[len(anchor) :]
        return apart

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
