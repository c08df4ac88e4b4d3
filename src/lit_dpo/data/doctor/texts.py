"""What a text shows by itself: words, script, blanks, phrases, control tokens."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from lit_dpo.data.formats.base import Message

_HAN = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_HAN}]|[^\W{_HAN}]+")
"""A word; of scripts without blanks, a character."""
_NO_LETTERS = re.compile(r"[\W_]+")
_MIXED = 0.2
_REFUSAL = re.compile(
    r"\b(?:i'?m sorry|i am sorry|sorry,|i apologi[sz]e|i can(?:no|')t\b|i(?:'m| am) (?:unable|not able|afraid)"
    r"|i (?:will not|won't|do not want|would rather not)|as an ai\b|i don't feel comfortable)"
    r"|抱歉|对不起|很遗憾|无法(?:回答|提供|完成|满足)|不能(?:回答|提供)|作为一[个名]",
    re.IGNORECASE,
)
_REFUSES_WITHIN = 120  # characters
# of widely used chat templates; whatever the tokenizer has comes to them
_CONTROL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "<s>",
    "</s>",
)


class TextFacts(NamedTuple):
    """Of a completion.

    Attributes:
        key: 64 bits of a hash of the text as it is.
        letters: characters of the text.
        words: how many there are.
        first: the first word, in small letters.
        last: the last character that is no blank.
        blank: where there are blanks around it: `before`, `after`, `both` or nothing.
        script: that most letters are of; empty without letters.
        mixed: whether another script has a fifth of the letters.
        refuses: whether it begins with a phrase of refusal.
        replaced: whether it has U+FFFD.
        control: a control token that it has as text; empty if there is none.
    """

    key: int
    letters: int
    words: int
    first: str
    last: str
    blank: str
    script: str
    mixed: bool
    refuses: bool
    replaced: bool
    control: str


class Reader:
    """Looks at texts with one tokenizer's control tokens in mind.

    Args:
        special_tokens: of the tokenizer, as text.
    """

    def __init__(self, special_tokens: Iterable[str] = ()) -> None:
        names = {*_CONTROL, *(token for token in special_tokens if len(token.strip()) > 2)}
        self._control = re.compile("|".join(map(re.escape, sorted(names, key=lambda one: (-len(one), one)))))

    def control(self, text: str) -> str:
        """Find a control token that stands in a text as text."""
        match = self._control.search(text)
        return match[0] if match else ""

    def facts(self, text: str, words: Sequence[str]) -> TextFacts:
        """Look at a completion.

        Args:
            text: of it.
            words: in it, in small letters.
        """
        script, mixed = scripts(text)
        return TextFacts(
            key=key(text),
            letters=len(text),
            words=len(words),
            first=words[0] if words else "",
            last=text.rstrip()[-1:],
            blank=_blank(text),
            script=script,
            mixed=mixed,
            refuses=_REFUSAL.search(text[:_REFUSES_WITHIN]) is not None,
            replaced="\ufffd" in text,
            control=self.control(text),
        )


def key(said: Any) -> int:
    """Return 64 bits of a hash, equal for what is equal."""
    text = said if isinstance(said, str) else json.dumps(said, sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def written(part: str | Sequence[Message]) -> str:
    """Return what a prompt or a completion says, without its roles."""
    return part if isinstance(part, str) else "\n".join(map(_said, part))


def _said(message: Mapping[str, Any]) -> str:
    parts = [message.get("reasoning_content"), message.get("content")]
    if calls := message.get("tool_calls"):
        parts.append(json.dumps(calls, ensure_ascii=False, default=str))
    return "\n".join(str(part) for part in parts if part)


def words_of(text: str) -> list[str]:
    """Return the words of a text, in small letters.

    Example:
        >>> words_of("Hello, WORLD! 你好")
        ['hello', 'world', '你', '好']
    """
    return WORD.findall(text.lower())


def normalized(text: str) -> str:
    """Return a text without what a second hand changes: case, blanks, punctuation, width of characters.

    A text of nothing else is left as it is.

    Example:
        >>> normalized("What is　２＋２?") == normalized("what is 2+2")
        True
    """
    return _NO_LETTERS.sub("", unicodedata.normalize("NFKC", text).casefold()) or text


def scripts(text: str) -> tuple[str, bool]:
    """Return the script of most letters, and whether a second one has a fifth of them.

    Example:
        >>> scripts("Привет!"), scripts("ok 好的"), scripts("42")
        (('cyrillic', False), ('han', True), ('', False))
    """
    if text.isascii():
        return ("latin" if any(map(str.isalpha, text)) else ""), False
    counts: Counter[str] = Counter()
    for letter, count in Counter(text).items():
        counts[_script(letter)] += count
    counts.pop("", None)
    if not counts:
        return "", False
    first, *others = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    return first[0], bool(others) and others[0][1] >= _MIXED * counts.total()


@cache
def _script(letter: str) -> str:
    if not letter.isalpha():
        return ""
    name = unicodedata.name(letter, "other").split()[0].lower()
    return {"cjk": "han", "hiragana": "han", "katakana": "han", "fullwidth": "latin"}.get(name, name)


def _blank(text: str) -> str:
    before, after = text[:1].isspace(), text[-1:].isspace()
    return {(True, True): "both", (True, False): "before", (False, True): "after"}.get((before, after), "")


def shortened(text: str, most: int = 70) -> str:
    """Return the beginning of a text, in one line.

    Example:
        >>> shortened("one two three", 8)
        'one two…'
    """
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"
