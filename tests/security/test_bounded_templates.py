"""A chat template is a stranger's program: it renders as in transformers, or ends soon and says why."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from limits import bounded

from lit_dpo.data import bounds
from lit_dpo.data.bounds import OutOfBounds
from lit_dpo.data.sandbox import BoundedSandbox, bound
from lit_dpo.errors import DataError
from ranks import run
from training import data

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{'<|' + m['role'] + '|>\n' + m['content'] + '<|end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "alternating": "{{ bos_token }}\n{%- for m in messages %}\n  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ nothing.at.all }}{%- endif %}\n  {{- '[' ~ m.role|upper ~ '] ' ~ m.content | trim }}\n{%- endfor %}\n",
    "thinking": "{%- set ns = namespace(last=0, done=false) %}{%- for m in messages[::-1] %}"
    "{%- if not ns.done and m.role == 'user' %}{%- set ns.done = true %}"
    "{%- set ns.last = messages|length - loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if 'e' in m.content %}{%- set c = m.content.split('e')[-1].lstrip('\n') %}"
    "{%- else %}{%- set c = m.content %}{%- endif %}{{- c }}{{ ns.last }}{%- endfor %}",
    "tools": "{%- macro kind(t) -%}{%- if t is mapping -%}{{ t.type }}{% for k, v in t.items() %}{{ k }}{{ kind(v) }}"
    "{% endfor %}{%- endif -%}{%- endmacro -%}{% for t in tools or [{'type': 'a', 'b': {'type': 'c'}}] %}"
    "{{ kind(t) }}{{ t|tojson(indent=2) }}{% endfor %}{{ {'a': [1, 2]}|tojson }}"
    "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
    "blocks": "{% set x %}a{% for i in [1, 2] %}{{ i }}{% endfor %}{% endset %}{{ x }}"
    "{% filter upper %}b{{ x }}{% endfilter %}",
}
LOOPS = {
    "rounds": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "conditions": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "macros": "{% macro a(n) %}{% if n %}{{ a(n-1) }}{{ a(n-1) }}{% endif %}{% endmacro %}{{ a(60) }}",
    "blocks": "".join(
        f"{{% block b{n} %}}{{{{ self.b{n + 1}() }}}}{{{{ self.b{n + 1}() }}}}{{% endblock %}}" for n in range(40)
    )
    + "{% block b40 %}{% endblock %}",
}
GROWS = "{%% set n = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set n.x = %s %%}{%% endfor %%}{{ n.x }}"
BOMBS = {
    "range": "{% for i in range(10**12) %}{% endfor %}",
    "times": "{{ 'a' * 10**10 }}",
    "constant": "{{ 'a' * 10000000000 }}",
    "list": "{{ [0] * 10000000000 }}",
    "filter": "{{ 'a'|center(10000000000) }}",
    "method": "{{ 'a'.ljust(10000000000) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "star": "{{ '%*d' % (10000000000, 1) }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "format filter": "{{ '%10000000000d'|format(1) }}",
    "concat": GROWS % ("'aaaaaaaa'", "n.x ~ n.x"),
    "plus": GROWS % ("'aaaaaaaa'", "n.x + n.x"),
    "replace": GROWS % ("'aa'", "n.x|replace('a', 'aaaaaaaaaa')"),
    "replace method": GROWS % ("'aa'", "n.x.replace('a', 'aaaaaaaaaa')"),
    "join": "{{ ('a' * 1000000).join(range(9999)|map('string')|list) }}",
    "join filter": "{{ range(9999)|map('string')|join('a' * 1000000) }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "product": GROWS % ("9", "n.x * n.x"),
    "laughs": GROWS % ("['a']", "[n.x, n.x]"),
    "laughing objects": GROWS % ("['a']", "{'a': n.x, 'b': n.x}") + "{{ n.x|tojson }}",
    "sum": GROWS % ("['a']", "[n.x, n.x]|sum(start=[])"),
    "indent": "{{ ('a\n' * 1000000)|indent(1000000) }}",
    "json": "{{ (range(99999)|list)|tojson(indent=1000000) }}",
    "text": "{% for i in range(99999) %}" + "x" * 100000 + "{% endfor %}",
    "block": "{% for i in range(99999) %}{% set x %}" + "x" * 100000 + "{% endset %}{% endfor %}",
    "bytes": "{{ (1).to_bytes(10000000000) }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(1000000) }}",
    "table": "{{ ('a' * 1000000).translate({97: 'x' * 1000000}) }}",
    "time": "{{ strftime_now('%1000000000Y') }}",
    "keeps": "{% set n = namespace(x=[]) %}{% for i in range(999) %}{% set n.x = n.x + ['a' * 999999] %}{% endfor %}",
    "html": "{% autoescape true %}{{ '&' * 1000000 * 90 }}{% endautoescape %}",
    "deep": "{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}",
    "nested": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "long": "{{ 1 }}" * 1000000,
}
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as o %}{{ o.system }}",
    "{{ messages.append(1) }}",
)


@pytest.fixture
def soon(monkeypatch):
    """The same limits, nearer, so that the suite does not wait for them."""
    monkeypatch.setattr(bounds, "SECONDS", 0.5)
    monkeypatch.setattr(bounds, "STEPS", 100_000)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _rendered(template: str, kind: type[Any] = BoundedSandbox, **given: Any) -> str:
    made = kind(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    made.globals["strftime_now"] = strftime_now
    given = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True, "tools": None, **given}
    return made.from_string(template).render(messages=MESSAGES, **given)


@pytest.mark.parametrize("name", [*LOOPS, *BOMBS])
def test_what_would_not_end_or_fill_the_memory_is_refused(name, soon):
    with bounded(), pytest.raises(OutOfBounds, match="the chat template "):
        _rendered({**LOOPS, **BOMBS}[name])


@pytest.mark.parametrize("template", ESCAPES)
def test_what_leaves_the_sandbox_is_refused(template):
    with pytest.raises((TemplateError, TypeError)):
        _rendered(template)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_to_the_letter_as_without_bounds(name):
    """What the real ones write; and operators, joins, literals and calls, which are counted, at the end."""
    more = (
        "{{ 'a' ~ 1 ~ none ~ ['x', {'k': (1, 2)}] }}{{ [1, 2] + [3] }}{{ '%s-%d' % ('a', 3) }}{{ 2 ** 5 * 3 % 7 }}"
        "{% for i in range(3) if i != 1 %}{{ loop.index ~ i }}{% else %}none{% endfor %}{{ ['a', 'b']|join(', ') }}"
        "{% macro m(x, y='z') %}{{ x }}{{ caller() if caller }}{% endmacro %}{{ m('q') }}{% call m(1) %}!{% endcall %}"
        "{% set n = namespace(a=[]) %}{% for i in 'abc' %}{% set n.a = n.a + [i] %}{% endfor %}{{ n.a|tojson }}"
        "{% set (x, y) = (1, 2) %}{{ x }}{{ y }}{{ 'a-b'.split('-')|reverse|list }}{{ {'b': 1}|dictsort }}"
        "{{ 'x'|indent(2, true) }}{{ 'aXa'.replace('X', 'YY') }}{{ '{:>4}'.format('a') }}"
        "{{ messages|map(attribute='role')|join }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}"
    )
    wanted = [_outcome(text, ImmutableSandboxedEnvironment) for text in (TEMPLATES[name], TEMPLATES[name] + more)]
    assert [_outcome(text, BoundedSandbox) for text in (TEMPLATES[name], TEMPLATES[name] + more)] == wanted


def _outcome(template: str, kind: type[Any]) -> str:
    try:
        return _rendered(template, kind)
    except TemplateError as error:
        return f"{type(error).__name__}: {error}"


def test_transformers_renders_within_the_bounds_in_data_too(tiny_model, tmp_path, soon):
    """In this process, and in one that is forked: nothing is a signal or a thread."""
    (tmp_path / "bomb.jinja").write_text("{% for m in messages %}{{ 'a' * 10**10 }}{% endfor %}")
    rows = [{"chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "no"}]}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = data(tmp_path / "rows.jsonl", tokenizer=str(tiny_model), chat_template=str(tmp_path / "bomb.jinja"))
    with bounded(), pytest.raises(DataError, match=r"not rendered further: the chat template makes texts .*--data\."):
        module.setup("fit")
    (said,) = run(_in_a_worker, 1, folder=tmp_path / "worker")
    assert "makes texts" in said


def _in_a_worker() -> str:
    bound()
    return _outcome("{{ 'a' * 10**10 }}", BoundedSandbox)
