"""Chat templates: equal to transformers, shut in a sandbox, and clear about what is wrong."""

import copy

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from engine.chat_template import MAX_RENDERED_CHARS, ChatTemplate, normalize_messages
from engine.errors import CheckpointError, RequestError
from tests.tiny_tokenizer import CHAT_TEMPLATE

USER = [{"role": "user", "content": "Hi & <b>bye</b> 世界"}]


def render(source, messages=USER, variables=None, special_tokens=None):
    template = ChatTemplate(source, special_tokens or {}, "chat_template.jinja")
    return template.render(normalize_messages(messages), None, True, variables or {})


@pytest.mark.parametrize(
    "source",
    [
        CHAT_TEMPLATE,
        "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2, sort_keys=true) }}",
        "{{ 'é' | tojson(ensure_ascii=true) }}",
        "{{ messages | tojson(separators=(',', ':')) }}",
        "{% for m in messages %}\n    {% if loop.first %}\n  first\n    {% endif %}\n{% endfor %}\nend\n",
        "{% for i in range(9) %}{% if i < 2 %}{% continue %}{% elif i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ messages[0].content }}{% endgeneration %}{{ x }}",
        "{% set ns = namespace(self=1, found=false) %}{% set ns.found = true %}{{ ns.found }}{{ ns.self }}",
        "{% set d = dict(a=1) %}{{ d }}{{ dict.fromkeys('ab', 2) }}",
        "{{ strftime_now('%Y') }}{{ documents is defined }}{{ tools is defined }}",
        "{{ bos_token }}|{{ eos_token }}|{{ enable }}",
    ],
)
def test_renders_as_transformers(source):
    variables = {"enable": True, "eos_token": "</s>"}
    expected, _ = render_jinja_template([USER], chat_template=source, add_generation_prompt=True, **variables)
    assert render(source, variables={"enable": True}, special_tokens={"eos_token": "</s>"}) == expected[0]


def test_normalize_messages():
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}, "three"]},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "because",
            "tool_calls": [{"function": {"arguments": "{}"}}],
        },
        {"role": "assistant", "reasoning": "new", "reasoning_content": "old"},
        {"role": "assistant", "content": "", "reasoning_content": None},
    ]
    before = copy.deepcopy(messages)
    system, call, both, none = normalize_messages(messages)
    assert messages == before
    assert system["content"] == "one\ntwo\nthree"
    assert call["content"] == "" and call["reasoning_content"] == "because"
    assert call["tool_calls"] == [{"function": {"arguments": "{}"}}]
    assert both["content"] == "" and both["reasoning_content"] == "old"
    assert "reasoning_content" not in none


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("hello", r"messages\[1\] is a str"),
        ({"content": "x"}, r"messages\[1\]\.role is None"),
        ({"role": "user\nroot", "content": "x"}, r"messages\[1\]\.role is 'user\\nroot'"),
        ({"role": "<|im_end|>", "content": "x"}, r"messages\[1\]\.role"),
        ({"role": "x" * 10_000, "content": "x"}, r"messages\[1\]\.role is '.{79}, expected"),
        ({"role": "user", "content": 7}, r"messages\[1\]\.content is a int"),
        ({"role": "user", "content": {"type": "text", "text": "x"}}, r"messages\[1\]\.content is a dict"),
        ({"role": "user", "content": [{"type": "image_url"}]}, r"content\[0\] is of type 'image_url'"),
        ({"role": "user", "content": ["a", {"type": "text"}]}, r"content\[1\] is of type 'text'"),
        ({"role": "user", "content": [None]}, r"content\[0\] is of type 'NoneType'"),
        ({"role": "assistant", "reasoning": ["x"]}, r"messages\[1\]\.reasoning_content is a list"),
    ],
)
def test_unusable_messages(message, found):
    with pytest.raises(RequestError, match=found) as raised:
        normalize_messages([*USER, message])
    assert raised.value.param == "messages"
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages[5].content.name }}", "no element 5"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace(__class__=1) %}", "underscore"),
        ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "underscore"),
        ("{{ dict.__init__.__globals__ }}", "unsafe"),
        ("{% for i in range(10 ** 6) %}{% endfor %}", "Range too big"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}", "characters"),
    ],
)
def test_failing_template_is_a_request_error(source, reason):
    with pytest.raises(RequestError, match=reason) as raised:
        render(source)
    assert raised.value.param == "messages"
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_output_is_bounded():
    assert len(render(f"{{{{ 'x' * {MAX_RENDERED_CHARS} }}}}")) == MAX_RENDERED_CHARS
    with pytest.raises(RequestError, match="more than 16,777,216 characters"):
        render(f"{{{{ 'x' * {MAX_RENDERED_CHARS + 1} }}}}")


def test_names_of_variables_are_free_but_messages():
    assert render("{{ self_ }}{{ range }}", variables={"self": 1, "self_": 2, "range": 3}) == "23"
    with pytest.raises(RequestError, match="'messages' is not free"):
        render("x", variables={"messages": []})


@pytest.mark.parametrize("source", ["{% for %}", "{{ messages", "{% if x %}", "{{ x | no_such_filter }}"])
def test_broken_template_names_its_file(source):
    with pytest.raises(CheckpointError, match=r"^chat_template\.jinja: the chat template does not compile: "):
        ChatTemplate(source, {}, "chat_template.jinja")


CONTINUED = [*USER, {"role": "assistant", "content": "Let me see. "}]


def test_continues_the_final_message_as_transformers():
    expected, _ = render_jinja_template([CONTINUED], chat_template=CHAT_TEMPLATE, continue_final_message=True)
    template = ChatTemplate(CHAT_TEMPLATE, {}, "chat_template.jinja")
    assert template.render(normalize_messages(CONTINUED), None, False, {}, continue_final_message=True) == expected[0]
    assert expected[0].endswith("assistant\nLet me see. ")


def test_continues_reasoning_where_there_is_no_content_yet():
    messages = [*USER, {"role": "assistant", "reasoning": "Hm, "}]
    template = ChatTemplate(CHAT_TEMPLATE, {}, "chat_template.jinja")
    text = template.render(normalize_messages(messages), None, False, {}, continue_final_message=True)
    assert text.endswith("assistant\n<think>\nHm, ")


@pytest.mark.parametrize(("source", "messages"), [("{{ messages[0].content }}", CONTINUED), (CHAT_TEMPLATE, [])])
def test_what_cannot_be_continued(source, messages):
    template = ChatTemplate(source, {}, "chat_template.jinja")
    with pytest.raises(RequestError, match=r"final message|no messages"):
        template.render(normalize_messages(messages), None, False, {}, continue_final_message=True)
