"""From what a request says about the form of its output to a grammar, and what is refused."""

import json
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from engine.grammar import GrammarCompiler
from engine.tokenizer import Tokenizer, read_eos_token_ids
from engine.weights.hub import resolve_model
from serve_app.config import Limits
from serve_app.openai.chat_protocol import ChatBody
from serve_app.openai.completion_protocol import CompletionBody
from serve_app.openai.errors import ApiError
from serve_app.openai.parsing.output import Channel
from serve_app.openai.structured import constraint
from serve_app.openai.tools import ToolUse

DEMO = resolve_model("demo", None)
TOKENIZER = Tokenizer.from_dir(DEMO)
EOS_TOKEN_IDS = read_eos_token_ids(DEMO, TOKENIZER)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"a": 1}}\n</tool_call>'
FORMAT = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(TOKENIZER.to_json(), TOKENIZER.vocab_size, EOS_TOKEN_IDS)


def chat(**fields) -> ChatBody:
    return ChatBody.model_validate({"model": "demo", "messages": [{"role": "user", "content": "hi"}]} | fields)


def completion(**fields) -> CompletionBody:
    return CompletionBody.model_validate({"model": "demo", "prompt": "hi"} | fields)


def tool_use(body: ChatBody) -> ToolUse:
    return ToolUse.of(body, SimpleNamespace(tokenizer=TOKENIZER))


def accepts(compiler, found, text: str) -> bool:
    """Whether the whole text is an output that the grammar allows."""
    state = compiler.start(found.grammar)
    return all(state.advance(token_id) is None for token_id in [*TOKENIZER.encode(text), EOS_TOKEN_IDS[0]])


@pytest.mark.parametrize(
    ("fields", "param", "good", "bad"),
    [
        (
            {"response_format": FORMAT},
            "response_format.json_schema.schema",
            ['{"a": 1}', '{"a":1}', '{\n  "a": 1\n}'],
            ["{}", '{"a": "x"}', '{"a": 1'],
        ),
        ({"response_format": {"type": "json_object"}}, "response_format", ["{}", '{"b": [1, null]}'], ["[]", "1", ""]),
        ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs.json", ['{"a": 1}'], ["{}"]),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "structured_outputs.json", ['{"a": 1}'], ["{}"]),
        ({"structured_outputs": {"json_object": True}}, "structured_outputs.json_object", ["{}"], ["1"]),
        (
            {"structured_outputs": {"regex": "a/[0-9]{2}"}},
            "structured_outputs.regex",
            ["a/12"],
            ["a/1", "xa/12", "a/123"],
        ),
        (
            {"structured_outputs": {"choice": ["yes", 'no"\n']}},
            "structured_outputs.choice",
            ["yes", 'no"\n'],
            ["no", "yesyes"],
        ),
        (
            {"structured_outputs": {"grammar": 'start: "a"+ B\nB: /[xy]/'}},
            "structured_outputs.grammar",
            ["aax"],
            ["x", "aa"],
        ),
        ({"structured_outputs": {"grammar": 'root ::= "a" [0-9]+'}}, "structured_outputs.grammar", ["a12"], ["a"]),
        ({"guided_json": SCHEMA}, "guided_json", ['{"a": 1}'], ["{}"]),
        ({"guided_regex": "[ab]{2}"}, "guided_regex", ["ab"], ["a"]),
        ({"guided_choice": ["x"]}, "guided_choice", ["x"], ["y", ""]),
        ({"guided_grammar": 'start: "q"'}, "guided_grammar", ["q"], ["p"]),
        ({"json_schema": json.dumps(SCHEMA)}, "json_schema", ['{"a": 1}'], ["{}"]),
        ({"regex": "[ab]{2}"}, "regex", ["ab"], ["a"]),
        ({"ebnf": 'root ::= "a" [0-9]+'}, "ebnf", ["a12"], ["a"]),
        ({"grammar": 'root ::= "a" [0-9]+'}, "grammar", ["a12"], ["a"]),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            "structured_outputs.json",
            ['{"a":1}'],
            ['{"a": 1}', '{ "a":1}'],
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "\t{0,2}"}},
            "structured_outputs.json",
            ['{"a":1}', '{	"a":		1}'],
            ['{"a": 1}'],
        ),
    ],
)
def test_every_way_to_ask_for_a_form(compiler, fields, param, good, bad):
    for body in (chat(**fields), completion(**fields)):
        found = constraint(body, Channel.CONTENT, Limits())
        assert found.param == param
        assert all(accepts(compiler, found, text) for text in good)
        assert not any(accepts(compiler, found, text) for text in bad)


def test_no_form():
    for fields in ({}, {"response_format": {"type": "text"}}, {"structured_outputs": {}}):
        assert constraint(chat(**fields), Channel.UNDECIDED, Limits()) is None


