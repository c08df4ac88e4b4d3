"""Nothing that belongs to a conversation is lost where a chat template renders it."""

from __future__ import annotations

import pytest
from chats import TURN, decoded, encode, pair, refusal, said, template, user
from transformers import AutoTokenizer

from lit_dpo.data.encode import PromptEncoder
from lit_dpo.data.formats import Preference, Ranking
from lit_dpo.data.rendering import EQUAL_RENDERED, WITH_UNKNOWN, WITHOUT_HEADER, WITHOUT_THOUGHTS
from lit_dpo.data.templates import read_template
from lit_dpo.data.truncation import EQUAL_CUT, EQUAL_TOKENISED, SOME_EQUAL, Dropped, Fitted
from lit_dpo.errors import DataError
from toy_tokenizers import CHAT, byte_level

# --- text and roles ---------------------------------------------------------------------------------------------------

KNOWN = "{% if m['role'] in ('user', 'assistant') %}" + TURN + "{% endif %}"


@pytest.mark.parametrize("role", ["developer", "function", "human", "system", "tool"])
def test_a_role_that_the_template_drops_is_refused(role: str) -> None:
    row = pair({"role": role, "content": "Be brief."}, user())
    reason = refusal(template(KNOWN), row)
    assert reason == (
        f"the chat template loses the text of a message of `{role}` in the prompt; give one that keeps it with "
        "`--data.chat_template FILE`"
    )
    assert decoded(template(), row)[0].startswith(f"<|{role}|>Be brief.")


@pytest.mark.parametrize("text", ["What", "the answer", "answer?", "What is the answer?"])
def test_a_text_that_is_there_only_within_another_one_is_lost(text: str) -> None:
    """`What` is in `What is the answer?` too, which is not where the system says it."""
    system = {"role": "system", "content": text}
    assert "`system`" in refusal(template(KNOWN), pair(system, user()))


def test_a_text_may_be_moved_and_stripped() -> None:
    """The system's words stand in the user's turn, and blanks around all texts go."""
    merged = "{{ '<|' + m['role'] + '|>' + m['content'].strip() + '<|end|>\n' }}"
    first = "{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    in_turn = merged.replace("m['content'].strip()", "m['content'].strip() + (system if m['role'] == 'user' else '')")
    row = pair({"role": "system", "content": "the answer"}, user("  What is it?\n"), chosen=said(" four \n"))
    assert decoded(template(in_turn, before=first), row)[:2] == [
        "<|user|>What is it?the answer<|end|>\n<|assistant|>",
        "four<|end|>\n",
    ]


def test_a_turn_of_a_longer_completion_that_the_template_drops_is_refused() -> None:
    row = pair(chosen=[said("Wait."), {"role": "tool", "content": "4"}, said("four")])
    assert "a message of `tool` in `chosen`" in refusal(template(KNOWN), row)
    assert "4" in decoded(template(), row)[1]


def test_all_completions_of_a_ranking_are_looked_at() -> None:
    lossy = "{% if m['content'] != 'b' %}" + TURN + "{% else %}<|assistant|><|end|>\n{% endif %}"
    row = Ranking([user()], [[said(text)] for text in "abc"], scores=[2, 1, 0])
    (found,) = PromptEncoder(template(lossy)).encode([row._replace(scores=None, comparisons=[(0, 1), (1, 2)])])
    assert "in `completions[1]`" in found.reason


# --- thoughts ---------------------------------------------------------------------------------------------------------

STRIPS = TURN.replace("m['content']", "m['content'].split('</think>')[-1]")
STRIPS_EARLIER = "{% if m['role'] == 'assistant' and not loop.last %}" + STRIPS + "{% else %}" + TURN + "{% endif %}"


def test_a_thought_of_a_completion_that_the_template_strips_is_refused() -> None:
    row = pair(chosen=said("<think>2, 3, 4</think>\n\nfour"))
    assert "the text (with its thought) of a message of `assistant` in `chosen`" in refusal(template(STRIPS), row)
    assert decoded(template(STRIPS_EARLIER), row)[1] == "<think>2, 3, 4</think>\n\nfour<|end|>\n"


@pytest.mark.parametrize("turn", [STRIPS, STRIPS_EARLIER])
def test_a_thought_of_an_earlier_turn_goes_as_in_generation_and_is_counted(turn: str) -> None:
    tokenizer = template(turn)
    row = pair(user("2 + 2?"), said("<think>2 + 2? is 4</think> 4"), user("2 + 2?"))
    found = encode(tokenizer, row)
    assert isinstance(found, Fitted)
    assert found.remarks == (WITHOUT_THOUGHTS,)
    generated = tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(found.prompt.prompt) == generated
    assert encode(tokenizer, pair(user("2 + 2?"), said("4"), user())).remarks == ()


