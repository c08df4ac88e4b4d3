"""From preferences to token ids: where the prompt ends, and which tokens end a completion.

**Text.** The prompt's ids are exactly what the tokenizer gives for the prompt, with its BOS: what generation will see,
and what all completions share. A completion's ids are what follows them in the ids of prompt and completion together.
Where the tokenizer merges across the boundary there is no such cut; the completion is then tokenised on its own, after
a newline if that shows to work, because SentencePiece tokenizers put a space before what comes first. Each completion
ends in one EOS.

**Conversations.** The chat template renders the prompt (with the header of the completion, as for generation) and each
whole conversation; no special token is added to what it renders, except an EOS after a completion that ends with none.
What has to survive there, `rendering.py` says.

Two completions that are equal as they are given are kept, and counted; those that rendering, tokenising or a cut makes
equal are left out, by reason: they teach nothing, and an optimizer like Adam makes steps of their rounding noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lit_dpo.data.batch import EncodedPrompt
from lit_dpo.data.comparisons import Comparing
from lit_dpo.data.formats.base import Preference, Ranking
from lit_dpo.data.rendering import WITH_UNKNOWN, Rendered, Renderer
from lit_dpo.data.templates import check_arguments
from lit_dpo.data.tokens import Tokens, tokenizer_content
from lit_dpo.data.truncation import (
    ALL_EQUAL,
    EQUAL_TOKENISED,
    SOME_EQUAL,
    Dropped,
    Fitted,
    Limits,
    Truncation,
    check_limits,
    merged,
    restricted,
    still_apart,
    used_places,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes preferences and rankings in batches; see the head of this file for the rules.

    Policies for a prompt of more than `max_prompt_length` tokens, or of more than `max_length` with a completion:

    - `drop`: leave the completion out, with its comparisons; and the prompt, which is counted, if it is too long or no
      comparison is left. So a pair is left out as soon as one of its completions is too long.
    - `truncate_prompt`: keep the end of the prompt (and its BOS), so that the longest completion fits; leave a
      completion out, as above, if that leaves no token of the prompt.
    - `truncate_completion`: cut the end of the completions, which then have no EOS; drop the prompt if that leaves no
      token of them.
    - `truncate_both`: the end of the prompt to `max_prompt_length`, then the completions to what is left.
    - `error`: stop.

    Whatever the policy, each part of an encoded prompt has at least one token.

    Args:
        tokenizer: a transformers tokenizer. Its padding side and pad token do not matter: nothing is padded.
        max_length: most tokens of a prompt and one completion together. None: no limit.
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

    def __call__(self, rows: Sequence[Preference | Ranking]) -> list[EncodedPrompt | Dropped]:
        """Encode preferences and rankings, one result for each, in order.

        Of a ranking, only completions that are compared are encoded, and those that encode to the same ids are one.

        Raises:
            DataError: if the tokenizer cannot encode any such data: no chat template, no EOS.
        """
        return [one.prompt if isinstance(one, Fitted) else one for one in self.encode(rows)]

    def encode(self, rows: Sequence[Preference | Ranking]) -> list[Fitted | Dropped]:
        """Encode as a call does, and say which of each row's comparisons are left."""
        compared = [Comparing().of(row).comparisons for row in rows]
        rendered = [self._renderer(row, pairs) for row, pairs in zip(rows, compared, strict=True)]
        texts = [item for item in rendered if isinstance(item, Rendered)]
        encoded = iter(self._tokens.encode([(text.prompt, [*text.completions.values()]) for text in texts]))
        found: list[Fitted | Dropped] = []
        for row, pairs, item in zip(rows, compared, rendered, strict=True):
            if isinstance(item, Rendered):
                parts = self._checked(item, *next(encoded))
                one = parts if isinstance(parts, Dropped) else self._fitted(row, pairs, *parts)
                found.append(one if isinstance(one, Dropped) else one.remarked(*item.remarks, *self._unknown(one)))
            else:
                found.append(item)
        return found

    def fit(self, one: EncodedPrompt) -> Fitted | Dropped:
        """Apply the policy for what is too long."""
        return self._limits.fit(one)

    def fit_apart(self, one: EncodedPrompt) -> Fitted | Dropped:
        """Apply it, and leave out comparisons of completions that differ only beyond the cut."""
        fitted = self.fit(one)
        return fitted if isinstance(fitted, Dropped) else still_apart(one, fitted)

    @cached_property
    def _limits(self) -> Limits:
        return Limits(self.max_length, self.max_prompt_length, self.truncation, self._tokens.bos)

    def check_template(self) -> None:
        """See that the chat template reads `chat_template_kwargs`, before there is a row.

        Raises:
            DataError: if it does not.
        """
        check_arguments(self.tokenizer, self.chat_template_kwargs)

    @cached_property
    def _renderer(self) -> Renderer:
        self.check_template()
        return Renderer(self.tokenizer, self.chat_template_kwargs)

    @cached_property
    def _tokens(self) -> Tokens:
        return Tokens(self.tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of all that decides the ids, besides this code: equal ones encode a preference alike."""
        parts = [
            tokenizer_content(self.tokenizer),
            [self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.chat_template],
            [self.max_length, self.max_prompt_length, self.truncation, dict(self.chat_template_kwargs)],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    # --- tokens ----------------------------------------------------------------------------------------------------

    def _checked(
        self, text: Rendered, prompt: list[int], after: list[list[int]]
    ) -> tuple[list[int], list[list[int]]] | Dropped:
        """Return the ids of the prompt and of each completion, with BOS and EOS."""
        completions = []
        for (name, completion_text), completion in zip(text.completions.items(), after, strict=True):
            if not completion:
                return Dropped(f"`{name}` encodes to no token", fatal=True)
            completions.append(self._tokens.terminated(completion, completion_text, text.is_conversation))
        start = self._tokens.start(prompt, text.is_conversation)
        if not start:
            return Dropped("the prompt encodes to no token, and the tokenizer has no BOS to stand for it", fatal=True)
        return start, completions

    def _unknown(self, one: Fitted) -> list[str]:
        """Say so if a part holds the token for what a tokenizer does not know."""
        parts = () if self._unk is None else (one.prompt.prompt, *one.prompt.completions)
        return [WITH_UNKNOWN] if any(self._unk in ids for ids in parts) else []

    @cached_property
    def _unk(self) -> int | None:
        """None where that token has another meaning, as GPT-2's, or never comes, as in bytes."""
        found: int | None = self.tokenizer.unk_token_id
        others = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        return None if found in others else found

    def _fitted(
        self,
        row: Preference | Ranking,
        comparisons: Sequence[tuple[int, int]],
        prompt: list[int],
        completions: list[list[int]],
    ) -> Fitted | Dropped:
        if isinstance(row, Preference):
            if completions[0] == completions[1] and row.chosen != row.rejected:  # equal as given they are kept
                return Dropped(EQUAL_TOKENISED)
            return self.fit_apart(EncodedPrompt(prompt, completions))
        place = {used: number for number, used in enumerate(used_places(comparisons))}
        renumbered = [(place[chosen], place[rejected]) for chosen, rejected in comparisons]
        one = merged(EncodedPrompt(prompt, completions, renumbered))
        differ = [number for number, (chosen, rejected) in enumerate(one.comparisons) if chosen != rejected]
        if not differ:
            return Dropped(ALL_EQUAL)
        fitted = self.fit_apart(restricted(one, differ))
        if isinstance(fitted, Dropped):
            return fitted
        fitted = fitted._replace(kept=[differ[number] for number in fitted.kept])
        return fitted.remarked(SOME_EQUAL) if len(differ) < len(comparisons) else fitted
