from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from lit_dpo.data.batch import EncodedPrompt
from lit_dpo.data.encode import Dropped, PromptEncoder
from lit_dpo.data.formats import Preference
from lit_dpo.errors import DataError
from toy_tokenizers import byte_level, sentencepiece_like

PREFERENCES = [
    Preference("What is the answer?", " The answer is four.", " not five."),
    Preference("What is the answer? ", "The answer", "five"),  # a merge across the boundary
    Preference("Tell me a story:\n", "Once upon a time", "\nI would rather not"),
    Preference("duck", "duck", "s duck ü 鸭 🦆"),
    Preference("Wh", "at is", "en"),
]


def encode(tokenizer, *preferences: Preference, **options) -> list[EncodedPrompt]:
    pairs = PromptEncoder(tokenizer, **options)(preferences)
    assert all(isinstance(pair, EncodedPrompt) for pair in pairs), pairs
    return pairs


def body(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preference", PREFERENCES)
def test_the_prompt_is_what_generation_sees(tokenizer, preference: Preference) -> None:
    (pair,) = encode(tokenizer, preference)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert pair.prompt == bos + body(tokenizer, preference.prompt)


@pytest.mark.parametrize("preference", PREFERENCES)
def test_prompt_and_answer_decode_to_the_text_with_one_eos(tokenizer, preference: Preference) -> None:
    (pair,) = encode(tokenizer, preference)
    for ids, text in zip(pair.completions, (preference.chosen, preference.rejected), strict=True):
        assert ids[-1] == tokenizer.eos_token_id
        assert (pair.prompt + ids).count(tokenizer.eos_token_id) == 1
        assert tokenizer.bos_token_id not in ids
        bos = pair.prompt[0] == tokenizer.bos_token_id
        assert tokenizer.decode(pair.prompt[bos:] + ids[:-1]) == preference.prompt + text


@pytest.mark.parametrize("preference", PREFERENCES)
def test_without_a_merge_the_ids_are_those_of_the_whole_text(tokenizer, preference: Preference) -> None:
    (pair,) = encode(tokenizer, preference)
    whole = body(tokenizer, preference.prompt + preference.chosen)
    prompt = body(tokenizer, preference.prompt)
    if whole[: len(prompt)] == prompt:
        assert prompt + pair.completions[0][:-1] == whole


def test_there_are_merges_across_the_boundary_in_these_tests() -> None:
    tokenizer = byte_level()
    merged = [
        body(tokenizer, prompt + chosen)[: len(body(tokenizer, prompt))] != body(tokenizer, prompt)
        for prompt, chosen, *_ in PREFERENCES
    ]
    assert any(merged)
    assert not all(merged)


def test_the_whole_text_decides_where_an_answer_cannot_be_tokenised_apart() -> None:
    tokenizer = sentencepiece_like(strip=True)
    (pair,) = encode(tokenizer, Preference("What", "not", "five"))
    assert tokenizer.decode(pair.prompt[1:] + pair.completions[0][:-1]) == "Whatnot"  # apart it would be "What not"


def test_an_eos_that_is_there_is_not_doubled(tokenizer) -> None:
    with_eos, without = encode(
        tokenizer, Preference("What", f" is{tokenizer.eos_token}", " not"), Preference("What", " is", " not")
    )
    assert with_eos.completions[0] == without.completions[0]


def test_a_bos_that_the_text_begins_with_is_not_doubled() -> None:
    tokenizer = sentencepiece_like()
    (pair,) = encode(tokenizer, Preference("<s>What", " is", " not"))
    assert pair.prompt.count(tokenizer.bos_token_id) == 1


def test_no_eos_is_an_error() -> None:
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="EOS"):
        PromptEncoder(tokenizer)(PREFERENCES)


def test_batch_mates_do_not_matter(tokenizer) -> None:
    assert encode(tokenizer, *PREFERENCES) == [encode(tokenizer, one)[0] for one in PREFERENCES]


# --- conversations --------------------------------------------------------------------------------------------------

CONVERSATION = Preference(
    [{"role": "system", "content": "yes"}, {"role": "user", "content": "What is the answer?"}],
    [{"role": "assistant", "content": "four"}],
    [{"role": "assistant", "content": " five, or: "}],
)


def test_a_conversation_is_the_template_s_text(chat_tokenizer) -> None:
    (pair,) = encode(chat_tokenizer, CONVERSATION)
    for ids, answer in zip(pair.completions, (CONVERSATION.chosen, CONVERSATION.rejected), strict=True):
        text = chat_tokenizer.apply_chat_template(CONVERSATION.prompt + answer, tokenize=False)
        assert chat_tokenizer.decode(pair.prompt + ids) == text  # no EOS: the template ends in a special token
    assert chat_tokenizer.decode(pair.prompt).endswith("<|assistant|>")


