"""From preferences to token ids: where the prompt ends, which tokens end a completion, what happens to long pairs.

**Text.** The prompt's ids are exactly what the tokenizer gives for the prompt, with its BOS: what generation will see,
and what both sides share. A completion's ids are what follows them in the ids of prompt and completion together. Where
the tokenizer merges across the boundary there is no such cut; the completion is then tokenised on its own, after a
newline if that shows to work, because SentencePiece tokenizers put a space before what comes first. Both completions
end in one EOS.

**Conversations.** The chat template renders the prompt (with the header of the completion, as for generation) and both
whole conversations; no special token is added to what it renders, except an EOS after a completion that ends with none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from lit_dpo.data.batch import EncodedPair
from lit_dpo.data.digests import code_digest, content_digest
from lit_dpo.data.formats.base import Message, Preference
from lit_dpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation: TypeAlias = Literal["drop", "truncate_prompt", "truncate_completion", "truncate_both", "error"]

_ANCHOR = "\n"


class Dropped(NamedTuple):
    """A pair that cannot be trained on.

    Attributes:
        reason: why, in words.
        fatal: whether it is an error (of the row, or by `truncation="error"`), which the caller raises with file and
            row; otherwise the pair is left out and counted.
    """

    reason: str
    fatal: bool = False


class _Rendered(NamedTuple):
    """A preference as text: both completions follow the prompt."""

    prompt: str
    chosen: str
    rejected: str
    is_conversation: bool


@dataclass(frozen=True)
class PairEncoder:
    """Encodes preferences in batches; see the head of this file for the rules.

    Policies for a pair with a side of more than `max_length` tokens, or a prompt of more than `max_prompt_length`:

    - `drop`: leave the pair out, and count it.
    - `truncate_prompt`: keep the end of the prompt (and its BOS), so that the longer completion fits; drop the pair if
      that leaves no token of the prompt.
    - `truncate_completion`: cut the end of the completions, which then have no EOS; drop the pair if that leaves no
      token of them.
    - `truncate_both`: the end of the prompt to `max_prompt_length`, then the completions to what is left.
    - `error`: stop.

    Whatever the policy, each part of an encoded pair has at least one token.

    Args:
        tokenizer: a transformers tokenizer. Its padding side and pad token do not matter: nothing is padded.
        max_length: most tokens per side, prompt and completion together. None: no limit.
        max_prompt_length: most tokens of the prompt. None: no limit of its own.
        truncation: the policy.
        chat_template_kwargs: more arguments for the chat template, such as `{"enable_thinking": False}`.

    Raises:
        ValueError: for limits that leave no room, or for `truncate_both` without `max_prompt_length`.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = 1024
    max_prompt_length: int | None = None
    truncation: Truncation = "drop"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the limits."""
        check_limits(self.max_length, self.max_prompt_length, self.truncation)

    def __call__(self, preferences: Sequence[Preference]) -> list[EncodedPair | Dropped]:
        """Encode preferences, one result for each, in order.

        Raises:
            DataError: if the tokenizer cannot encode any such data: no chat template, no EOS.
        """
        rendered = [self._render(preference) for preference in preferences]
        texts = [item for item in rendered if isinstance(item, _Rendered)]
        prompts = self._tokenize([text.prompt for text in texts])
        chosen = self._tokenize([text.prompt + text.chosen for text in texts])
        rejected = self._tokenize([text.prompt + text.rejected for text in texts])
        encoded = map(self._pair, texts, prompts, chosen, rejected)
        return [next(encoded) if isinstance(item, _Rendered) else item for item in rendered]

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of all that decides the ids, besides this code: equal ones encode a preference alike."""
        parts = [
            _tokenizer_content(self.tokenizer),
            [self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.chat_template],
            [self.max_length, self.max_prompt_length, self.truncation, dict(self.chat_template_kwargs)],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    # --- text ------------------------------------------------------------------------------------------------------

    def _render(self, preference: Preference) -> _Rendered | Dropped:
        prompt, chosen, rejected = preference[:3]
        if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
            return _Rendered(prompt, chosen, rejected, is_conversation=False)
        return self._render_conversation(prompt, chosen, rejected)  # type: ignore[arg-type]

    def _render_conversation(
        self, prompt: list[Message], chosen: list[Message], rejected: list[Message]
    ) -> _Rendered | Dropped:
        if self.tokenizer.chat_template is None:
            raise DataError(
                "Expected a tokenizer with a chat template, because the data are conversations (lists of messages), "
                f"but `{self.tokenizer.name_or_path}` has none. Use an instruction-tuned model's tokenizer, or text."
            )
        try:
            sides = self._apply_template(prompt + chosen), self._apply_template(prompt + rejected)
            # With the header of the completion, as for generation. A template may put things there (an empty thought)
            # that it leaves out of a finished completion; the conversation without the header is then what both share.
            for header in (True, False):
                start = self._apply_template(prompt, header=header)
                if all(side.startswith(start) and len(side) > len(start) for side in sides):
                    chosen_text, rejected_text = (side[len(start) :] for side in sides)
                    return _Rendered(start, chosen_text, rejected_text, is_conversation=True)
        except Exception as error:  # templates raise whatever they like: jinja2 errors, TypeError, KeyError
            return Dropped(f"the chat template refuses the conversation: {error}", fatal=True)
        return Dropped(
            "the chat template rewrites history: the rendered conversation does not begin with the rendered prompt. "
            "Set `chat_template_kwargs`, or use a template that leaves earlier messages as they are",
            fatal=True,
        )

    def _apply_template(self, messages: list[Message], header: bool = False) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=header, **self.chat_template_kwargs
            )
        )

    # --- tokens ----------------------------------------------------------------------------------------------------

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
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

    def _pair(self, text: _Rendered, prompt: list[int], *sides: list[int]) -> EncodedPair | Dropped:
        completions = []
        for name, completion_text, whole in zip(
            ("chosen", "rejected"), (text.chosen, text.rejected), sides, strict=True
        ):
            completion = self._completion(prompt, completion_text, whole)
            if not completion:
                return Dropped(f"`{name}` encodes to no token: {completion_text[:60]!r}", fatal=True)
            completions.append(self._terminated(completion, completion_text, text.is_conversation))
        start = self._start(prompt, text.is_conversation)
        if not start:
            return Dropped("the prompt encodes to no token, and the tokenizer has no BOS to stand for it", fatal=True)
        return self._fit(EncodedPair(start, *completions))

    def _start(self, prompt: list[int], is_conversation: bool) -> list[int]:
        """Return the prompt with the tokenizer's BOS, once; templates write theirs themselves."""
        prefix = [] if is_conversation or prompt[: len(self._prefix)] == self._prefix else self._prefix
        return [*prefix, *prompt] or ([] if self._bos is None else [self._bos])

    def _completion(self, prompt: list[int], completion: str, whole: list[int]) -> list[int]:
        """Ids of the completion after the ids of the prompt, given those of both together."""
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        anchor, anchored, apart = self._tokenize([_ANCHOR, _ANCHOR + completion, completion])
        same_start = anchored[: len(anchor)] == anchor
        if same_start and self._decode(anchored) == self._decode(anchor) + completion:
            return anchored[len(anchor) :]
        return apart

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _terminated(self, completion: list[int], text: str, is_conversation: bool) -> list[int]:
        if is_conversation and text.rstrip().endswith(self._special_tokens):
            return completion
        if self._eos is None:
            raise DataError(
                f"Expected a tokenizer with an EOS token but `{self.tokenizer.name_or_path}` has none: the model would "
                "never learn where a completion ends. Set `eos_token` in its `tokenizer_config.json`."
            )
        return completion if completion[-1] == self._eos else [*completion, self._eos]

    @cached_property
    def _bos(self) -> int | None:
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

    # --- limits ----------------------------------------------------------------------------------------------------

    def _fit(self, pair: EncodedPair) -> EncodedPair | Dropped:
        prompt_limit = self.max_prompt_length or len(pair.prompt)
        limit = self.max_length or prompt_limit + _longest(pair)
        too_long = self._too_long(pair)
        if too_long is None or self.truncation in ("drop", "error"):
            return pair if too_long is None else Dropped(too_long, fatal=self.truncation == "error")
        if self.truncation == "truncate_completion":
            if len(pair.prompt) > min(prompt_limit, limit - 1):
                return Dropped(f"the prompt leaves no room for a completion: {too_long}")
            return _cut_completions(pair, limit - len(pair.prompt))
        if self.truncation == "truncate_both":
            pair = pair._replace(prompt=self._keep_end(pair.prompt, prompt_limit))
            return _cut_completions(pair, limit - len(pair.prompt))
        room = limit - _longest(pair)
        if room < 1:
            return Dropped(f"a completion leaves no room for the prompt: {too_long}")
        return pair._replace(prompt=self._keep_end(pair.prompt, min(prompt_limit, room)))

    def _too_long(self, pair: EncodedPair) -> str | None:
        length, prompt = len(pair.prompt) + _longest(pair), len(pair.prompt)
        if self.max_length is not None and length > self.max_length:
            return f"longer than max_length={self.max_length}" + self._figures(length, prompt)
        if self.max_prompt_length is not None and prompt > self.max_prompt_length:
            return f"longer than max_prompt_length={self.max_prompt_length}" + self._figures(length, prompt)
        return None

    def _figures(self, length: int, prompt: int) -> str:
        """Say the lengths of the one pair that an error is about; dropped pairs are counted by reason, without them."""
        return f" ({length} tokens, {prompt} of them the prompt)" if self.truncation == "error" else ""

    def _keep_end(self, prompt: list[int], length: int) -> list[int]:
        if len(prompt) <= length:
            return prompt
        # After BOS models behave as trained; one token alone should rather be the one the completion follows.
        if length > 1 and prompt[0] == self._bos:
            return [prompt[0], *prompt[len(prompt) - length + 1 :]]
        return prompt[len(prompt) - length :]


def check_limits(max_length: int | None, max_prompt_length: int | None, truncation: str) -> None:
    """See that the limits leave room and go together.

    Raises:
        ValueError: if they do not.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"Expected `max_length` >= 2 (a prompt and a completion) but got {max_length}.")
    if max_prompt_length is None:
        if truncation == "truncate_both":
            raise ValueError('Expected `max_prompt_length` with `truncation="truncate_both"` but got None.')
    elif not 1 <= max_prompt_length < (max_length or float("inf")):
        raise ValueError(f"Expected `max_prompt_length` in [1, max_length={max_length}) but got {max_prompt_length}.")


def _longest(pair: EncodedPair) -> int:
    return max(len(pair.chosen), len(pair.rejected))


def _cut_completions(pair: EncodedPair, room: int) -> EncodedPair:
    return pair._replace(chosen=pair.chosen[:room], rejected=pair.rejected[:room])


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> Any:
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
