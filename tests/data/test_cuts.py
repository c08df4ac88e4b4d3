"""The ids of texts that are cut are those of texts that are not, for tokenizers of every kind."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from lit_dpo.data.cuts import last_cut
from lit_dpo.data.tokens import Tokens, tokenizer_content
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
WORDS = (
    "the cat's don't WE'LL 12 3456 7 naïve e\u0301te\u0301 Σίσυφος привет _x_ <b> a/b\n/ #! […] ² ﬁ "
    "世界 你好，世界。 はい、ガ、 한국어 🦆 👩\u200d👩\u200d👧"
)
GAPS = [*" " * 6, "", "  ", "   ", "\n", "\n\n", " \n", "\r\n", "\t", *"\u00a0\u3000\u200d\u0301\x1c'."]
MARKS = ["<|user|>", "<|end|>", "<<", "<<<", "<|end", "<s>", "mask", "<mask>", "<a b>", "</s>"]


def stages(*given: Any) -> Any:
    return pre_tokenizers.Sequence(list(given))


def split(*patterns: str, behavior: str = "isolated", invert: bool = False) -> Any:
    splits = (pre_tokenizers.Split(Regex(pattern), behavior, invert) for pattern in patterns)
    return stages(*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


def made(
    pre_tokenizer: Any = None,
    normalizer: Any = None,
    added: Sequence[AddedToken | str] = (),
    model: str = "BPE",
    *,
    alphabet: bool = True,
    dropout: float | None = None,
    **options: Any,
) -> PreTrainedTokenizerFast:
    """A tokenizer trained on all the texts that are drawn here."""
    unknown = {"unk_token": "<unk>"}
    trained = getattr(models, model)(**({} if model == "Unigram" else unknown))
    if dropout is not None:
        trained.dropout = dropout
    tokenizer = Tokenizer(trained)
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer  # type: ignore[assignment]
    trainer = getattr(trainers, f"{'Bpe' if model == 'BPE' else model}Trainer")(
        vocab_size=600,
        special_tokens=["<unk>", "<eos>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        **(unknown if model == "Unigram" else {}),
    )
    tokenizer.train_from_iterator([*TEXT * 4, WORDS, *(WORDS + gap + WORDS for gap in GAPS)], trainer)
    tokenizer.add_tokens(list(added))
    if alphabet:
        tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", **options)


def level(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


def token(content: str, **options: Any) -> AddedToken:
    return AddedToken(content, **{"normalized": False, **options})


MARKED = [token("<|user|>", special=True), token("<|end|>")]
Maker = Callable[[], PreTrainedTokenizerFast]

# What is cut between words, what before tokens only, and what is not cut at all.
BETWEEN_WORDS: dict[str, Maker] = {
    "gpt2": lambda: made(level(), added=MARKED),
    "gpt2, NFC": lambda: made(level(), normalizers.NFC(), [*MARKED, "  ", "   "]),
    "llama3": lambda: made(split(LLAMA3), added=MARKED),
    "gpt4o": lambda: made(split(GPT4O), added=MARKED),
    "matches kept": lambda: made(split(LLAMA3, behavior="removed", invert=True), added=MARKED),
    "deepseek": lambda: made(split(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK), added=MARKED),
    "digits": lambda: made(stages(pre_tokenizers.Digits(True), level())),
    "falcon": lambda: made(
        stages(pre_tokenizers.Punctuation("contiguous"), level(), pre_tokenizers.Digits(), split("[0-9][0-9][0-9]"))
    ),
    "normalized token": lambda: made(level(), added=[token("<|user|>", normalized=True)]),
    "lstrip": lambda: made(level(), added=[*MARKED, token("<mask>", lstrip=True)]),
    "toy": byte_level,
}
BEFORE_TOKENS: dict[str, Maker] = {
    "gpt2, NFKC": lambda: made(level(), normalizers.NFKC(), MARKED),
    "gpt2, NFD": lambda: made(level(), normalizers.NFD(), MARKED),
    "gpt2, lower": lambda: made(level(), normalizers.Lowercase(), MARKED),
    "gpt2, a blank before": lambda: made(level(add_prefix_space=True), added=MARKED),
    "matches removed": lambda: made(split(LLAMA3, behavior="removed"), added=MARKED),
    "another pattern": lambda: made(split(r"\S+ |\s+"), added=MARKED),
    "a word and its blank": lambda: made(split(LLAMA3.replace(r"?\p{L}+", r"?\p{L}+ ?")), added=MARKED),
    "words, then a first one": lambda: made(stages(level(), pre_tokenizers.Metaspace("Ġ", "first")), added=MARKED),
    **{
        f"metaspace {scheme}{'' if words else ', whole'}": partial(
            made, pre_tokenizers.Metaspace("▁", scheme, words), None, MARKED, alphabet=False
        )
        for scheme in ("always", "first", "never")
        for words in (True, False)
    },
    "sentencepiece": sentencepiece_like,
    "sentencepiece, stripped": lambda: sentencepiece_like(strip=True),
    "unigram": lambda: made(pre_tokenizers.Metaspace(), normalizers.NFKC(), MARKED, "Unigram", alphabet=False),
    "bert": lambda: made(
        pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer(), MARKED, "WordPiece", alphabet=False
    ),
    "gemma": lambda: made(
        pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁"), MARKED, alphabet=False
    ),
    "no pre-tokenizer": lambda: made(added=MARKED, alphabet=False),
    "normalized tokens too": lambda: made(level(), normalizers.Lowercase(), [token("<|A|>", normalized=True), *MARKED]),
    "normalized, a blank before": lambda: made(
        None,
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        [token("<|user|>", normalized=True), token("<|end|>")],
        alphabet=False,
    ),
    "rstrip": lambda: made(level(), added=[*MARKED, token("<mask>", rstrip=True), token("mask", rstrip=True)]),
    "rstrip of all": lambda: made(
        pre_tokenizers.Metaspace(), added=[token(one, rstrip=True) for one in ("<|user|>", "<|end|>")], alphabet=False
    ),
    "tokens of words": lambda: made(
        level(), added=[*MARKED, token("<a b>"), token("cat's don't"), token("'s"), token(" ")]
    ),
}
NOWHERE: dict[str, Maker] = {
    "digits alone": lambda: made(pre_tokenizers.Digits(True)),
    "signs to the left": lambda: made(stages(pre_tokenizers.Punctuation("merged_with_previous"), level())),
    "single word": lambda: made(level(), added=[*MARKED, token(" 7", single_word=True)]),
    "tokens that overlap": lambda: made(
        stages(level(), pre_tokenizers.Metaspace("Ġ", "first")),
        added=[token(one) for one in ("<|end|>", "<|end", "<<", "><|end", "<|user|>", "|>\n", "<|user|> a")],
    ),
    "special tokens are split": lambda: made(level(), added=MARKED, split_special_tokens=True),
    "dropout": lambda: made(level(), added=MARKED, dropout=1e-9),
}
KINDS = BETWEEN_WORDS | BEFORE_TOKENS | NOWHERE
SHARED = [
    "gpt-neox-20b",
    "gpt2-50257",
    "minimind-6400",
    "oasst-test",
    "stories260K",
    "storybyte-2048",
    "storybyte-nano-kd",
    "torchtune-2000",
    "torchtune-gemma-cropped",
    "torchtune-tiny-bpe",
]


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


def texts(seed: int, count: int) -> list[tuple[str, list[str]]]:
    """Prompts of one to many words, and two to four completions of each."""
    draw = random.Random(seed)
    words = WORDS.split(" ")

    def text(most: int) -> str:
        parts = [
            draw.choice(MARKS) if draw.random() < 0.1 else draw.choice(words) for _ in range(draw.randint(0, most))
        ]
        joined = "".join(draw.choice(GAPS) * (draw.random() < 0.9) + part for part in parts)
        return joined + draw.choice(GAPS) * (draw.random() < 0.5)

    return [(text(9), [text(3) for _ in range(draw.randint(2, 4))]) for _ in range(count)]


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def by_definition(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt; and what follows them in those of both together, or those of the completion on its own."""
    start, whole = ids(tokenizer, prompt), ids(tokenizer, prompt + completion)
    if whole[: len(start)] == start:
        return start, whole[len(start) :]
    line, after_line = ids(tokenizer, "\n"), ids(tokenizer, "\n" + completion)
    decoded = [tokenizer.decode(one, clean_up_tokenization_spaces=False) for one in (line, after_line)]
    if after_line[: len(line)] == line and decoded[1] == decoded[0] + completion:
        return start, after_line[len(line) :]
    return start, ids(tokenizer, completion)


