"""The ids of texts that are cut are those of texts that are not, for tokenizers of every kind."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_dpo.data.cuts import last_cut
from lit_dpo.data.tokens import Tokens
from toy_tokenizers import TEXT, byte_level, sentencepiece_like

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LETTERS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
GPT4O = (
    rf"{LETTERS}*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|{LETTERS}+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = "the cat's don't WE'LL 12 3456 7 naïve e\u0301te\u0301 Σίσυφος привет 世界 你好，世界。 はい、ガ 한국어 🦆 👩‍👩‍👧 ﬁ ² _x_ <b> a/b\n/ #! […]"
GAPS = [" ", " ", " ", "", "  ", "   ", "\n", "\n\n", " \n", "\t", "\u00a0", "\u3000", "\u200d", "\u0301", "'", ".", "\r\n", "\x1c"]
MARKS = ["<|user|>", "<|end|>", "<<", "<<<", "<|end", "<s>", "mask", "<mask>", "<a b>", "</s>"]


def split(*patterns: str, behavior: str = "isolated", invert: bool = False, level: bool = True) -> Any:
    stages = [pre_tokenizers.Split(Regex(pattern), behavior, invert) for pattern in patterns]
    more = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)] if level else []
    return pre_tokenizers.Sequence([*stages, *more])


def made(
    pre_tokenizer: Any = None,
    normalizer: Any = None,
    added: list[AddedToken | str] | None = None,
    model: str = "BPE",
    alphabet: bool = True,
    **options: Any,
) -> PreTrainedTokenizerFast:
    """A tokenizer trained on all the texts that are drawn here."""
    tokenizer = Tokenizer(getattr(models, model)(**({} if model == "Unigram" else {"unk_token": "<unk>"})))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer  # type: ignore[assignment]
    initial = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    special = {"special_tokens": ["<unk>", "<eos>"], "show_progress": False, "initial_alphabet": initial}
    kind = {"BPE": "BpeTrainer", "WordPiece": "WordPieceTrainer", "Unigram": "UnigramTrainer"}[model]
    more = {"unk_token": "<unk>"} if model == "Unigram" else {}
    trainer = getattr(trainers, kind)(vocab_size=600, **special, **more)
    tokenizer.train_from_iterator([*TEXT * 4, WORDS, *(WORDS + gap + WORDS for gap in GAPS)], trainer)
    tokenizer.add_tokens(added or [])
    if alphabet:
        tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", **options)


def level(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


def token(content: str, **options: Any) -> AddedToken:
    return AddedToken(content, **{"normalized": False, **options})


MARKED = [token("<|user|>", special=True), token("<|end|>")]
KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt2": lambda: made(level(), added=MARKED),
    "gpt2 NFC": lambda: made(level(), normalizers.NFC(), [*MARKED, "  ", "   "]),
    "gpt2 NFKC": lambda: made(level(), normalizers.NFKC(), MARKED),
    "gpt2 NFD": lambda: made(level(), normalizers.NFD(), MARKED),
    "gpt2 with a blank": lambda: made(level(add_prefix_space=True), added=MARKED),
    "llama3": lambda: made(split(LLAMA3), added=MARKED),
    "gpt4o": lambda: made(split(GPT4O), added=MARKED),
    "matches kept": lambda: made(split(LLAMA3, behavior="removed", invert=True), added=MARKED),
    "matches removed": lambda: made(split(LLAMA3, behavior="removed"), added=MARKED),
    "deepseek": lambda: made(split(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK), added=MARKED),
    "digits": lambda: made(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level()])),
    "falcon": lambda: made(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Punctuation("contiguous"), level(), pre_tokenizers.Digits(), split("[0-9][0-9][0-9]", level=False)]
        )
    ),
    "punctuation to the left": lambda: made(
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation("merged_with_previous"), level()])
    ),
    "another pattern": lambda: made(split(r"\S+ |\s+"), added=MARKED),
    "a word and its blank": lambda: made(split(LLAMA3.replace(r"?\p{L}+", r"?\p{L}+ ?")), added=MARKED),
    "words, then a first one": lambda: made(pre_tokenizers.Sequence([level(), pre_tokenizers.Metaspace("Ġ", "first")])),
    **{
        f"metaspace {scheme}{'' if split else ' whole'}": lambda scheme=scheme, split=split: made(
            pre_tokenizers.Metaspace("▁", scheme, split), added=MARKED, alphabet=False
        )
        for scheme in ("always", "first", "never")
        for split in (True, False)
    },
    "sentencepiece": sentencepiece_like,
    "sentencepiece that strips": lambda: sentencepiece_like(strip=True),
    "unigram": lambda: made(
        pre_tokenizers.Metaspace(), normalizers.NFKC(), MARKED, model="Unigram", alphabet=False
    ),
    "bert": lambda: made(
        pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer(), MARKED, model="WordPiece", alphabet=False
    ),
    "gemma": lambda: made(
        pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁"), MARKED, alphabet=False
    ),
    "no pre-tokenizer": lambda: made(added=MARKED, alphabet=False),
    "lower": lambda: made(level(), normalizers.Lowercase(), MARKED),
    "normalized tokens": lambda: made(level(), normalizers.Lowercase(), [token("<|USER|>", normalized=True), *MARKED]),
    "normalized tokens, no normalizer": lambda: made(level(), None, [token("<|user|>", normalized=True)]),
    "lstrip": lambda: made(level(), None, [*MARKED, token("<mask>", lstrip=True)]),
    "rstrip": lambda: made(level(), None, [*MARKED, token("<mask>", rstrip=True), token("mask", rstrip=True)]),
    "rstrip, words of metaspace": lambda: made(
        pre_tokenizers.Metaspace(), None, [token(one, rstrip=True) for one in ("<|user|>", "<|end|>")], alphabet=False
    ),
    "single word": lambda: made(level(), None, [*MARKED, token("mask", single_word=True)]),
    "tokens that overlap": lambda: made(
        level(), None, [token(one) for one in ("<|end|>", "<|end", "<<", "><|end", "<|user|>", "|>\n", "<|user|> a")]
    ),
    "tokens of words": lambda: made(level(), None, [*MARKED, token("<a b>"), token("cat's don't"), token("'s"), token(" ")]),
    "special tokens are split": lambda: made(level(), None, MARKED, split_special_tokens=True),
    "toy": byte_level,
}


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


def texts(seed: int, count: int) -> list[tuple[str, list[str]]]:
    """Prompts of one to many words, and two to four completions of each."""
    draw = random.Random(seed)
    words = WORDS.split(" ")

    def text(most: int) -> str:
        parts = [draw.choice(MARKS) if draw.random() < 0.1 else draw.choice(words) for _ in range(draw.randint(0, most))]
        joined = "".join(draw.choice(GAPS) * (draw.random() < 0.9) + part for part in parts)
        return joined + draw.choice(GAPS) * (draw.random() < 0.5)

    return [(text(9), [text(3) for _ in range(draw.randint(2, 4))]) for _ in range(count)]


def by_definition(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int] | None]:
    """Ids of the prompt; and what follows them in those of both together, None if these begin otherwise."""
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    return start, whole[len(start) :] if whole[: len(start)] == start else None


def check(tokenizer: Any, count: int, seed: int = 0) -> tuple[int, int]:
    drawn = texts(seed, count)
    found = Tokens(tokenizer).encode(drawn)
    assert found == Tokens(tokenizer, with_cuts=False).encode(drawn)
    cut = last_cut(tokenizer)
    merged = 0
    for (prompt, completions), (start, after) in list(zip(drawn, found, strict=True))[: count // 20]:
        for completion, ids in zip(completions, after, strict=True):
            expected, beyond = by_definition(tokenizer, prompt, completion)
            assert start == expected
            merged += beyond is None
            assert beyond is None or ids == beyond
    return sum(bool(cut(prompt)) for prompt, _ in drawn), merged


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_whole_text(kind: str) -> None:
    check(tokenizer(kind), 400)
