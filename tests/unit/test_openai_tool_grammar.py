"""Grammars of tool calls: what they let through is what the parsers read, and nothing else gets through."""

from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from engine.weights.hub import resolve_model
from serve_app.openai.errors import ApiError
from serve_app.openai.parsing.formats import HERMES, QWEN_CODER, ToolFormat
from serve_app.openai.parsing.output import Channel
from serve_app.openai.tool_grammar import tool_grammar
from serve_app.openai.tools import ToolUse
from tests.unit.test_openai_completions import END, TOKENIZER
from tests.unit.test_openai_parsing import CODER, NOW, WEATHER

GUIDE = LLTokenizer(str(resolve_model("demo") / "tokenizer.json"), n_vocab=TOKENIZER.vocab_size, eos_token=END)
WEATHER_SCHEMA: dict[str, Any] = {
    "properties": {
        "city": {"type": "string"},
        "days": {"$ref": "#/$defs/days"},
        "unit": {"type": "string", "enum": ["c", 'f"']},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer"}},
}
SCHEMAS = {"get_weather": WEATHER_SCHEMA, "now": {"type": "object", "properties": {}, "additionalProperties": False}}
CODER_NOW = "<tool_call>\n<function=now>\n</function>\n</tool_call>"


def accepts(
    text: str,
    form: ToolFormat = HERMES,
    schemas: dict[str, Any] = SCHEMAS,
    start: Channel = Channel.CONTENT,
    **fields: Any,
) -> bool:
    """Whether an output can be this text and end there."""
    grammar = tool_grammar(ToolUse(format=form, schemas=schemas, **({"must_call": True} | fields)), start)
    matcher = LLMatcher(GUIDE, LLMatcher.grammar_from_lark(grammar))
    assert not matcher.is_error(), matcher.get_error()
    token_ids = TOKENIZER.encode(text)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def with_arguments(arguments: str) -> str:
    return f'<tool_call>\n{{"name": "get_weather", "arguments": {arguments}}}\n</tool_call>'


def with_parameters(**values: str) -> str:
    written = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items())
    return f"<tool_call>\n<function=get_weather>\n{written}</function>\n</tool_call>"


@pytest.mark.parametrize("text", [WEATHER, NOW, f"\n\n{WEATHER}", f"{WEATHER}\n{NOW}", with_arguments(
    '{"city": "Paris", "days": 3, "unit": "f\\""}')])  # fmt: skip
def test_calls_that_must_be_made(text: str):
    assert accepts(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello",
        f"Well. {NOW}",
        f"{NOW} and more",
        WEATHER.replace("get_weather", "other"),
        WEATHER.removesuffix("</tool_call>"),
        with_arguments("{}"),
        with_arguments('{"city": 7}'),
        with_arguments('{"city": "Paris", "days": "3"}'),
        with_arguments('{"city": "Paris", "unit": "k"}'),
        with_arguments('{"city": "Paris", "more": 1}'),
        with_arguments("[]"),
    ],
)
def test_nothing_else_than_calls_where_one_must_be_made(text: str):
    assert not accepts(text)


def test_one_call_at_most():
    assert accepts(NOW, most_calls=1) and not accepts(f"{NOW}\n{NOW}", most_calls=1)


def test_functions_that_take_anything_still_take_objects():
    assert accepts(with_arguments('{"a": [1, null]}'), schemas={"get_weather": {}})
    assert not accepts(with_arguments("1"), schemas={"get_weather": {}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello", True),
        ("", True),
        (f"Well.\n{WEATHER}", True),
        (f"Well.\n{WEATHER}\n{NOW}\nThat is all.", True),
        (with_arguments('{"city": 7}'), False),
        ('<tool_call>\n{"name": "now", "arguments": {"free": 1}}\n</tool_call>', True),
        (WEATHER.replace("get_weather", "other"), False),
    ],
)
def test_strict_functions_where_no_call_must_be_made(text: str, expected: bool):
    assert accepts(text, must_call=False, strict=frozenset({"get_weather"})) is expected


@pytest.mark.parametrize("fields", [{}, {"must_call": False, "strict": frozenset({"now"})}], ids=["must", "strict"])
def test_calls_come_after_the_reasoning(fields: dict[str, Any]):
    thought = "<think>\nHm, I'd {call} <b>.\n</think>\n\n"
    assert accepts(f"{thought}{NOW}", start=Channel.UNDECIDED, **fields)
    assert accepts(NOW, start=Channel.UNDECIDED, **fields)
    assert accepts(f"{thought.removeprefix('<think>')}{NOW}", start=Channel.REASONING, **fields)
    assert not accepts(f"{thought}{NOW}", **fields)
    assert not accepts(f"<think>{NOW}</think>{NOW}", start=Channel.UNDECIDED, **fields)
    assert not accepts(f"<think>Hm{NOW}", start=Channel.UNDECIDED, **fields)


def test_text_does_not_spell_a_call_out():
    """In tokens that are not the tag's own."""
    grammar = tool_grammar(ToolUse(format=HERMES, schemas=SCHEMAS), Channel.CONTENT)
    matcher = LLMatcher(GUIDE, LLMatcher.grammar_from_lark(grammar))
    token_ids = [token_id for part in ("Well <", "tool_call", ">") for token_id in TOKENIZER.encode(part)]
    assert matcher.try_consume_tokens(token_ids) < len(token_ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CODER, True),
        (CODER_NOW, True),
        (f"{CODER}\n{CODER_NOW}", True),
        (with_parameters(city="Paris\n in <France>", days="3", unit='f"'), True),
        (with_parameters(city=""), True),
        (with_parameters(city="Paris", days="three"), False),
        (with_parameters(city="Paris", unit="k"), False),
        (with_parameters(days="3"), False),
        (with_parameters(city="Paris", more="1"), False),
        ("Hello", False),
    ],
)
def test_calls_of_qwen_coder(text: str, expected: bool):
    assert accepts(text, QWEN_CODER) is expected


def test_strict_functions_of_qwen_coder():
    strict = {"must_call": False, "strict": frozenset({"get_weather"})}
    assert accepts(f"Well.\n{CODER}", QWEN_CODER, **strict) and accepts("Hello", QWEN_CODER, **strict)
    assert not accepts(with_parameters(days="3"), QWEN_CODER, **strict)
    free = CODER_NOW.replace("</function>", "<parameter=a>\nb\n</parameter>\n</function>")
    assert accepts(free, QWEN_CODER, **strict)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": "string", "pattern": "x"}}},
        {"properties": {"a": {"type": "string", "maxLength": 3}}},
        {"properties": {"a>b": {"type": "string"}}},
        {"properties": {"": {}}},
    ],
    ids=str,
)
def test_what_qwen_coder_cannot_be_held_to(schema: dict[str, Any]):
    with pytest.raises(ApiError) as caught:
        tool_grammar(ToolUse(format=QWEN_CODER, schemas={"f": schema}, must_call=True), Channel.CONTENT)
    assert caught.value.status == 400 and caught.value.param == "tools"


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": True}},
        {"required": 7},
        {"properties": {"a": {"enum": 7}}},
        {"properties": {"a": {"enum": []}}},
    ],
    ids=str,
)
def test_odd_schemas_are_no_fault(schema: dict[str, Any]):
    for form in (HERMES, QWEN_CODER):
        assert tool_grammar(ToolUse(format=form, schemas={"f": schema}, must_call=True), Channel.CONTENT)