def check(tokenizer: Any, count: int, seed: int = 0) -> list[tuple[str, list[str]]]:
    drawn = texts(seed, count)
    found = Tokens(tokenizer).encode(drawn)
    assert found == Tokens(tokenizer, with_cuts=False).encode(drawn)
    for (prompt, completions), (start, after) in list(zip(drawn, found, strict=True))[: count // 10]:
        expected = [by_definition(tokenizer, prompt, completion) for completion in completions]
        assert [(start, one) for one in after] == expected
    return drawn


def share_cut(tokenizer: Any, drawn: list[tuple[str, list[str]]]) -> float:
    """Of the prompts, how many are cut."""
    cut = last_cut(tokenizer)
    return sum(cut(prompt) > 0 for prompt, _ in drawn) / len(drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_whole_text(kind: str) -> None:
    check(tokenizer(kind), 200)


@pytest.mark.parametrize("name", SHARED)
def test_ids_are_those_of_the_whole_text_for_tokenizers_in_use(shared: Path, name: str) -> None:
    file = shared / "data/tokenizers" / name / "tokenizer.json"
    check(PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<eos>"), 200)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_known_to_be_safe_is_cut_and_nothing_else(kind: str) -> None:
    """Between words, most prompts; before tokens alone, those that have one."""
    share = share_cut(tokenizer(kind), texts(1, 300))
    assert (share > 0.6) == (kind in BETWEEN_WORDS)
    assert (share > 0) == (kind not in NOWHERE)


def test_a_prompt_is_tokenized_once_for_all_its_completions_and_rows() -> None:
    """Beyond its last word, which each completion is read with."""
    read: list[str] = []

    class Reading(Tokens):
        def _ids(self, texts):
            read.extend(texts := list(dict.fromkeys(texts)))
            return super()._ids(texts)

    prompt = "once upon a time " * 50 + "there was"
    completions = [f" a {animal} named Ducky" for animal in ("duck", "cat", "dog")]
    found = Reading(byte_level()).encode([(prompt, completions), (prompt, completions[:2])])
    assert found == Tokens(byte_level(), with_cuts=False).encode([(prompt, completions), (prompt, completions[:2])])
    assert sum(map(len, read)) == len(prompt) + len(" was") * 3 + sum(map(len, completions))


def test_thousands_of_added_tokens_cost_nothing_where_a_text_has_none() -> None:
    """Gemma has six thousand of them."""
    many = [token(f"<unused{number}>") for number in range(6000)] + [token("[multimodal]"), *MARKED]
    cut = last_cut(made(pre_tokenizers.Metaspace(), added=many, alphabet=False))
    assert cut("once upon <unused17> a time") == len("once upon ")
    start = time.process_time()
    assert not any(cut("once upon a time, a < b " * 100) for _ in range(20))
    assert time.process_time() - start < 0.2


# --- what a tokenizer does besides ----------------------------------------------------------------------------------


def test_padding_and_truncation_left_on_change_nothing() -> None:
    given = made(level(), added=MARKED)
    plain = check(given, 50) and Tokens(given).encode(texts(0, 50))
    given.backend_tokenizer.enable_padding(length=64, pad_id=1)
    given.backend_tokenizer.enable_truncation(3)
    given.backend_tokenizer.encode_special_tokens = True
    assert Tokens(given).encode(texts(0, 50)) == plain


class Shouting(PreTrainedTokenizerFast):
    """Does something of its own before the backend reads a text."""

    def __call__(self, text, **options):
        louder = f"{text.strip()}!" if isinstance(text, str) else [f"{one.strip()}!" for one in text]
        return super().__call__(louder, **options)


class Letters(PreTrainedTokenizer):
    """Written in Python, with a blank before each text."""

    vocab_size = 256

    def get_vocab(self):
        return {chr(code): code for code in range(256)}

    def _tokenize(self, text, **options):
        return [" ", *text]

    def _convert_token_to_id(self, token):
        return min(ord(token), 255)

    def _convert_id_to_token(self, index):
        return chr(index)


@pytest.mark.parametrize("kind", ["shouting", "python"])
def test_a_tokenizer_that_does_more_in_python_reads_whole_texts(kind: str) -> None:
    backend = byte_level().backend_tokenizer
    given = Letters(eos_token="\n") if kind == "python" else Shouting(tokenizer_object=backend, eos_token="<eos>")
    assert share_cut(given, check(given, 60)) == 0


class Halves:
    """A pre-tokenizer that is written in Python."""

    def pre_tokenize(self, given: Any) -> None:
        given.split(lambda _, text: [text[: len(str(text)) // 2], text[len(str(text)) // 2 :]])


def test_a_part_that_cannot_be_looked_into_has_whole_texts() -> None:
    given = byte_level()
    given.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Halves())
    assert share_cut(given, check(given, 60)) == 0


def test_the_content_of_a_tokenizer_in_python_is_its_code_its_words_and_its_options() -> None:
    class Others(Letters):
        def _tokenize(self, text, **options):
            return [*text]

    given = [Letters(eos_token="\n"), Letters(eos_token="\n"), Letters(eos_token="."), Others(eos_token="\n")]
    one, same, *others = [str(tokenizer_content(one)) for one in given]
    assert one == same
    assert len({one, *others}) == 3