def test_eos_is_added_where_the_template_ends_in_none() -> None:
    tokenizer = byte_level(
        chat_template="{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    )
    (pair,) = encode(tokenizer, CONVERSATION)
    assert pair.completions[0][-1] == pair.completions[1][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(pair.completions[0]) == "assistant: four\n<eos>"


def test_a_header_that_finished_answers_lack_is_left_out() -> None:
    template = byte_level().chat_template.replace("'<|assistant|>' }}{% endif", "'<|assistant|><think>' }}{% endif")
    tokenizer = byte_level(chat_template=template)
    (pair,) = encode(tokenizer, CONVERSATION)
    assert tokenizer.decode(pair.completions[0]) == "<|assistant|>four<|end|>\n"


def test_a_template_that_rewrites_history_is_a_row_error() -> None:
    template = "{{ messages | length }}" + byte_level().chat_template
    (result,) = PromptEncoder(byte_level(chat_template=template))([CONVERSATION])
    assert isinstance(result, Dropped)
    assert result.fatal
    assert "rewrites history" in result.reason


def test_a_template_that_raises_is_a_row_error() -> None:
    template = "{{ raise_exception('no system message, please') }}"
    (result,) = PromptEncoder(byte_level(chat_template=template))([CONVERSATION])
    assert isinstance(result, Dropped)
    assert result.fatal
    assert "no system message, please" in result.reason


def test_conversations_need_a_template() -> None:
    with pytest.raises(DataError, match="chat template"):
        PromptEncoder(sentencepiece_like())([CONVERSATION])


def test_template_arguments_reach_the_template() -> None:
    template = "{% if shout %}!!{% endif %}" + byte_level().chat_template
    tokenizer = byte_level(chat_template=template)
    (pair,) = encode(tokenizer, CONVERSATION, chat_template_kwargs={"shout": True})
    assert tokenizer.decode(pair.prompt).startswith("!!")


# --- limits ---------------------------------------------------------------------------------------------------------

LONG = Preference("What is the answer? " * 5, " four" * 6, " not" * 9)


def sizes(pair: EncodedPrompt) -> tuple[int, int, int]:
    return len(pair.prompt), *map(len, pair.completions)


POLICIES = ["drop", "truncate_prompt", "truncate_completion", "truncate_both", "error"]
LIMITS = [
    (policy, length, prompt)
    for policy in POLICIES
    for length in (2, 3, 7, 12, 20, 40, 1000)
    for prompt in (None, 1, 5, 30)
    if (prompt or 1) < length and (prompt or policy != "truncate_both")
]


@pytest.mark.parametrize(("truncation", "max_length", "max_prompt_length"), LIMITS)
def test_every_pair_is_dropped_or_fits(tokenizer, truncation, max_length, max_prompt_length) -> None:
    encoder = PromptEncoder(tokenizer, max_length, max_prompt_length, truncation)
    for preference, full in zip(
        [*PREFERENCES, LONG], encode(tokenizer, *PREFERENCES, LONG, max_length=None), strict=True
    ):
        (pair,) = encoder([preference])
        fits = max(sizes(full)[0] + n for n in sizes(full)[1:]) <= max_length
        fits = fits and len(full.prompt) <= (max_prompt_length or max_length)
        if fits:
            assert pair == full
        elif isinstance(pair, Dropped):
            assert pair.fatal == (truncation == "error")
        else:
            prompt, chosen, rejected = sizes(pair)
            assert prompt + max(chosen, rejected) <= max_length
            assert min(prompt, chosen, rejected) >= 1
            assert prompt <= (max_prompt_length or max_length)
            assert full.completions[0][:chosen] == pair.completions[0]
            assert full.completions[1][:rejected] == pair.completions[1]
            assert pair.prompt[1:] == full.prompt[len(full.prompt) - prompt + 1 :]
            if truncation == "truncate_prompt":
                assert (chosen, rejected) == sizes(full)[1:]
            if truncation == "truncate_completion":
                assert pair.prompt == full.prompt


def test_a_cut_prompt_keeps_its_bos() -> None:
    tokenizer = sentencepiece_like()
    (full,) = encode(tokenizer, LONG)
    length = max(sizes(full)[1:]) + 4
    (pair,) = encode(tokenizer, LONG, max_length=length, truncation="truncate_prompt")
    assert pair.prompt == [tokenizer.bos_token_id, *full.prompt[-3:]]


def test_a_prompt_cut_to_one_token_is_the_one_that_the_answer_follows() -> None:
    """A BOS alone would leave nothing of the question; with two tokens it is back."""
    tokenizer = sentencepiece_like()
    (full,) = encode(tokenizer, LONG)
    for length, expected in ((1, full.prompt[-1:]), (2, [tokenizer.bos_token_id, full.prompt[-1]])):
        room = max(sizes(full)[1:]) + length
        for options in ({"max_length": room}, {"max_length": room + 9, "max_prompt_length": length}):
            (pair,) = encode(tokenizer, LONG, truncation="truncate_prompt", **options)
            assert pair.prompt == expected
        (pair,) = encode(tokenizer, LONG, max_length=9, max_prompt_length=length, truncation="truncate_both")
        assert pair.prompt == expected


def test_truncate_both_does_what_tutorials_did(chat_tokenizer) -> None:
    (full,) = encode(chat_tokenizer, LONG)
    (pair,) = encode(chat_tokenizer, LONG, max_length=9, max_prompt_length=4, truncation="truncate_both")
    assert pair == EncodedPrompt(full.prompt[-4:], [ids[:5] for ids in full.completions])


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 1},
        {"truncation": "truncate_both"},
        {"max_length": 8, "max_prompt_length": 8},
        {"max_prompt_length": 0},
    ],
)
def test_limits_that_leave_no_room_are_refused(tokenizer, options: dict) -> None:
    with pytest.raises(ValueError, match="max_"):
        PromptEncoder(tokenizer, **options)


