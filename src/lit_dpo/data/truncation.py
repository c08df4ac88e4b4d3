"""What happens to prompts and completions that are too long, and to completions that nothing is compared with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple, TypeAlias

from lit_dpo.data.batch import EncodedPrompt

Truncation: TypeAlias = Literal["drop", "truncate_prompt", "truncate_completion", "truncate_both", "error"]

ALL_TIE = "all completions tie"
ALL_EQUAL = "all completions that are compared are equal"
EQUAL_TOKENISED = "the completions are equal once tokenised"
EQUAL_CUT = "the completions are equal once cut to the limits"
SOME_EQUAL = "of which comparisons between equal completions are left out"


class Dropped(NamedTuple):
    """A row that cannot be trained on.

    Attributes:
        reason: why, in words.
        fatal: whether the row is bad (by itself, or by `truncation="error"`): that is reported with file and row, and
            is an error unless bad rows are dropped; otherwise the row is left out and counted.
    """

    reason: str
    fatal: bool = False


class Fitted(NamedTuple):
    """What is left of a prompt with its completions.

    Attributes:
        prompt: within the limits; each completion is compared with one.
        kept: which of the comparisons are left, by their places before, ascending.
        lost: completions that were left out because they are too long.
        remarks: what else is said of it, in words without its own; examples are counted by them.
    """

    prompt: EncodedPrompt
    kept: Sequence[int]
    lost: int = 0
    remarks: tuple[str, ...] = ()

    def remarked(self, *remarks: str) -> Fitted:
        """Return it with more remarks."""
        return self._replace(remarks=tuple(dict.fromkeys((*self.remarks, *remarks)))) if remarks else self


class Limits(NamedTuple):
    """The most tokens of a prompt with one completion, and of a prompt; and what happens to longer ones.

    The prompt is cut once, for the longest completion. A completion for which there is no room is left out with its
    comparisons, and the prompt when no comparison is left.
    """

    max_length: int | None
    max_prompt_length: int | None
    truncation: Truncation
    bos: int | None

    def fit(self, one: EncodedPrompt) -> Fitted | Dropped:
        """Cut, leave out or drop what is too long."""
        too_long = self._too_long(one)
        if too_long is None:
            return Fitted(one, range(len(one.comparisons)))
        if self.truncation == "error":
            return Dropped(too_long, fatal=True)
        prompt, prompt_limit = len(one.prompt), self.max_prompt_length or len(one.prompt)
        limit = self.max_length or prompt_limit + _longest(one)
        if self.truncation == "drop":
            room = limit - prompt if prompt <= prompt_limit else 0
            return _without_longer(one, room) or Dropped(too_long)
        if self.truncation == "truncate_prompt":
            fitted = _without_longer(one, limit - 1)
            if fitted is None:
                return Dropped(f"a completion leaves no room for the prompt: {too_long}")
            one = fitted.prompt
            length = min(prompt_limit, limit - _longest(one))
            return fitted._replace(prompt=one._replace(prompt=self._keep_end(one.prompt, length)))
        if self.truncation == "truncate_both":
            one = one._replace(prompt=self._keep_end(one.prompt, prompt_limit))
        elif prompt > min(prompt_limit, limit - 1):
            return Dropped(f"the prompt leaves no room for a completion: {too_long}")
        room = limit - len(one.prompt)
        cut = one._replace(completions=[ids[:room] for ids in one.completions])
        return Fitted(cut if is_pair(cut) else merged(cut), range(len(one.comparisons)))

    def _too_long(self, one: EncodedPrompt) -> str | None:
        length, prompt = len(one.prompt) + _longest(one), len(one.prompt)
        if self.max_length is not None and length > self.max_length:
            return f"longer than max_length={self.max_length}" + self._figures(length, prompt)
        if self.max_prompt_length is not None and prompt > self.max_prompt_length:
            return f"longer than max_prompt_length={self.max_prompt_length}" + self._figures(length, prompt)
        return None

    def _figures(self, length: int, prompt: int) -> str:
        """Say the lengths of the one row that an error is about; dropped rows are counted by reason, without them."""
        return f" ({length} tokens, {prompt} of them the prompt)" if self.truncation == "error" else ""

    def _keep_end(self, prompt: list[int], length: int) -> list[int]:
        if len(prompt) <= length:
            return prompt
        # After BOS models behave as trained; one token alone should rather be the one the completion follows.
        if length > 1 and prompt[0] == self.bos:
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


def is_pair(one: EncodedPrompt) -> bool:
    """Whether two completions are compared once."""
    return len(one.completions) == 2 and len(one.comparisons) == 1


def merged(one: EncodedPrompt) -> EncodedPrompt:
    """Let equal completions be one; comparisons between them become those of a completion with itself.

    Example:
        >>> merged(EncodedPrompt([1], [[2], [3], [2]], [(0, 1), (2, 1), (0, 2)]))
        EncodedPrompt(prompt=[1], completions=[[2], [3]], comparisons=[(0, 1), (0, 1), (0, 0)])
    """
    first: dict[tuple[int, ...], int] = {}
    places = [first.setdefault(tuple(ids), len(first)) for ids in one.completions]
    comparisons = [(places[chosen], places[rejected]) for chosen, rejected in one.comparisons]
    return EncodedPrompt(one.prompt, [list(ids) for ids in first], comparisons)


def restricted(one: EncodedPrompt, kept: Collection[int]) -> EncodedPrompt:
    """Keep some of the comparisons, and of the completions those that they are between.

    Args:
        one: a prompt.
        kept: places of the comparisons, ascending.
    """
    comparisons = [one.comparisons[number] for number in kept]
    used = used_places(comparisons)
    new = {place: number for number, place in enumerate(used)}
    renumbered = [(new[chosen], new[rejected]) for chosen, rejected in comparisons]
    return EncodedPrompt(one.prompt, [one.completions[place] for place in used], renumbered)


def still_apart(before: EncodedPrompt, fitted: Fitted) -> Fitted | Dropped:
    """Leave out comparisons of completions that were cut to the same.

    Args:
        before: the prompt.
        fitted: what the limits left of it.
    """

    def differ(one: EncodedPrompt, number: int) -> bool:
        chosen, rejected = one.comparisons[number]
        return one.completions[chosen] != one.completions[rejected]

    one = fitted.prompt
    if one is before:
        return fitted
    apart = [place for place, number in enumerate(fitted.kept) if differ(one, place) or not differ(before, number)]
    if len(apart) == len(fitted.kept):
        return fitted
    if not apart:
        return Dropped(EQUAL_CUT)
    kept = [fitted.kept[place] for place in apart]
    return fitted._replace(prompt=restricted(one, apart), kept=kept).remarked(SOME_EQUAL)


def used_places(comparisons: Sequence[tuple[int, int]]) -> list[int]:
    """Places of the completions that are compared, ascending."""
    return sorted({place for pair in comparisons for place in pair})


def _without_longer(one: EncodedPrompt, room: int) -> Fitted | None:
    """Leave out completions of more than `room` tokens; None if that leaves no comparison."""
    short = [len(ids) <= room for ids in one.completions]
    kept = [number for number, pair in enumerate(one.comparisons) if all(short[place] for place in pair)]
    if not kept:
        return None
    if len(kept) == len(one.comparisons):
        return Fitted(one, kept)
    return Fitted(restricted(one, kept), kept, short.count(False))


def _longest(one: EncodedPrompt) -> int:
    return max(map(len, one.completions))
