"""/v1/messages with Anthropic's own client, and on the wire."""

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic

from tests.integration.server import Server

ASK: dict[str, Any] = {"model": "demo", "max_tokens": 24, "messages": [{"role": "user", "content": "Hello"}]}
GREEDY = {"temperature": 0}
TOOL: Any = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(scope="module")
def claude(server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="unused", max_retries=0, timeout=60) as made:
        yield made


def test_a_message(claude: Anthropic):
    found = claude.messages.create(**ASK, extra_body=GREEDY, system="Be brief.")
    assert found.type == "message" and found.role == "assistant" and found.model == "demo"
    assert found.stop_reason in ("end_turn", "max_tokens") and found.content[0].type == "text"
    assert 0 < found.usage.output_tokens <= 24


def test_a_stream_is_the_message_in_pieces(claude: Anthropic):
    for fields in ({}, {"tools": [TOOL]}, {"thinking": {"type": "adaptive"}}):
        whole = claude.messages.create(**ASK, extra_body=GREEDY, **fields)
        with claude.messages.stream(**ASK, extra_body=GREEDY, **fields) as stream:
            found = stream.get_final_message()
        assert found.stop_reason == whole.stop_reason
        assert found.usage.output_tokens == whole.usage.output_tokens
        plain = [{"id": None, **block.model_dump()} | {"id": None} for block in found.content]
        expected = [{"id": None, **block.model_dump()} | {"id": None} for block in whole.content]
        for block in (*plain, *expected):
            block.pop("parsed_output", None)
        assert plain == expected


def test_tokens_are_counted_as_they_are_used(claude: Anthropic):
    counted = claude.messages.count_tokens(model="demo", messages=ASK["messages"], tools=[TOOL], system="Be brief.")
    usage = claude.messages.create(**ASK, tools=[TOOL], system="Be brief.").usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_conversation_with_tools_goes_on(claude: Anthropic):
    use = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"}
    turns: Any = [
        *ASK["messages"],
        {"role": "assistant", "content": [use]},
        {
            "role": "user",
            "content": [result, {"type": "text", "text": "Thanks", "cache_control": {"type": "ephemeral"}}],
        },
    ]
    assert claude.messages.create(**ASK | {"messages": turns}, tools=[TOOL]).usage.output_tokens


def test_errors_have_anthropics_shape(claude: Anthropic, http: httpx.Client):
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        claude.messages.create(**ASK, extra_body={"temperature": 9})
    with pytest.raises(anthropic.NotFoundError, match="gpt-5"):
        claude.messages.create(**ASK | {"model": "gpt-5"})
    cases = [({"content": b"{"}, 400, "invalid_request_error"), ({"content": b" " * 400_000}, 413, "request_too_large")]
    for body, status, kind in cases:
        found = http.post("/v1/messages", **body)
        assert found.status_code == status and found.json()["type"] == "error"
        assert found.json()["error"]["type"] == kind and set(found.json()["error"]) == {"type", "message"}
    assert http.get("/v1/messages").json()["error"]["type"] == "invalid_request_error"
