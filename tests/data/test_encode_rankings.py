"""Many completions of one prompt as token ids: each once, and what is too long."""

from __future__ import annotations

from itertools import combinations

import pytest

from lit_dpo.data.batch import EncodedPrompt
from lit_dpo.data.encode import PromptEncoder
from lit_dpo.data.formats import Preference, Ranking
from lit_dpo.data.truncation import Dropped, Fitted
from toy_tokenizers import byte_level

TEXTS = [" The answer is four.", " not five.", "five", " four, or: five", " a"]
PAIRS = list(combinations(range(5), 2))
USER = [{"role": "user", "content": "What is the answer?"}]


def messages(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def contents(one: EncodedPrompt) -> list[tuple]:
    return [(one.prompt, one.completions[chosen], one.completions[rejected]) for chosen, rejected in one.comparisons]


@pytest.mark.parametrize("conversation", [False, True])
def test_comparisons_are_those_of_the_pairs_written_out(tokenizer, conversation: bool) -> None:
    if conversation:
        tokenizer = byte_level()
    prompt, texts = (USER, list(map(messages, TEXTS))) if conversation else ("What is the answer? ", TEXTS)
    encoder = PromptEncoder(tokenizer)
    (many,) = encoder([Ranking(prompt, texts, comparisons=PAIRS)])
    pairs = encoder([Preference(prompt, texts[better], texts[worse]) for better, worse in PAIRS])
    assert contents(many) == [one for pair in pairs for one in contents(pair)]
    assert len(many.completions) == 5


def test_one_header_holds_for_all_completions() -> None:
    """The template puts an empty thought into the header, and one completion does not begin with it."""
    template = byte_level().chat_template.replace("'<|assistant|>' }}{% endif", "'<|assistant|>!' }}{% endif")
    encoder = PromptEncoder(byte_level(chat_template=template))
    with_header, without = encoder(
        [
            Ranking(USER, [messages("!a"), messages("!b"), messages("!c")], comparisons=[(0, 1), (1, 2)]),
            Ranking(USER, [messages("!a"), messages("!b"), messages("c")], comparisons=[(0, 1), (1, 2)]),
        ]
    )
    assert encoder.tokenizer.decode(with_header.prompt).endswith("<|assistant|>!")
    assert [encoder.tokenizer.decode(ids) for ids in without.completions] == [
        f"<|assistant|>{text}<|end|>\n" for text in ("!a", "!b", "c")
    ]


def test_a_ranking_that_is_too_long_is_dropped_as_its_pair_is(tokenizer) -> None:
    pair, ranking = (
        Preference("q" * 40, " a", " b"),
        Ranking("q" * 40, [" a", " b", " c"], comparisons=[(0, 1), (0, 2)]),
    )
    one, many = PromptEncoder(tokenizer, max_length=20)([pair, ranking])
    assert one == many == Dropped("longer than max_length=20")


def test_completions_that_nothing_is_compared_with_are_not_encoded(tokenizer) -> None:
    many, alone = PromptEncoder(tokenizer)(
        [Ranking("q", TEXTS, comparisons=[(3, 1)]), Ranking("q", [TEXTS[1], TEXTS[3]], comparisons=[(1, 0)])]
    )
    assert many == alone


def test_equal_completions_are_one_and_keep_their_comparisons_with_others(tokenizer) -> None:
    row = Ranking("q", ["a", "b", "a", "c"], comparisons=[(0, 1), (0, 2), (2, 3), (1, 2)])
    (one,) = PromptEncoder(tokenizer).encode([row])
    assert isinstance(one, Fitted)
    assert (len(one.prompt.completions), one.prompt.comparisons) == (3, [(0, 1), (0, 2), (1, 0)])
    assert list(one.kept) == [0, 2, 3]


def test_equal_completions_alone_are_dropped_in_a_ranking_and_kept_in_a_pair(tokenizer) -> None:
    ranked, pair = PromptEncoder(tokenizer)([Ranking("q", ["a", "a"], comparisons=[(0, 1)]), Preference("q", "a", "a")])
    assert ranked == Dropped("all completions that are compared are equal")
    assert pair.completions[0] == pair.completions[1]


# --- limits: byte by byte, so that lengths can be counted ------------------------------------------------------------


def one(prompt: int, *completions: int) -> EncodedPrompt:
    """Of these lengths, all ids different, everything compared."""
    ids = iter(range(1000))
    parts = [[next(ids) for _ in range(length)] for length in (prompt, *completions)]
    return EncodedPrompt(parts[0], parts[1:], list(combinations(range(len(completions)), 2)))


def fit(example: EncodedPrompt, *limits) -> Fitted | Dropped:
    return PromptEncoder(byte_level(), *limits).fit(example)


def test_a_completion_that_is_too_long_is_dropped_with_its_comparisons() -> None:
    given = one(4, 3, 9, 2, 6)
    fitted = fit(given, 10, None, "drop")
    assert fitted.prompt == EncodedPrompt(
        given.prompt, [given.completions[place] for place in (0, 2, 3)], [(0, 1), (0, 2), (1, 2)]
    )
    assert [given.comparisons[number] for number in fitted.kept] == [(0, 2), (0, 3), (2, 3)]
    assert fitted.lost == 1


def test_a_prompt_without_comparisons_is_dropped_for_the_reason_of_a_pair() -> None:
    reason = "longer than max_length=10"
    assert fit(one(4, 3, 9), 10, None, "drop") == fit(one(4, 3, 9, 8), 10, None, "drop") == Dropped(reason)
    assert fit(one(4, 3, 2, 2), 10, 3, "drop") == Dropped("longer than max_prompt_length=3")
    assert fit(one(4, 3, 9, 8), 10, None, "error") == Dropped(f"{reason} (13 tokens, 4 of them the prompt)", fatal=True)


def test_a_completion_compared_only_with_a_dropped_one_goes_too() -> None:
    given = one(4, 3, 9, 2, 6)._replace(comparisons=[(0, 1), (2, 3)])
    fitted = fit(given, 10, None, "drop")
    assert fitted.prompt == EncodedPrompt(given.prompt, given.completions[2:], [(0, 1)])
    assert (list(fitted.kept), fitted.lost) == ([1], 1)


def test_the_prompt_is_cut_once_for_the_longest_completion() -> None:
    given = one(8, 3, 9, 2, 20)
    fitted = fit(given, 12, None, "truncate_prompt")
    assert fitted.prompt.prompt == given.prompt[-3:]
    assert fitted.prompt.completions == given.completions[:3]  # the last one leaves no room for the prompt
    assert (len(fitted.kept), fitted.lost) == (3, 1)
    assert fit(one(8, 30, 20, 3), 12, None, "truncate_prompt").reason.startswith("a completion leaves no room")


def test_completions_are_cut_to_the_room_that_the_prompt_leaves() -> None:
    given = one(8, 3, 9, 2)
    cut = fit(given, 12, None, "truncate_completion")
    assert cut.prompt == given._replace(completions=[ids[:4] for ids in given.completions])
    both = fit(given, 10, 5, "truncate_both")
    assert both.prompt == given._replace(prompt=given.prompt[-5:], completions=[ids[:5] for ids in given.completions])


def test_completions_that_a_cut_makes_equal_are_one() -> None:
    given = EncodedPrompt([1], [[2, 3], [2, 4], [5]], [(0, 1), (0, 2), (1, 2)])
    cut = fit(given, 2, None, "truncate_completion")
    assert cut.prompt == EncodedPrompt([1], [[2], [5]], [(0, 0), (0, 1), (0, 1)])
    pair = EncodedPrompt([1], [[2, 3], [2, 4]])
    assert fit(pair, 2, None, "truncate_completion").prompt == EncodedPrompt([1], [[2], [2]])