@pytest.mark.parametrize(
    ("start", "good", "bad"),
    [
        (Channel.CONTENT, ['{"a": 1}'], ['<think>x</think>\n\n{"a": 1}', '\n\n{"a": 1}']),
        (
            Channel.UNDECIDED,
            ['{"a": 1}', '<think>\n{é"<|\n</think>\n\n{"a": 1}', '<think></think>{"a": 1}'],
            ["x", "<think>x", "<think>x</think>", '<think>x</think>\n\n{"a": "x"}'],
        ),
        (
            Channel.REASONING,
            ['so {\n</think>\n\n{"a": 1}', '</think>{"a": 1}'],
            ['{"a": 1}', "so", '<think>x</think>{"a": 1}'],
        ),
    ],
)
def test_the_form_is_that_of_the_answer_after_the_reasoning(compiler, start, good, bad):
    found = constraint(chat(response_format=FORMAT), start, Limits())
    assert all(accepts(compiler, found, text) for text in good)
    assert not any(accepts(compiler, found, text) for text in bad)


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        (
            {"tool_choice": "required"},
            [CALL, f"{CALL}\n{CALL}", f"<think>x</think>\n\n{CALL}"],
            ["", "hello", CALL[:-1], CALL.replace("1", '"x"')],
        ),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [CALL], [f"{CALL}\n{CALL}"]),
        (
            {"tool_choice": {"type": "function", "function": {"name": "look"}}},
            [CALL],
            ["x", CALL.replace("look", "see")],
        ),
        ({"tool_choice": "required", "response_format": FORMAT}, [CALL], ['{"a": 1}']),
        (
            {"response_format": FORMAT},
            [CALL, '{"a": 1}', '<think>x</think>\n\n{"a": 1}', f"<think>x</think>\n\n{CALL}"],
            ["hello", "{}"],
        ),
    ],
)
def test_tools(compiler, fields, good, bad):
    body = chat(tools=[TOOL], **fields)
    found = constraint(body, Channel.UNDECIDED, Limits(), tool_use(body))
    assert all(accepts(compiler, found, text) for text in good)
    assert not any(accepts(compiler, found, text) for text in bad)


def test_tools_that_may_be_called_constrain_nothing_unless_they_are_strict(compiler):
    body = chat(tools=[TOOL])
    assert constraint(body, Channel.CONTENT, Limits(), tool_use(body)) is None
    body = chat(tools=[{"type": "function", "function": TOOL["function"] | {"strict": True}}])
    found = constraint(body, Channel.CONTENT, Limits(), tool_use(body))
    assert accepts(compiler, found, "hello") and accepts(compiler, found, CALL)
    assert not accepts(compiler, found, CALL.replace("1", '"x"'))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "minLenght": 3}, r"at / has the keyword 'minLenght'"),
        (
            {"properties": {"a": {"items": {"uniqueItems": True}}}},
            r"at /properties/a/items has the keyword 'uniqueItems'",
        ),
        ({"x-guidance": {"lenient": True}}, "'x-guidance'"),
        ({"anyOf": [{}, {"not": {}}]}, r"at /anyOf/1 has the keyword 'not'"),
        ({"if": {}, "then": {}}, "'if'"),
        ({"properties": []}, "at /properties is a list, expected an object"),
        ({"items": 3}, "at /items is a number, expected a schema"),
        ({"anyOf": {}}, "at /anyOf is an object, expected a list"),
    ],
)
def test_keywords_that_cannot_be_enforced_are_named(schema, message):
    for fields, param in (
        ({"guided_json": schema}, "guided_json"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}},
            "response_format.json_schema.schema",
        ),
        ({"guided_json": json.dumps(schema)}, "guided_json"),
    ):
        with pytest.raises(ApiError, match=message) as caught:
            constraint(chat(**fields), Channel.CONTENT, Limits())
        assert (caught.value.status, caught.value.param) == (400, param)


def test_remarks_in_a_schema_are_no_matter(compiler):
    remarks = {
        "title": "T",
        "description": "d",
        "default": 1,
        "examples": [1],
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "x-order": 3,
    }
    properties = {"title": {"type": "string", **remarks}, "not": {"const": 1}}
    body = chat(guided_json={"type": "object", "properties": properties, "required": ["not"], **remarks})
    assert accepts(compiler, constraint(body, Channel.CONTENT, Limits()), '{"title": "x", "not": 1}')


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "beside guided_regex"),
        ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, "structured_outputs.regex", "beside"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice", "beside"),
        ({"guided_json": "{"}, "guided_json", "not JSON"),
        ({"guided_json": '{"const": NaN}'}, "guided_json", "no number"),
        ({"guided_json": "3"}, "guided_json", "expected a schema"),
        ({"guided_json": "[" * 100_000}, "guided_json", "not JSON"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar", "neither Lark nor GBNF"),
        ({"guided_grammar": "root ::= " + "(" * 20_000}, "guided_grammar", "neither Lark nor GBNF"),
        ({"guided_regex": "a" * 200_000}, "guided_regex", "200000 characters, expected at most 131072"),
    ],
)
def test_requests_that_cannot_be_meant(fields, param, message):
    with pytest.raises(ApiError, match=message) as caught:
        constraint(chat(**fields), Channel.CONTENT, Limits())
    assert (caught.value.status, caught.value.param) == (400, param)


def test_schemas_are_limited_in_depth():
    schema: dict = {}
    for _ in range(40):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ApiError, match="nested deeper than 32"):
        constraint(chat(guided_json=schema), Channel.CONTENT, Limits())
    assert constraint(chat(guided_json=schema), Channel.CONTENT, Limits(schema_depth=64))


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_object", "json_schema": FORMAT["json_schema"]}},
        {"response_format": {"type": "structural_tag"}},
        {"structured_outputs": {"structural_tag": "x"}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
        {"structured_outputs": {"json": {}, "disable_any_whitespace": True, "whitespace_pattern": " "}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "two words", "schema": {}}}},
    ],
)
def test_malformed_fields(fields):
    with pytest.raises(ValidationError):
        chat(**fields)
