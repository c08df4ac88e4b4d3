"""Made chat templates, conversations, and what becomes of these."""

from __future__ import annotations

from typing import Any

from lit_dpo.data.encode import PromptEncoder
from lit_dpo.data.formats import Preference, Ranking
from lit_dpo.data.truncation import Dropped, Fitted
from toy_tokenizers import byte_level

TURN = "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}"
HEADER = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"


def template(turn: str = TURN, header: str = HEADER, before: str = "") -> Any:
    return byte_level(chat_template=before + "{% for m in messages %}" + turn + "{% endfor %}" + header)


def user(text: str = "What is the answer?") -> dict:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict:
    return {"role": "assistant", "content": text, **more}


def pair(*prompt: dict, chosen: dict | list | None = None, **more: Any) -> Preference:
    chosen = chosen or said("four")
    chosen = chosen if isinstance(chosen, list) else [chosen]
    return Preference(list(prompt) or [user()], chosen, [said("five")], **more)


def encode(tokenizer: Any, row: Preference | Ranking, **options: Any) -> Fitted | Dropped:
    (found,) = PromptEncoder(tokenizer, **options).encode([row])
    return found


def decoded(tokenizer: Any, row: Preference | Ranking) -> list[str]:
    found = encode(tokenizer, row)
    assert isinstance(found, Fitted), found
    return [tokenizer.decode(ids) for ids in (found.prompt.prompt, *found.prompt.completions)]


def refusal(tokenizer: Any, row: Preference | Ranking) -> str:
    found = encode(tokenizer, row)
    assert isinstance(found, Dropped), decoded(tokenizer, row)
    assert found.fatal
    return found.reason
