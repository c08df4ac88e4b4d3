"""Where a text may be cut: its parts, tokenised apart, then give the ids of the whole, whatever follows the text.

Two kinds of places are known. What is not known to be safe is not cut; such a tokenizer reads each text as a whole.

**Before an added token** such as `<|im_start|>`. A tokenizer splits a text at these first, and whatever else it does
it does to each part; what asks whether a part is the first sees the token before the second one. Such a token is
found wherever its text stands if no other token can hold a part of it.

**Before a blank that ends a word**, where a pattern splits the text into words before any of them is tokenised: no
alternative of the pattern then matches a blank but at its start. A pattern is known by its alternatives. In scripts
that have no blanks the same holds for a sign such as `。` after a letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerBase

# Between these two characters. Python's letters and digits and the visible part of ASCII are blanks for nobody.
_BETWEEN_WORDS = r"(?<=[\w!-~])(?= )|(?<=[一-龥ぁ-ゖァ-ヺ가-힣])(?=[。，、！？：；])"

# Alternatives of patterns in use, which match neither side of such a place together with the other one, nor ask there
# what comes next. The first two groups match whatever is no letter, no digit and no blank, and each blank.
_SIGNS = {
    r" ?[^\s\p{L}\p{N}]+",  # GPT-2
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # GPT-4, Llama 3, Qwen 2
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",  # Qwen 3.5
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",  # GPT-4o, Mistral's tekken
    r" ?[\p{P}\p{S}]+[\r\n]*",  # DeepSeek 3
}
_BLANKS = {r"\s+"}
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_OTHERS = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _CONTRACTION, "'(?i:[sdmt]|ll|ve|re)"),
    *(r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"),
    *(
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{upper}{_LOWER}{lower}{end}"
        for upper, lower in ("*+", "+*")
        for end in ("", f"{_CONTRACTION}?")
    ),
    *(r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"),
    *(r" ?\p{N}+", r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r"\p{N}{1,2}", "[0-9]", "[0-9][0-9][0-9]", "[一-龥぀-ゟ゠-ヿ]+"),
    *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)"),
}
_ALTERNATIVE = re.compile(r"(?:\\.|\[(?:\\.|[^\]\\])*\]|\((?:\\.|[^()\\])*\)|[^|\\])+")


def last_cut(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    """Return what finds the last safe place in a text: how many characters are before it; 0 where none is known."""
    found = [re.compile(rf"(?s:.+)(?:{place})") for place in _places(tokenizer)]

    def cut(text: str) -> int:
        matches = (pattern.match(text) for pattern in found)
        return next((match.end() for match in matches if match), 0)

    return cut


def is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text's ids are those of the tokenizer's backend, to which nothing is added in Python."""
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.split_special_tokens:
        return False
    own = (
        name for one in type(tokenizer).__mro__ if not issubclass(PreTrainedTokenizerFast, one) for name in vars(one)
    )
    return not any("encode" in name or name in ("__call__", "tokenize") for name in own)


def _places(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return patterns for the places, those of which a text has more first."""
    if not is_plain(tokenizer):
        return []
    backend: Backend = tokenizer.backend_tokenizer
    added = list(backend.get_added_tokens_decoder().values())
    if any(token.single_word for token in added) or getattr(backend.model, "dropout", None):
        return []  # a word's end depends on what follows; with dropout no two readings are equal
    try:
        normalizer, splitter = _stages(backend)
    except Exception:  # of a part written in Python, which cannot be looked into
        return []
    tokens = _findable(added)
    words = [_BETWEEN_WORDS] if _is_split_into_words(added, normalizer, splitter) else []
    return words + ([_before(tokens)] if tokens else [])


def _before(tokens: Sequence[str]) -> str:
    """Return a pattern for where a token begins; few characters do, and there may be thousands of tokens."""
    first = "".join(map(re.escape, sorted({token[0] for token in tokens})))
    return f"(?=[{first}])(?={'|'.join(map(re.escape, tokens))})"


def _stages(backend: Backend) -> tuple[Any, Any]:
    """Describe the normalizer and the pre-tokenizer; without the vocabulary, which takes most of the time."""
    from tokenizers import Tokenizer, models

    shell = Tokenizer(models.BPE())
    if backend.normalizer is not None:
        shell.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        shell.pre_tokenizer = backend.pre_tokenizer
    state = json.loads(shell.to_str())
    return state["normalizer"], state["pre_tokenizer"]


def _findable(added: Iterable[AddedToken]) -> list[str]:
    """List the added tokens that are found wherever their text stands, and leave alone what is before them."""
    contents = [token.content for token in added]
    together = "\0".join(contents)
    ends = {content[start:] for content in contents for start in range(1, len(content))}
    return [
        token.content
        for token in added
        if not token.normalized  # those are found last, in what the others have left
        and not token.lstrip
        and not token.content[:1].isspace()
        and together.count(token.content) == 1  # in no other one, so that none goes on where it ends
        and not any(token.content[:end] in ends for end in range(1, len(token.content) + 1))  # none begins before it
    ]


def _is_split_into_words(added: Iterable[AddedToken], normalizer: Any, splitter: Any) -> bool:
    if any(token.rstrip or re.search(_BETWEEN_WORDS, token.content) for token in added):
        return False
    if normalizer is not None and normalizer["type"] != "NFC":
        return False
    stages = splitter["pretokenizers"] if splitter and splitter["type"] == "Sequence" else [splitter]
    for number, stage in enumerate(stages):
        splits = _splits(stage)
        if splits:  # the rest sees a word at a time; only this one asks whether it is the first
            return all(later["type"] != "Metaspace" for later in stages[number + 1 :])
        if splits is None:
            return False
    return False


def _splits(stage: Any) -> bool | None:
    """Whether a stage splits at each place between words; None for one that may split elsewhere than in the parts."""
    kind = stage["type"] if stage else None
    if kind == "ByteLevel":
        return None if stage["add_prefix_space"] else bool(stage["use_regex"])
    if kind == "Digits" or (kind == "Punctuation" and stage["behavior"] in ("Isolated", "Contiguous")):
        return False
    kept = kind == "Split" and (stage["behavior"], stage["invert"]) in (("Isolated", False), ("Removed", True))
    if not kept or "Regex" not in stage["pattern"]:
        return None
    alternatives = set(_ALTERNATIVE.findall(stage["pattern"]["Regex"]))
    if not alternatives <= _SIGNS | _BLANKS | _OTHERS:
        return None
    splits = bool(alternatives & _SIGNS and alternatives & _BLANKS)
    return splits if splits or stage["behavior"] == "Isolated" else None
