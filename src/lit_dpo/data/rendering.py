"""Rows as text: what the chat template makes of a conversation, and that nothing of it is lost there.

This stands behind every format, a user's own too:

- A completion survives whole: text, thoughts, names and arguments of tool calls. A row whose completion does not is
  refused.
- So does the prompt, whatever the role of a message, and the name of every tool; but for thoughts of earlier turns.
  Templates of reasoning models leave these out in generation too, so that leaving them out is what is trained for;
  such rows are counted.
- Blanks around a text, and those between a thought and what follows it, are the template's.
- A message is given as text, or as a typed part to a template that reads nothing else, as those of models that see.
- Arguments of tool calls are given as objects, as templates expect them, and as JSON text to one that puts them into a
  text as they are. Nulls in tools and their calls, which Arrow adds because other rows have such keys, are left out.
- An argument of the template that changes nothing is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_dpo.data.bounds import OutOfBounds
from lit_dpo.data.formats.base import Message, Preference, Ranking
from lit_dpo.data.formats.cells import without_nulls
from lit_dpo.data.sandbox import apply_template
from lit_dpo.data.survival import lost_of_template, surviving, text_of
from lit_dpo.data.templates import unread
from lit_dpo.data.truncation import ALL_TIE, Dropped, used_places
from lit_dpo.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EQUAL_RENDERED = "the completions are equal once rendered by the chat template"
# Remarks: rows are counted by them.
WITHOUT_HEADER = (
    "rendered without the header that generation adds, because the template does not begin their completions with it"
)
WITHOUT_THOUGHTS = "with thoughts in earlier turns, which the chat template leaves out, in generation too"
WITH_UNKNOWN = "with characters that the tokenizer does not know, which are one and the same token"
REPEATS_PROMPT = "in which every completion begins with the whole prompt"
REPEATS_QUESTION = "in which every completion begins with the whole question"

_REWRITES = (
    "the chat template rewrites history: the rendered conversation does not begin with the rendered prompt. "
    "Set `chat_template_kwargs`, or use a template that leaves earlier messages as they are"
)
_GOES_ON = (
    "the chat template writes text after the EOS of a completion, which would be trained on; give one that ends there "
    "with `--data.chat_template FILE`"
)
_KEEPING = "give one that keeps it with `--data.chat_template FILE`"
_PROBE = "What is the answer?"
_LEAST_REPEATED = 16  # characters: answers to "Hi" may well begin with it


class Rendered(NamedTuple):
    """A row as text: its completions, each of which follows the prompt, by what errors call them.

    Attributes:
        prompt: with all that stands before a completion.
        completions: by name.
        is_conversation: whether a chat template rendered it.
        remarks: what rows are counted by.
    """

    prompt: str
    completions: dict[str, str]
    is_conversation: bool
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Renderer:
    """Writes preferences and rankings as text; see the head of this file for the rules.

    Args:
        tokenizer: has the chat template.
        arguments: more arguments for it, in all rows.
    """

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any]

    def __call__(self, row: Preference | Ranking, comparisons: Sequence[tuple[int, int]]) -> Rendered | Dropped:
        """Render a row, of a ranking the completions that are compared.

        Raises:
            DataError: for a conversation if the tokenizer has no chat template.
        """
        if not comparisons:
            return Dropped(ALL_TIE)
        if isinstance(row, Preference):
            completions: dict[str, Any] = {"chosen": row.chosen, "rejected": row.rejected}
        else:
            completions = {f"completions[{place}]": row.completions[place] for place in used_places(comparisons)}
        if isinstance(row.prompt, str):
            if row.template:
                return Dropped(f"{', '.join(row.template)} given with text, which no chat template renders", fatal=True)
            remarks = (REPEATS_PROMPT,) if _repeats(row.prompt, completions.values()) else ()
            return Rendered(row.prompt, completions, is_conversation=False, remarks=remarks)
        found = self._conversation(row.prompt, completions, row.template)
        if isinstance(found, Rendered) and isinstance(row, Preference) and row.chosen != row.rejected:
            chosen, rejected = found.completions.values()
            if chosen == rejected:
                return Dropped(EQUAL_RENDERED)
        return found

    def _conversation(
        self, prompt: list[Message], completions: dict[str, list[Message]], more: Mapping[str, Any]
    ) -> Rendered | Dropped:
        if self.tokenizer.chat_template is None:
            raise DataError(
                "Expected a tokenizer with a chat template, because the data are conversations (lists of messages), "
                f"but `{self.tokenizer.name_or_path}` has none. Use an instruction-tuned model's tokenizer, text, or "
                "`chat_template` with a file that holds one."
            )
        more = {name: without_nulls(value) for name, value in more.items()}
        for name in more:
            if said := unread(self.tokenizer, name, more):
                return Dropped(said, fatal=True)
        failed: list[Dropped] = []
        all_messages = [*prompt, *(message for one in completions.values() for message in one)]
        for form in _forms(all_messages, in_parts=self._reads_parts):
            try:
                found = self._attempt(form(prompt), {name: form(one) for name, one in completions.items()}, more)
            except DataError:  # it would take as long for each row
                raise
            except Exception as error:  # templates raise whatever they like: jinja2 errors, TypeError, KeyError
                found = Dropped(f"the chat template refuses the conversation: {first_line(error)}", fatal=True)
            if isinstance(found, Rendered):
                return found
            failed.append(found)
        return failed[0]

    def _attempt(
        self, prompt: list[Message], completions: dict[str, list[Message]], more: Mapping[str, Any]
    ) -> Rendered | Dropped:
        wholes = [self._apply(prompt + completion, more) for completion in completions.values()]
        # With the header of the completion, as for generation. A template may put things there (an empty thought)
        # that it leaves out of a finished completion; the conversation without the header is then what all share.
        for header in (True, False):
            start = self._apply(prompt, more, header=header)
            if all(whole.startswith(start) and len(whole) > len(start) for whole in wholes):
                break
        else:
            return Dropped(_REWRITES, fatal=True)
        texts = {name: whole[len(start) :] for name, whole in zip(completions, wholes, strict=True)}
        for (name, completion), whole in zip(completions.items(), wholes, strict=True):
            lost = surviving(texts[name], completion).lost
            if lost and header and whole.startswith(before := self._apply(prompt, more)):
                lost = surviving(whole[len(before) :], completion).lost  # it begins with what the header ends in
            if lost:
                return Dropped(f"the chat template loses {lost} in `{name}`; {_KEEPING}", fatal=True)
            if self._goes_on(texts[name], completion[-1]):
                return Dropped(_GOES_ON, fatal=True)
        asked = surviving(start, prompt, earlier=True)
        if lost := asked.lost or lost_of_template(start, {**self.arguments, **more}):
            return Dropped(f"the chat template loses {lost} in the prompt; {_KEEPING}", fatal=True)
        for name in more:
            if name not in ("tools", "documents") and not self._is_heard(name, prompt, completions, more):
                return Dropped(f"the row's `{name}` changes nothing of what the chat template renders", fatal=True)
        remarks = {
            WITHOUT_HEADER: not header,
            WITHOUT_THOUGHTS: asked.without_thoughts,
            REPEATS_QUESTION: _repeats(text_of(prompt[-1]), (text_of(one[0]) for one in completions.values())),
        }
        return Rendered(start, texts, True, tuple(remark for remark, holds in remarks.items() if holds))

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template shows typed parts, and no text that is given as it is."""

        def shows(content: Any) -> bool:
            try:
                return _PROBE in self._apply([{"role": "user", "content": content}], {})
            except DataError:
                raise
            except Exception:  # of whatever kind
                return False

        return not shows(_PROBE) and shows([_part(_PROBE)])

    def _goes_on(self, text: str, last: Message) -> bool:
        """Whether text follows the EOS of the last message, as after a literal newline in a template."""
        end: str | None = self.tokenizer.eos_token
        if not end or end not in text:
            return False
        after = text.rpartition(end)[2].strip()
        return (
            bool(after) and after not in self.tokenizer.get_added_vocab() and surviving(after, [last]).lost is not None
        )

    def _is_heard(
        self, name: str, prompt: list[Message], completions: dict[str, list[Message]], more: Mapping[str, Any]
    ) -> bool:
        """Whether anything changes without an argument, or with its negation: it may say what is so by default."""
        others = ({key: value for key, value in more.items() if key != name}, {**more, name: not more[name]})
        whole = prompt + next(iter(completions.values()))
        return any(self._differs(prompt, more, one, header=True) or self._differs(whole, more, one) for one in others)

    def _differs(
        self, messages: list[Message], more: Mapping[str, Any], other: Mapping[str, Any], header: bool = False
    ) -> bool:
        try:
            return self._apply(messages, more, header) != self._apply(messages, other, header)
        except Exception:  # of whatever kind: a template that stumbles over a value has read it
            return True

    def _apply(self, messages: list[Message], more: Mapping[str, Any], header: bool = False) -> str:
        options = {"tokenize": False, "add_generation_prompt": header, **self.arguments, **more}
        try:
            return str(apply_template(self.tokenizer, messages, **options))
        except OutOfBounds as error:
            raise DataError(
                f"The chat template of `{self.tokenizer.name_or_path}` is not rendered further: {error}. Read it, and "
                "give another one with `--data.chat_template FILE`."
            ) from None