def test_what_others_say_is_no_thought() -> None:
    row = pair(user("What does <think>four</think> mean?"))
    assert "the text (with its thought) of a message of `user` in the prompt" in refusal(template(STRIPS), row)


def test_what_an_earlier_turn_says_after_its_thought_has_to_stay() -> None:
    drops = "{% if m['role'] == 'assistant' and not loop.last %}{{ '<|assistant|>' }}{% else %}" + TURN + "{% endif %}"
    row = pair(user(), said("<think>2, 3</think> 4"), user("Sure?"))
    assert "the text (with its thought) of a message of `assistant` in the prompt" in refusal(template(drops), row)
    plain = pair(user(), said("4"), user("Sure?"))
    assert "the text of a message of `assistant` in the prompt" in refusal(template(drops), plain)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_in_a_field_of_their_own_are_rendered_or_refused(name: str) -> None:
    row = pair(chosen=said("four", **{name: "2, 3, 4"}))
    assert "the thought of a message of `assistant` in `chosen`" in refusal(template(), row)
    thinks = TURN.replace(
        "m['content']", f"('<think>' + m['{name}'] + '</think>' if m['{name}'] else '') + m['content']"
    )
    assert decoded(template(thinks), row)[1] == "<think>2, 3, 4</think>four<|end|>\n"
    earlier = pair(user(), said("four", **{name: "2, 3, 4"}), user("Sure?"))
    assert encode(template(), earlier).remarks == (WITHOUT_THOUGHTS,)


def test_blanks_between_a_thought_and_its_answer_are_the_template_s(shared) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/tokenizers/minimind-6400")
    prompt, chosen, _ = decoded(tokenizer, pair(chosen=said("<think>two and two</think>four")))
    assert prompt.endswith("<|im_end|>\n")  # generation begins with an empty thought, as this completion does not
    assert chosen == "<|im_start|>assistant\n<think>\ntwo and two\n</think>\n\nfour<|im_end|>\n"
    assert encode(tokenizer, pair(chosen=said("Let me see: <think>two and two</think>four"))).fatal


def test_rows_without_the_header_are_counted() -> None:
    tokenizer = template(header="{% if add_generation_prompt %}{{ '<|assistant|><think></think>' }}{% endif %}")
    assert encode(tokenizer, pair()).remarks == (WITHOUT_HEADER,)
    both = Preference([user()], [said("<think></think>four")], [said("<think></think>five")])
    assert encode(tokenizer, both).remarks == ()


# --- arguments of the template ----------------------------------------------------------------------------------------

THINKS = "{% if add_generation_prompt %}{{ '<|assistant|>' + ('' if enable_thinking else '!') }}{% endif %}"
THINKS = "{% set enable_thinking = enable_thinking | default(true) %}" + THINKS


@pytest.mark.parametrize("value", [True, False])
def test_an_argument_of_a_row_may_say_what_is_so_by_default(value: bool) -> None:
    row = Preference([user()], [said("!four")], [said("!five")], template={"enable_thinking": value})
    prompt = decoded(template(header=THINKS), row)[0]
    assert prompt.endswith("<|assistant|>" + "!" * (not value))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"enable_thinkin": True}, "does not read the row's `enable_thinkin`, but `enable_thinking`"),
        ({"unheard": True}, "the row's `unheard` changes nothing of what the chat template renders"),
        ({"chat_template": "x"}, "`chat_template` is no argument of a template; `--data.chat_template FILE` sets one"),
        ({"add_generation_prompt": True}, "`add_generation_prompt` is no argument of a template"),
        ({"tokenize": True}, "`tokenize` is no argument of a template"),
    ],
)
def test_an_argument_that_changes_nothing_is_refused(arguments: dict, words: str) -> None:
    tokenizer = template(header=THINKS + "{% if unheard %}{% endif %}")
    assert words in refusal(tokenizer, pair(template=arguments))
    if "unheard" not in arguments:
        with pytest.raises(DataError, match=words.replace("the row's ", "").replace("`", ".")):
            PromptEncoder(tokenizer, chat_template_kwargs=arguments).check_template()


def test_an_argument_without_which_the_template_fails_is_read() -> None:
    tokenizer = template("{{ style + '' }}" + TURN)
    assert decoded(tokenizer, pair(template={"style": "loud"}))[0].startswith("loud<|user|>")