# --- fingerprint ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_all_that_changes_ids(tokenizer) -> None:
    base = PromptEncoder(tokenizer)
    others = [
        replace(base, max_length=99),
        replace(base, max_prompt_length=9),
        replace(base, truncation="truncate_prompt"),
        replace(base, chat_template_kwargs={"a": 1}),
        PromptEncoder(byte_level(chat_template="x")),
        PromptEncoder(byte_level(eos_token="<|end|>")),
    ]
    assert len({encoder.fingerprint for encoder in [base, *others]}) == 7
    before = base.fingerprint
    tokenizer(["a", "longer text"], padding=tokenizer.pad_token is not None, truncation=True, max_length=5)
    assert PromptEncoder(tokenizer).fingerprint == before


def test_the_order_of_the_template_s_arguments_does_not_count(chat_tokenizer) -> None:
    one, other = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    found = {PromptEncoder(chat_tokenizer, chat_template_kwargs=given).fingerprint for given in (one, other)}
    assert len(found) == 1


def test_an_argument_that_the_template_does_not_read_is_refused_before_a_row(chat_tokenizer) -> None:
    encoder = PromptEncoder(chat_tokenizer, chat_template_kwargs={"no_such": 1})
    user, said = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]
    for call in (encoder.check_template, lambda: encoder([Preference(user, said, said)])):
        with pytest.raises(DataError, match="no_such"):
            call()


def test_a_part_without_a_token_makes_a_bad_row(chat_tokenizer) -> None:
    tokenizer = byte_level()
    tokenizer.bos_token = None
    rows = [Preference("q", "", " a"), Preference("q", " a", ""), Preference("", " a", " b")]
    for found, part in zip(PromptEncoder(tokenizer)(rows), ("`chosen`", "`rejected`", "the prompt"), strict=True):
        assert found.fatal
        assert found.reason.startswith(f"{part} encodes to no token")


# --- against others -------------------------------------------------------------------------------------------------


def test_ids_and_masks_are_those_of_trl(shared) -> None:
    referee = json.loads((shared / "data/referee/trl_stories260K_text.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    pairs = encode(tokenizer, *(Preference(r["prompt"], r["chosen"], r["rejected"]) for r in referee["rows"]))
    sides = [(pair.prompt, pair.completions[side]) for side in (0, 1) for pair in pairs]
    for (prompt, answer), ids, mask in zip(sides, referee["input_ids"], referee["completion_mask"], strict=True):
        pad = len(ids) - len(prompt) - len(answer)
        assert prompt + answer + [tokenizer.unk_token_id] * pad == ids
        assert [0] * len(prompt) + [1] * len(answer) + [0] * pad == mask


def test_a_real_template_renders_header_and_end_once(shared) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/tokenizers/storybyte-nano-kd")
    messages = [{"role": "user", "content": "A story."}]
    answer = [{"role": "assistant", "content": "Once."}]
    (pair,) = encode(tokenizer, Preference(messages, answer, answer))
    assert tokenizer.decode(pair.prompt) == "<|req|> A story. <|story|>"
    assert tokenizer.decode(pair.completions[0]) == " Once.<|endoftext|>"


def test_taking_a_fingerprint_leaves_padding_and_truncation_as_they_are(chat_tokenizer) -> None:
    backend = chat_tokenizer.backend_tokenizer
    plain = PromptEncoder(chat_tokenizer).fingerprint
    backend.enable_padding(length=7, pad_id=1, pad_token="x", direction="left")
    backend.enable_truncation(9, stride=2)
    try:
        before = backend.padding, backend.truncation
        assert PromptEncoder(chat_tokenizer).fingerprint == plain
        assert (backend.padding, backend.truncation) == before
    finally:
        backend.no_padding()
        backend.no_truncation()
