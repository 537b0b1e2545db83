"""ChatTemplate: the dialect of Hugging Face, plain messages, and templates that mean harm."""

from __future__ import annotations

import re
import threading
from collections import UserDict
from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from inferneo_core.chat import ChatTemplate
from inferneo_core.errors import ChatTemplateError, InvalidPrompt

USER = [{"role": "user", "content": "Hi <b>&é😀"}]
CHAT = [
    {"role": "system", "content": " Be kind. "},
    *USER,
    {"role": "assistant", "content": "Hello!\nHow are you?"},
    {"role": "user", "content": "Fine"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def render(source: str | None, messages: Any = USER, **options: Any) -> str:
    return ChatTemplate(source, SPECIAL).render(messages, **options)


CHATML = """{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
    {% set system_message = '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' %}
{% else %}{% set loop_messages = messages %}{% set system_message = '' %}{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if loop.index0 == 0 %}{% set content = system_message + message['content'] %}
    {% else %}{% set content = message['content'] %}{% endif %}
    {% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}{{ ' '  + content | trim + ' ' + eos_token }}{% endif %}
{% endfor %}"""
DIALECT = """{%- macro part(message, names=['user', 'assistant']) -%}
    {%- if message.role in names %}[{{ message.role | upper }}] {% endif %}{{ message.content | tojson }}
{%- endmacro -%}
{%- set ns = namespace(seen=0, last='') -%}
{%- for message in messages if message.role != 'system' -%}
    {%- if loop.index > 2 %}{% break %}{% endif %}
    {%- set ns.seen = ns.seen + 1 %}{% set ns.last = message.content.split('\\n')[-1] -%}
    {{ part(message) }}{% generation %}|{% endgeneration %}{{ "%02d" % loop.index }}{{ '{:>4}'.format(loop.index) }}
{% endfor -%}
{{ ns.seen }} {{ ns.last ~ '!' }} {{ messages | map(attribute='role') | unique | join(', ') }}
{{ {'a': [1, 2.5, none, true], 'é': '<&>'} | tojson(indent=2) }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ messages[-1].get('name', 'nobody') }}
{% for key, value in messages[0].items() | sort %}{{ key }}={{ value.strip().title() }};{% endfor %}
{% if tools is none and documents is none and undefined_name is not defined %}none{% endif %}
{{ (messages[::-1] | first).content.replace('F', 'f').startswith('f') }} {{ 'ab' * 3 }} {{ dict(x=1).x + 2 ** 3 }}
{% macro quoted() %}"{{ caller() }}"{% endmacro -%}
{% set body %}{% call quoted() %}a\nb{% endcall %}{% endset %}{{ body | trim | indent(2, true) }}"""


@pytest.mark.parametrize("source", [CHATML, LLAMA2, DIALECT], ids=["chatml", "llama2", "dialect"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_template_renders_as_hugging_face_does(source: str, add_generation_prompt: bool) -> None:
    variables: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, **SPECIAL}
    expected = render_jinja_template([CHAT], chat_template=source, **variables)[0]
    assert render(source, CHAT, add_generation_prompt=add_generation_prompt) == expected[0]


def test_strftime_now_is_todays_date() -> None:
    before = datetime.now().strftime("%d %b %Y")
    assert render("{{ strftime_now('%d %b %Y') }}") in {before, datetime.now().strftime("%d %b %Y")}


def test_long_chat_stays_within_the_limits() -> None:
    messages = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "yes " * 50}] * 1000
    assert render(CHATML, messages).count("<|im_start|>") == 2002


def test_content_parts_reach_the_template_as_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "one\ntwo"


def test_values_of_a_callers_class_reach_the_template_as_plain_json() -> None:
    class Text(str):
        def strip(self, *args: Any) -> str:
            raise AssertionError("a caller's method ran inside a template")

    message = UserDict(role="user", content=Text(" x "))
    assert render("{{ messages[0].content.strip() }}", [message]) == "x"


def test_tool_calls_may_stand_for_content() -> None:
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}]
    assert render("{{ messages[0].tool_calls[0] | tojson }}", messages) == '{"name": "f", "arguments": {"x": 1}}'


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        ("hi", "a str"),
        ({"role": "user"}, "a dict"),
        (5, "a int"),
        (["hi"], r"messages\[0\] is a str"),
        ([{"content": "x"}], r"messages\[0\] has no role"),
        ([{"role": "", "content": "x"}], "has no role"),
        ([{"role": 3, "content": "x"}], "has no role"),
        ([*USER, {"role": "user"}], r"messages\[1\]\['content'\] is missing"),
        ([{"role": "user", "content": None}], "a NoneType"),
        ([{"role": "user", "content": 5}], "a int"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], r"\['content'\]\[0\] is not"),
        ([{"role": "user", "content": ["x"]}], "text only"),
        ([{"role": "user", "content": "x", "extra": object()}], r"\['extra'\] is a object"),
        ([{"role": "user", "content": "x", "extra": {1: 2}}], "the key 1"),
        ([{"role": "user", "content": "x", 1: 2}], "the key 1"),
        ([{"role": "user", "content": "x", "extra": b"bytes"}], "plain JSON"),
    ],
)
def test_messages_of_another_form_are_refused(messages: Any, words: str) -> None:
    with pytest.raises(InvalidPrompt, match=words):
        render(CHATML, messages)


