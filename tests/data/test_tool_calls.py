"""Tools, their calls and their results: in the text that is trained, whatever a template wants them to be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chats import TURN, decoded, encode, pair, refusal, template, user

CALL = {"name": "add", "arguments": {"a": 2, "why": 'the "sum"', "deep": [{"b": "zwölf"}], "flag": True}}
WITH_CALLS = (
    "{{ '<|' + m['role'] + '|>' }}{{ m['content'] or '' }}"
    "{% for call in m['tool_calls'] %}{{ '[' + call['function']['name'] }} ARGUMENTS {{ ']' }}{% endfor %}"
    "{{ '<|end|>\n' }}"
)


def calls(arguments: Any, **more: Any) -> dict:
    call = {"id": None, "type": "function", "function": {"name": "add", "arguments": arguments, "strict": None}}
    return {"role": "assistant", "tool_calls": [call], **more}


def with_calls(arguments: str) -> Any:
    return template(WITH_CALLS.replace("ARGUMENTS", arguments))


OBJECT = "{{ call['function']['arguments'] | tojson }}"
JOINED = "{{ 'args: ' + call['function']['arguments'] }}"
PRINTED = "{{ call['function']['arguments'] }}"
PARAMETERS = "{% for key, value in call['function']['arguments'].items() %}{{ key }}={{ value }};{% endfor %}"


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": "Wait."}])
@pytest.mark.parametrize("given", ["object", "text"])
@pytest.mark.parametrize("wanted", [OBJECT, JOINED, PRINTED])
def test_arguments_are_json_for_every_template(content: dict, given: str, wanted: str) -> None:
    """Objects to one that writes JSON itself, JSON to one that joins texts, whatever the row holds."""
    arguments = CALL["arguments"] if given == "object" else json.dumps(CALL["arguments"], ensure_ascii=False)
    chosen = decoded(with_calls(wanted), pair(chosen=calls(arguments, **content)))[1]
    start, _, rest = chosen.partition("[add ")
    assert start == (content.get("content") or "")
    written = rest.removeprefix("args: ").partition(" ]<|end|>")[0]
    assert json.loads(written) == CALL["arguments"]


def test_a_template_that_wants_no_content_with_calls_gets_none() -> None:
    """As DeepSeek-V3's, which writes calls only where there is no content; transformers leaves out what is none."""
    start, loop, rest = WITH_CALLS.partition("{% for")
    turn = (
        start
        + "{% if not m['content'] is defined or m['content'] is none %}"
        + loop
        + rest.replace("{% endfor %}", "{% endfor %}{% endif %}")
    )
    row = pair(chosen=calls({"a": 2}))
    assert decoded(template(turn.replace("ARGUMENTS", OBJECT)), row)[1] == '[add {"a": 2} ]<|end|>\n'


def test_other_ways_to_write_arguments() -> None:
    row = pair(chosen=calls(CALL["arguments"]))
    assert 'why=the "sum";' in decoded(with_calls(PARAMETERS), row)[1]
    twice = "{{ (call['function']['arguments'] | tojson) | tojson }}"
    assert (
        json.loads(json.loads(decoded(with_calls(twice), row)[1].partition("add ")[2].partition(" ]<")[0]))
        == CALL["arguments"]
    )
    padded = decoded(
        with_calls(OBJECT), pair(chosen=calls({"a": 2, "of_another_row": None, "deep": {"x": None, "y": 1}}))
    )
    assert padded[1] == '[add {"a": 2, "deep": {"y": 1}} ]<|end|>\n'


def test_lost_calls_and_arguments_are_refused() -> None:
    row = pair(chosen=calls({"a": 17}))
    assert "loses a tool call of a message of `assistant` in `chosen`" in refusal(
        template(TURN.replace("m['content']", "(m['content'] or 'x')")), row
    )
    assert "arguments of a tool call" in refusal(with_calls("{{ call['function']['arguments'] | length }}"), row)


def test_a_result_of_a_tool_may_be_written_as_json() -> None:
    calls_too = "+ (m['tool_calls'] | tojson if m['tool_calls'] else '') + '<|end|>"
    turn = TURN.replace("m['content']", "(m['content'] | tojson if m['role'] == 'tool' else m['content'])")
    row = pair(user(), calls({"a": 2}), {"role": "tool", "content": '{"sum":\n4}'}, user("So?"))
    assert '"{\\"sum\\":\\n4}"' in decoded(template(turn.replace("+ '<|end|>", calls_too)), row)[0]


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: one.
        b: the other.
    """
    return a + b


def test_every_tool_has_to_be_in_the_prompt() -> None:
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("add", "subtract")]
    row = pair(template={"tools": tools})
    say = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    for given in (tools, [one["function"] for one in tools], [add, tools[1]]):
        prompt = decoded(template(before=say), pair(template={"tools": given}))[0]
        assert all(name in prompt for name in ("add", "subtract"))
    assert "loses a tool in the prompt" in refusal(template(before="{{ tools[0]['function']['name'] }}"), row)
    assert "loses a tool in the prompt" in refusal(
        template(before="{% if tools and false %}{{ tools }}{% endif %}"), row
    )
    assert refusal(template(), row) == "the chat template does not read the row's `tools`"


def test_tools_have_no_nulls_of_other_rows() -> None:
    function = {"name": "add", "parameters": {"properties": {"a": {"type": "number"}, "of_another_row": None}}}
    say = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    prompt = decoded(template(before=say), pair(template={"tools": [{"type": "function", "function": function}]}))[0]
    assert "number" in prompt
    assert "null" not in prompt


def test_documents_have_to_be_in_the_prompt() -> None:
    row = pair(template={"documents": [{"title": "t", "text": "It is 4."}]})
    assert decoded(template(before="{{ documents[0]['text'] }}"), row)[0].startswith("It is 4.<|user|>")
    assert "loses a document in the prompt" in refusal(template(before="{{ documents | length }}"), row)
    everywhere = {"tools": [{"type": "function", "function": {"name": "add"}}]}
    say = "{% if tools and false %}{% endif %}"
    assert "loses a tool in the prompt" in encode(template(before=say), pair(), chat_template_kwargs=everywhere).reason


def test_calls_of_no_known_shape_are_given_as_they_are() -> None:
    """Arguments that are no JSON, and a call that is a text."""
    assert "a, b ]" in decoded(with_calls(PRINTED), pair(chosen=calls("a, b")))[1]
    turn = TURN.replace("m['content']", "(m['content'] or '') + (m['tool_calls'] or []) | join(',')")
    row = pair(chosen={"role": "assistant", "content": "Wait.", "tool_calls": ["add(1, 2)"]})
    assert decoded(template(turn), row)[1].startswith("Wait.")