# --- messages as templates expect them -------------------------------------------------------------------------------


def _forms(messages: Sequence[Message], *, in_parts: bool) -> list[Callable[[list[Message]], list[Message]]]:
    """Return ways to write messages with tool calls, the best one first; one way for messages without."""
    if not any(message.get("tool_calls") or message.get("content") is None for message in messages):
        return [_in_parts if in_parts else list]
    pairs = [(arguments, nothing) for nothing in ("", None) for arguments in (_as_object, _as_text)]
    return [partial(_written, arguments=arguments, nothing=nothing, in_parts=in_parts) for arguments, nothing in pairs]


def _written(
    messages: Sequence[Message], *, arguments: Callable[[Any], Any], nothing: str | None, in_parts: bool
) -> list[Message]:
    """Write messages: the arguments of their calls in one form, and nothing as the content of calls alone."""
    found = []
    for message in messages:
        calls = [_call(one, arguments) for one in message.get("tool_calls") or ()]
        content = message.get("content") or (nothing if calls else "")
        found.append({**message, "content": content, **({"tool_calls": calls} if calls else {})})
    return _in_parts(found) if in_parts else found


def _in_parts(messages: Sequence[Message]) -> list[Message]:
    return [{**message, "content": [_part(text_of(message))]} for message in messages]


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _call(call: Any, arguments: Callable[[Any], Any]) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**without_nulls(call), "function": _call(call["function"], arguments)}
    return {**without_nulls(call), "arguments": arguments(call.get("arguments"))}


def _as_object(arguments: Any) -> Any:
    if isinstance(arguments, str):
        try:
            found = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return found if isinstance(found, dict) else arguments
    return {} if arguments is None else without_nulls(arguments)


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(_as_object(arguments), ensure_ascii=False)


def _repeats(prompt: str | None, completions: Iterable[str | None]) -> bool:
    prompt = (prompt or "").strip()
    return len(prompt) >= _LEAST_REPEATED and all((one or "").lstrip().startswith(prompt) for one in completions)
