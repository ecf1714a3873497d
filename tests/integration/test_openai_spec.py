"""Every kind of answer, against the schemas of OpenAI's own API description."""

import json
from typing import Any

import httpx
import pytest

from tests.integration.server import ROOT

SPECIFICATION = ROOT.parent / "shared" / "data" / "openai_spec_subset.json"
HELLO = [{"role": "user", "content": "Hello"}]
CHAT = {"model": "demo", "messages": HELLO, "max_tokens": 6}
COMPLETION = {"model": "demo", "prompt": ["Hello", "a"], "max_tokens": 6, "n": 2}
LOGPROBS = {"logprobs": True, "top_logprobs": 2}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = {
    "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": CITY}}],
    "max_tokens": 64,
    "temperature": 0,
}
THINKING = {"messages": [{"role": "user", "content": "What is 2 + 3?"}], "max_tokens": 64, "temperature": 0}


@pytest.fixture(scope="module")
def specification() -> dict[str, Any]:
    if not SPECIFICATION.is_file():
        pytest.skip(f"OpenAI's API description is not at {SPECIFICATION}")
    return _with_nulls(json.loads(SPECIFICATION.read_text()))


def _with_nulls(schema: Any) -> Any:
    """In places the description says `nullable: true`, as older ones did, which validators of today do not know."""
    if isinstance(schema, list):
        return [_with_nulls(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _with_nulls(item) for key, item in schema.items()}
    return {"anyOf": [found, {"type": "null"}]} if found.get("nullable") is True else found


def check(specification: dict[str, Any], name: str, value: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = {"$ref": f"#/components/schemas/{name}", "components": specification["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


@pytest.mark.parametrize(
    "fields",
    [{}, LOGPROBS, {"n": 2, "stop": "e"}, TOOLS, THINKING],
    ids=["plain", "logprobs", "n", "tools", "thinking"],
)
def test_chats(http: httpx.Client, specification: dict[str, Any], fields: dict[str, Any]):
    check(specification, "CreateChatCompletionResponse", http.post("/v1/chat/completions", json=CHAT | fields).json())
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    response = http.post("/v1/chat/completions", json=CHAT | fields | stream)
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    assert len(events) > 2
    for event in events:
        check(specification, "CreateChatCompletionStreamResponse", json.loads(event))


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2}], ids=["plain", "logprobs"])
def test_completions(http: httpx.Client, specification: dict[str, Any], fields: dict[str, Any]):
    check(specification, "CreateCompletionResponse", http.post("/v1/completions", json=COMPLETION | fields).json())


def test_models_and_errors(http: httpx.Client, specification: dict[str, Any]):
    check(specification, "ListModelsResponse", http.get("/v1/models").json())
    check(specification, "Model", http.get("/v1/models/demo").json())
    for body in ({}, CHAT | {"model": "x"}, CHAT | {"n": "x"}):
        check(specification, "ErrorResponse", http.post("/v1/chat/completions", json=body).json())
