"""What a text shows by itself: words, script, blanks, phrases, control tokens."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from lit_dpo.data.formats.base import Message

_HAN = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_HAN}]|[^\W{_HAN}]+")
"""A word; of scripts without blanks, a character."""
_NO_LETTERS = re.compile(r"[\W_]+")
_LETTERS = "".join(chr(n).lower() if chr(n).isalnum() or n == 95 else " " for n in range(128))
_FIFTH = 0.2
_REFUSAL = (
    "i'm sorry",
    "i am sorry",
    "sorry,",
    "i apologize",
    "i apologise",
    "i cannot",
    "i can't",
    "i can not",
    "i am unable",
    "i'm unable",
    "i am not able",
    "i'm not able",
    "i'm afraid",
    "i am afraid",
    "i won't",
    "i will not",
    "i do not want",
    "i would rather not",
    "as an ai",
    "i don't feel comfortable",
    "抱歉",
    "对不起",
    "很遗憾",
    "无法回答",
    "无法提供",
    "不能回答",
    "不能提供",
    "作为一个",
    "作为一名",
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
        foreign: a script with a fifth of the letters that the prompt has none of; empty if there is none.
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
    foreign: str
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
        self._first = {name[0] for name in names}
        self._control = re.compile("|".join(map(re.escape, sorted(names, key=lambda one: (-len(one), one)))))

    def control(self, text: str) -> str:
        """Find a control token that stands in a text as text."""
        if not any(letter in text for letter in self._first):  # as most texts
            return ""
        match = self._control.search(text)
        return match[0] if match else ""

    def facts(self, text: str, words: Sequence[str], asked: Collection[str]) -> TextFacts:
        """Look at a completion.

        Args:
            text: of it.
            words: in it, in small letters.
            asked: scripts of its prompt.
        """
        shares = scripts(text)
        foreign = [name for name, share in shares.items() if share >= _FIFTH and asked and name not in asked]
        return TextFacts(
            key=key(text),
            letters=len(text),
            words=len(words),
            first=words[0] if words else "",
            last=text.rstrip()[-1:],
            blank=_blank(text),
            script=next(iter(shares), ""),
            foreign=foreign[0] if foreign else "",
            refuses=_refuses(text),
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
    if text.isascii():  # three times as fast
        return text.translate(_LETTERS).split()
    return WORD.findall(text.lower())


def normalized(text: str) -> str:
    """Return a text without what a second hand changes: case, blanks, punctuation, width of characters.

    A text of nothing else is left as it is.

    Example:
        >>> normalized("What is　２＋２?") == normalized("what is 2+2")
        True
    """
    return _NO_LETTERS.sub("", unicodedata.normalize("NFKC", text).casefold()) or text


def scripts(text: str) -> dict[str, float]:
    """Return the scripts of a text, each with its share of the letters, the largest first.

    Example:
        >>> scripts("Привет!"), scripts("ok 好的"), scripts("42")
        ({'cyrillic': 1.0}, {'han': 0.5, 'latin': 0.5}, {})
    """
    if text.isascii():
        return {"latin": 1.0} if any(map(str.isalpha, text)) else {}
    counts: Counter[str] = Counter()
    for letter, count in Counter(text).items():
        counts[_script(letter)] += count
    counts.pop("", None)
    total = counts.total()
    return {name: count / total for name, count in sorted(counts.items(), key=lambda one: (-one[1], one[0]))}


@cache
def _script(letter: str) -> str:
    if not letter.isalpha():
        return ""
    name = re.split(r"[ -]", unicodedata.name(letter, "other"))[0].lower()
    return {"cjk": "han", "hiragana": "han", "katakana": "han", "fullwidth": "latin"}.get(name, name)


def _refuses(text: str) -> bool:
    beginning = text[:_REFUSES_WITHIN].lower().replace("’", "'")
    return any(phrase in beginning for phrase in _REFUSAL)


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
