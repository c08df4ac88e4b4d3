"""Laws of encoding, tried on what nobody thought of: real tokenizers, every kind of chat template, odd texts."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lit_dpo.data.encode import PromptEncoder
from lit_dpo.data.formats import Preference
from lit_dpo.data.rendering import EQUAL_RENDERED, WITHOUT_HEADER
from lit_dpo.data.truncation import EQUAL_TOKENISED, Dropped, Fitted
from toy_tokenizers import byte_level, sentencepiece_like

quick = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck], database=None)

# where a tokenizer comes without a configuration, what ends a text
REAL = {
    "gpt-neox-20b": "<|endoftext|>",
    "gpt2-50257": "<|endoftext|>",
    "minimind-6400": None,
    "oasst-test": "<|endoftext|>",
    "stories260K": None,
    "storybyte-2048": "<|endoftext|>",
    "storybyte-nano-kd": None,
    "torchtune-2000": "<eos>",
    "torchtune-gemma-cropped": "<eos>",  # puts `<bos>` before a text by itself
    "torchtune-tiny-bpe": "<|endoftext|>",
}
OWN = {
    "byte_level": byte_level,
    "sentencepiece_like": sentencepiece_like,
    "stripping": lambda: sentencepiece_like(strip=True),
    "adds_eos": lambda: sentencepiece_like("<s> $A </s>"),
}


@cache
def tokenizer_of(name: str) -> Any:
    if name in OWN:
        return OWN[name]()
    folder = Path(__file__).parents[3] / "shared/data/tokenizers" / name
    if not folder.is_dir():
        pytest.skip("no folder of shared data next to the repository")
    given = {"eos_token": REAL[name]} if REAL[name] else {}
    return AutoTokenizer.from_pretrained(folder, **given, **({"bos_token": "<bos>"} if "gemma" in name else {}))


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decoded(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def knows(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer itself gives a text back."""
    return decoded(tokenizer, ids(tokenizer, text)) == text


WORDS = st.sampled_from(
    ["duck", "What is", "the answer", "Yes", "no.", "2 + 2", "[1]", '{"a": 1}', "Zoë", "鸭", "🦆", "x"]
)
BLANKS = st.sampled_from(["", " ", "  ", "\n", "\n\n", "\t", " \n"])
TEXTS = st.lists(st.tuples(BLANKS, WORDS), min_size=1, max_size=5).map(lambda parts: "".join(map("".join, parts)))
ENDED = st.tuples(TEXTS, BLANKS).map("".join)


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OWN, *REAL])
@quick
@given(prompt=ENDED, chosen=ENDED, rejected=ENDED)
@example(prompt="a", chosen=" a", rejected="a")
def test_text_has_one_bos_one_end_and_says_what_was_given(name: str, prompt: str, chosen: str, rejected: str) -> None:
    tokenizer = tokenizer_of(name)
    (found,) = PromptEncoder(tokenizer, max_length=None).encode([Preference(prompt, chosen, rejected)])
    if isinstance(found, Dropped):
        assert found.reason == EQUAL_TOKENISED or "encodes to no token" in found.reason
        return
    one, bos, eos = found.prompt, tokenizer.bos_token_id, tokenizer.eos_token_id
    start = one.prompt[: len(one.prompt) - len(ids(tokenizer, prompt))]
    assert one.prompt == start + ids(tokenizer, prompt)
    assert start in ([], [bos])
    for tokens, text in zip(one.completions, (chosen, rejected), strict=True):
        assert tokens[-1] == eos
        assert len(tokens) > 1
        assert (one.prompt[len(start) :] + tokens).count(eos) == 1
        assert bos == eos or bos not in tokens
        if knows(tokenizer, prompt + text) and knows(tokenizer, prompt):
            assert decoded(tokenizer, one.prompt[len(start) :] + tokens[:-1]) == prompt + text


# --- conversations ----------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A made template: one of each combination that 122 real ones have, and more."""

    bos: bool
    strips: bool
    system: str
    header: str
    end: str

    @property
    def text(self) -> str:
        content = "m['content'].strip()" if self.strips else "m['content']"
        refuses = "{{ raise_exception('no system, please') }}" if self.system == "refused" else ""
        dropped = "{% elif m['role'] == 'system' %}" + refuses if self.system != "kept" else ""
        turn = "{{ '<|' + m['role'] + '|>' + " + content + " }}" + self.end
        header = {"plain": "<|assistant|>", "thinks": "<|assistant|><think>\n", "ends": "<|assistant|>", "rewrites": ""}
        after = "{{ eos_token }}" if self.header == "ends" else ""
        before = "{{ messages | length }}" if self.header == "rewrites" else ""
        return (
            ("{{ bos_token }}" if self.bos else "")
            + before
            + "{% for m in messages %}{% if false %}"
            + dropped
            + "{% else %}"
            + turn
            + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '"
            + header[self.header].replace("\n", "\\n")
            + "' }}{% else %}"
            + after
            + "{% endif %}"
        )