@pytest.mark.parametrize(
    ("text", "words"),
    [("x" * 200_001, "at most 200000 characters but got 200"), ("{{ " + "(" * 9999 + ")" * 9999 + " }}", "too deep")],
)
def test_a_template_that_is_too_large_is_refused_once_and_with_its_file(text: str, words: str, tmp_path) -> None:
    (tmp_path / "large.jinja").write_text(text)
    with pytest.raises(DataError, match=f"large.jinja: .*{words}"):
        read_template(str(tmp_path / "large.jinja"))
    for row in (pair(), pair(template={"style": "loud"})):
        with pytest.raises(DataError, match=f"{words}|more than 200000 characters"):
            encode(byte_level(chat_template=text), row)


def test_a_named_template_is_asked_where_it_is_taken() -> None:
    """Where a tokenizer has several, rows with tools are rendered by `tool_use`."""
    tool_use = "{{ tools[0]['function']['name'] }}{{ style }}" + CHAT
    tokenizer = byte_level(chat_template={"default": CHAT, "tool_use": tool_use})
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert decoded(tokenizer, pair(template={"tools": tools, "style": "loud"}))[0].startswith("addloud<|user|>")
    assert "does not read the row's `style`" in refusal(tokenizer, pair(template={"style": "loud"}))
    PromptEncoder(tokenizer, chat_template_kwargs={"style": "loud"}).check_template()
    with pytest.raises(DataError, match="does not read `stile`, but `style`"):
        PromptEncoder(tokenizer, chat_template_kwargs={"stile": "loud"}).check_template()


def test_a_template_of_typed_parts_alone_gets_them() -> None:
    """As those of models that see: some show no text that is given as it is, some refuse it."""
    for read in ("{{ part['text'] }}", "{{ part.text + '' }}"):
        turn = "{{ '<|' + m['role'] + '|>' }}{% for part in m['content'] %}" + read + "{% endfor %}{{ '<|end|>\n' }}"
        assert decoded(template(turn), pair()) == decoded(template(), pair())
    printed = TURN.replace("m['content']", "(m['content'] if m['content'] is string else m['content'] | string)")
    assert decoded(template(printed), pair()) == decoded(template(), pair())


def test_every_tag_of_transformers_can_be_asked() -> None:
    turn = "{% generation %}" + TURN + "{% endgeneration %}{% if loop.last %}{% break %}{% endif %}"
    PromptEncoder(template(turn + "{{ mood }}"), chat_template_kwargs={"mood": ""}).check_template()
    assert decoded(template(turn), pair())[1] == "four<|end|>\n"


# --- equal once … -----------------------------------------------------------------------------------------------------


def test_pairs_that_become_equal_are_left_out_by_reason() -> None:
    strips = template(TURN.replace("m['content']", "m['content'].strip()"))
    blanks = Preference([user()], [said("four ")], [said("four")])
    assert encode(strips, blanks) == Dropped(EQUAL_RENDERED)
    assert isinstance(encode(template(), blanks), Fitted)
    assert isinstance(encode(strips, blanks._replace(rejected=blanks.chosen)), Fitted)  # as given: kept, and counted
    eos = Preference("q", " four", " four<eos>")
    assert encode(byte_level(), eos) == Dropped(EQUAL_TOKENISED)
    cut = {"max_length": 8, "truncation": "truncate_completion"}
    assert encode(byte_level(), Preference("1234", "1234567", "123456"), **cut) == Dropped(EQUAL_CUT)
    assert isinstance(encode(byte_level(), Preference("1234", "1234567", "1234567"), **cut), Fitted)


def test_comparisons_that_a_cut_makes_equal_are_left_out() -> None:
    row = Ranking("12", ["1234", "1235", "6"], comparisons=[(0, 1), (0, 2), (1, 2)])
    found = encode(byte_level(), row, max_length=5, truncation="truncate_completion")
    assert isinstance(found, Fitted)
    assert (list(found.kept), found.prompt.comparisons, found.remarks) == ([1, 2], [(0, 1), (0, 1)], (SOME_EQUAL,))


def test_characters_that_the_tokenizer_does_not_know_are_counted() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE({"?": 0, "#": 1, "a": 2, "b": 3}, [], unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?", eos_token="#")
    assert encode(tokenizer, Preference("ab", "a", "ab")).remarks == ()
    assert encode(tokenizer, Preference("ab", "a", "aé")).remarks == (WITH_UNKNOWN,)
