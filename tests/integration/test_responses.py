"""/v1/responses with OpenAI's own client, and on the wire."""

from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.integration.test_errors import error_of

ASK: dict[str, Any] = {"model": "demo", "input": "Hello", "temperature": 0, "max_output_tokens": 24}
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


def test_a_response(client: OpenAI):
    found = client.responses.create(**ASK, instructions="Be brief.", metadata={"job": "7"})
    assert found.object == "response" and found.status in ("completed", "incomplete")
    assert found.output_text or found.output[0].type == "reasoning"
    assert found.usage is not None and 0 < found.usage.output_tokens <= 24
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    assert found.metadata == {"job": "7"} and found.temperature == 0


def test_a_stream_is_the_response_in_pieces(client: OpenAI):
    whole = client.responses.create(**ASK, tools=[WEATHER])
    with client.responses.stream(**ASK, tools=[WEATHER]) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last: Any = events[-1]
    assert last.type == f"response.{whole.status}"
    assert [item.type for item in last.response.output] == [item.type for item in whole.output]
    assert last.response.output_text == whole.output_text
    assert last.response.usage.output_tokens == whole.usage.output_tokens


def test_what_the_chat_says_is_what_the_response_says(client: OpenAI, http: httpx.Client):
    chat = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 24}
    message = http.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]
    assert client.responses.create(**ASK).output_text == message["content"]


def test_the_output_goes_in_again(client: OpenAI):
    first = client.responses.create(**ASK)
    items: Any = [{"role": "user", "content": "Hello"}, *(item.model_dump() for item in first.output)]
    call = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Paris"}'}
    items += [call, {"type": "function_call_output", "call_id": "c1", "output": "sunny"}]
    second = client.responses.create(**ASK | {"input": items}, tools=[WEATHER])
    assert second.usage is not None and first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens


def test_nothing_is_kept(client: OpenAI, http: httpx.Client):
    for field, value in (("store", True), ("previous_response_id", "resp_1")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**ASK, **{field: value})
        assert caught.value.param == field
    error_of(http.get("/v1/responses/resp_1"), 404)