def test_messages_that_nest_too_deeply_are_refused() -> None:
    deep: list[Any] = []
    deep.append(deep)
    with pytest.raises(InvalidPrompt, match="32 levels"):
        render(CHATML, [{"role": "user", "content": "x", "extra": deep}])


NESTED = "{% for a in range(100000) %}{% for b in range(100000) %}BODY{% endfor %}{% endfor %}"
GROW = "{% set n = namespace(x=START, y=START) %}{% for i in range(60) %}{% set n.x = STEP %}{% endfor %}"
LAUGHS = (
    "{% set n = namespace(x=(1,), y=(1,)) %}{% for i in range(60) %}"
    "{% set n.x = (n.x, n.x) %}{% set n.y = (n.y, n.y) %}{% endfor %}"
)
BIG = "{% set x = 'x' * 1000000 %}"


def grow(start: str, step: str) -> str:
    return GROW.replace("START", start).replace("STEP", step)


ENDLESS = {
    "nested loops": NESTED.replace("BODY", ""),
    "nested loops that print": NESTED.replace("BODY", "{{ b }}"),
    "a filtered loop": NESTED.replace("range(100000) %}BODY", "range(100000) if false %}"),
    "a wide body": NESTED.replace("BODY", "{% if x %}{% endif %}" * 3000),
    "a wide macro": "{% macro f() %}"
    + "{% if x %}{% endif %}" * 3000
    + "{% endmacro %}"
    + NESTED.replace("BODY", "{{ f() }}"),
    "a call block": "{% macro f() %}{{ caller() }}{% endmacro %}"
    + NESTED.replace("BODY", "{% call f() %}y{% endcall %}"),
    "macros that double": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(80) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": "{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}",
    "a block in itself": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "searching": "{% set l = range(100000) | list %}{% for i in l %}{% if -1 in l %}{% endif %}{% endfor %}",
    "a searching filter": "{{ range(100000) | select('in', range(100000) | list) | list }}",
    "slices": "{% set l = range(100000) | list %}{% for i in l %}{% set m = l[1:] %}{% endfor %}",
    "slices of text": BIG + "{% for i in range(100000) %}{% set y = x[1:] %}{% endfor %}",
    "a power": "{{ 10 ** (10 ** 8) }}",
    "a growing integer": grow("3", "n.x * n.x") + "{{ n.x }}",
    "rounding": "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "comparing": LAUGHS + "{{ n.x == n.y }}",
    "a test that compares": LAUGHS + "{{ n.x is eq(n.y) }}",
    "noticing change": LAUGHS + "{% for i in (1, 2) %}{{ loop.changed(n.x if i == 1 else n.y) }}{% endfor %}",
    "hashing a key": LAUGHS + "{{ {n.x: 1} }}",
    "hashing to look up": LAUGHS + "{{ {}.get(n.x) }}",
    "uniqueness": LAUGHS + "{{ [n.x] | unique }}",
}
GIANT = {
    "repeated text": "{{ 'x' * 10 ** 9 }}",
    "repeated text, turned": "{{ 10 ** 9 * 'x' }}",
    "a repeated list": "{% set l = ['x'] * 10 ** 9 %}",
    "a giant range": "{% for a in range(10 ** 9) %}x{% endfor %}",
    "literal text in a loop": "{% for i in range(100000) %}" + "y" * 10000 + "{% endfor %}",
    "literal text in a macro": "{% macro f() %}{% for i in range(100000) %}"
    + "y" * 9999
    + "{% endfor %}{% endmacro %}{{ f() }}",
    "captured text": "{% set x %}{% for i in range(100000) %}" + "y" * 10000 + "{% endfor %}{% endset %}",
    "doubling by +": grow("'x'", "n.x + n.x"),
    "doubling by ~": grow("'x'", "n.x ~ n.x"),
    "doubling a list": grow("['x']", "n.x + n.x"),
    "doubling by replace": grow("'x'", "n.x.replace('x', 'xx')"),
    "doubling by format": grow("'x'", "'%s%s' % (n.x, n.x)"),
    "nested lists": LAUGHS + "{{ n.x }}",
    "nested lists as JSON": LAUGHS + "{{ n.x | tojson }}",
    "nested lists as text": LAUGHS + "{{ (n.x | string) | length }}",
    "nested lists joined": LAUGHS + "{{ 'a' ~ n.x }}",
    "center": "{{ 'x'.center(10 ** 9) }}",
    "center, the filter": "{{ 'x' | center(10 ** 9) }}",
    "ljust": "{{ 'x'.ljust(10 ** 9) }}",
    "zfill": "{{ 'x'.zfill(10 ** 9) }}",
    "indent": "{{ 'x' | indent(10 ** 9, true) }}",
    "a width": "{{ '%1000000000d' % 1 }}",
    "a width from a value": "{{ '%*d' % (10 ** 9, 1) }}",
    "a width, the filter": "{{ '%1000000000d' | format(1) }}",
    "a width, the method": "{{ '{:1000000000}'.format(1) }}",
    "a width, format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "many fields": BIG + "{{ ('%s' * 9999) % ((x,) * 9999) }}",
    "replace": BIG + "{{ x.replace('x', x) }}",
    "replace nothing": BIG + "{{ x.replace('', x) }}",
    "replace, the filter": BIG + "{{ x | replace('x', x) }}",
    "replace in a map": BIG + "{{ range(100000) | map('replace', '1', x) | list }}",
    "join": BIG + "{{ x.join(x) }}",
    "join, the filter": BIG + "{{ x | join(x) }}",
    "one text many times": BIG + "{{ ([x] * 100000) | join }}",
    "indented JSON": "{{ [1] | tojson(indent=10 ** 9) }}",
    "JSON indented deep": grow("[]", "[n.x, n.x]").replace("60", "12") + "{{ n.x | tojson(indent=30000) }}",
    "a budget earned back": "{{ [1] | map('<tick>', -10 ** 9, -10 ** 9) | list }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_template_that_runs_on_is_stopped(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="was stopped"):
        render(source)


@pytest.mark.parametrize("source", GIANT.values(), ids=GIANT)
def test_template_that_makes_too_much_is_stopped(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="was stopped"):
        render(source)


def test_stopping_needs_no_thread_and_works_in_any() -> None:
    before = threading.active_count()
    errors: list[str] = []

    def run() -> None:
        try:
            render(ENDLESS["a filtered loop"])
        except ChatTemplateError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    assert threading.active_count() == before + 1
    thread.join()
    assert threading.active_count() == before
    assert len(errors) == 1


def test_limits_do_not_depend_on_what_ran_before() -> None:
    template = ChatTemplate("{% for a in range(90000) %}{{ a }}{% endfor %}", {})
    assert [len(template.render(USER)) for _ in range(4)] == [438_890] * 4


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ messages.__class__ }}",
        "{{ (messages | attr('__class__')).x }}",
        "{{ [''] | map(attribute='__class__') | map(attribute='__mro__') | list }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ 'x'.encode() }}",
        "{{ ('x' | attr('expandtabs'))(10 ** 9) }}",
        "{{ ((['x'] | map(attribute='encode')) | first)() }}",
        "{{ (5).to_bytes(10 ** 9, 'big') }}",
        "{{ messages() }}",
        "{{ {}[(1, 2)] }}",
        "{{ '{:{}}'.format(1, 10 ** 9) }}",
        "{{ strftime_now('%c' * 1000) }}",
    ],
)
def test_template_that_reaches_too_far_is_stopped(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="reached for what it may not"):
        render(source)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no system role, please') }}", "refused the messages: no system role, please"),
        ("{{ a.b.c }}", "'a' is undefined"),
        ("{{ 'a' + 1 }}", "failed: TypeError"),
        ("{{ 1 / 0 }}", "failed: ZeroDivisionError"),
        ("{% for %}", r"does not parse.*line 1"),
        ("{% if x %}", "does not parse"),
        ("{{ x | nosuchfilter }}", "No filter named 'nosuchfilter'"),
        ("{{ lipsum(n=1000) }}", "'lipsum' is undefined"),
        ("{% include 'x' %}", "failed: TypeError: no loader"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "does not compile: RecursionError"),
        ("{% for x in y %}" * 60 + "{% endfor %}" * 60, "does not compile: SyntaxError"),
        ("{{ " + "9" * 9999 + " }}", "does not compile: ValueError"),
        ("x" * (2**18 + 1), "262145 characters; at most 262144"),
    ],
)
def test_template_that_cannot_be_used_is_a_typed_error(source: str | None, words: str) -> None:
    with pytest.raises(ChatTemplateError, match=re.compile(words)):
        render(source)