ENDS = ["<|end|>\n", "\n{{ eos_token }}", "{{ eos_token }}\n", "<|end|>\n{{ eos_token }}", "\n", " ", "<|user|>", ""]
ENDS += ["{{ eos_token }}\\n\\n"]  # as one real template has it, with backslashes
KINDS = [
    Kind(*one)
    for one in product(
        (True, False), (True, False), ("kept", "dropped", "refused"), ("plain", "thinks", "ends", "rewrites"), ENDS
    )
]
TURNS = st.lists(st.tuples(ENDED, ENDED), max_size=2)
NAMED = ("rewrites history", "after the EOS", "no system, please", "loses the text of a message of `system`")


def test_every_kind_of_template_trains_or_is_refused_by_name() -> None:
    """All combinations, each with a system's turn and without: which ones are refused, and why."""
    turns = [("user", "What is\n"), ("assistant", "Yes "), ("user", " x")]
    asked = [{"role": role, "content": text} for role, text in turns]
    sides = (" duck 🦆", "Zoë \n")
    preference = Preference(asked, *([{"role": "assistant", "content": text}] for text in sides))
    for kind, system in product(KINDS, ("", "Be brief.")):
        tokenizer = _with(tokenizer_of("byte_level"), kind)
        prompt = [{"role": "system", "content": system}, *asked] if system else asked
        (found,) = PromptEncoder(tokenizer, max_length=None).encode([preference._replace(prompt=prompt)])
        refused = {
            "no system, please": bool(system) and kind.system == "refused",
            "rewrites history": kind.header == "rewrites",
            "after the EOS": kind.end.endswith("\\n") and kind.header != "ends",
            "loses the text of a message of `system`": bool(system) and kind.system == "dropped",
        }
        reasons = [words for words, holds in refused.items() if holds]
        if not reasons:
            assert isinstance(found, Fitted), (kind, found)
            assert found.remarks == ((WITHOUT_HEADER,) if kind.header == "thinks" else ())
            _check(tokenizer, kind, found, prompt, sides)
        else:
            assert isinstance(found, Dropped)
            assert any(words in found.reason for words in reasons), (kind, found)


@pytest.mark.parametrize("name", [*OWN, "minimind-6400", "gpt2-50257", "stories260K", "torchtune-tiny-bpe"])
@settings(quick, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    system=st.sampled_from(["", "Be brief."]),
    turns=TURNS,
    asked=ENDED,
    sides=st.tuples(ENDED, ENDED),
)
def test_conversations_have_one_bos_one_end_and_say_what_was_given(
    name: str, kind: Kind, system: str, turns: list, asked: str, sides: tuple[str, str]
) -> None:
    tokenizer = _with(tokenizer_of(name), kind)
    prompt = [{"role": "system", "content": system}] if system else []
    prompt += [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    prompt.append({"role": "user", "content": asked})
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in sides)
    (found,) = PromptEncoder(tokenizer, max_length=None).encode([Preference(prompt, chosen, rejected)])
    if isinstance(found, Dropped):
        assert found.reason in (EQUAL_RENDERED, EQUAL_TOKENISED) or any(words in found.reason for words in NAMED), found
        return
    assert not (system and kind.system != "kept")
    assert kind.header != "rewrites"
    _check(tokenizer, kind, found, prompt, sides)


@cache
def _with(tokenizer: Any, kind: Kind) -> Any:
    import copy

    found = copy.copy(tokenizer)
    found.chat_template = kind.text
    return found


def _check(tokenizer: Any, kind: Kind, found: Fitted, prompt: list[dict], sides: tuple[str, str]) -> None:
    one, bos, eos = found.prompt, tokenizer.bos_token_id, tokenizer.eos_token_id
    special = {
        *tokenizer.all_special_ids,
        *(key for key, token in tokenizer.added_tokens_decoder.items() if token.special),
    }
    writes_bos = kind.bos and bos is not None
    if bos is not None and bos not in (eos, *ids(tokenizer, "<|user|><|assistant|>")):
        assert (one.prompt.count(bos), one.prompt[:1] == [bos]) == (writes_bos, writes_bos)
    start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    for tokens, text in zip(one.completions, sides, strict=True):
        assert tokens
        assert bos in (None, eos) or bos not in tokens
        whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": text}], tokenize=False)
        end = next((n for n in range(len(tokens), 0, -1) if decoded(tokenizer, tokens[n - 1 :]).strip()), 0)
        assert tokens[end - 1] in special, decoded(tokenizer, tokens)
        assert tokens.count(eos) <= 1 or kind.header == "ends"
        if whole.startswith(start):
            assert one.prompt == ids(tokenizer, start)
        given = whole if whole.rstrip().endswith(tuple(map(str, _written(tokenizer)))) else whole + tokenizer.eos_token
        if knows(tokenizer, whole):
            assert decoded(tokenizer, one.prompt + tokens) == given
            assert text.strip() in decoded(tokenizer, tokens)


def _written(tokenizer: Any) -> list[str]:
    return [
        *tokenizer.all_special_tokens,
        *(one.content for one in tokenizer.added_tokens_decoder.values() if one.special),
    ]
