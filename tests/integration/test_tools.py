"""Tools through the `openai` client: the model calls, the result goes back, the model answers."""

import json
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.integration.test_chat import GREEDY

QUESTION = "What is the weather in Paris?"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "Get the weather in a city", "parameters": PARAMETERS}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]
CITY_OF_TWO = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
TWO_TOOLS: Any = [
    {"type": "function", "function": {"name": "get_time", "parameters": CITY_OF_TWO | {"additionalProperties": False}}},
    {"type": "function", "function": {"name": "see_city", "parameters": CITY_OF_TWO | {"additionalProperties": False}}},
]
NAMED = {"type": "function", "function": {"name": "see_city"}}
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}


def ask(client: OpenAI, messages: Any = None, **fields: Any) -> Any:
    asked = messages or [{"role": "user", "content": QUESTION}]
    options = {"tools": TOOLS, "extra_body": NO_THINKING} | GREEDY | fields
    return client.chat.completions.create(messages=asked, **options)


def test_a_call_its_result_and_the_answer(client: OpenAI):
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    called = ask(client, messages).choices[0]
    assert called.finish_reason == "tool_calls" and called.message.content is None
    [call] = called.message.tool_calls
    assert call.type == "function" and call.function.name == "get_weather" and call.id
    assert json.loads(call.function.arguments) == {"city": "Paris"}

    result = json.dumps({"condition": "sunny", "temperature": 21})
    messages += [called.message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    answered = ask(client, messages).choices[0]
    assert answered.finish_reason == "stop" and not answered.message.tool_calls
    assert "sunny" in answered.message.content and "21" in answered.message.content


@pytest.mark.parametrize("fields", [{}, {"extra_body": {}}], ids=["direct", "thinking"])
def test_a_streamed_call_is_the_whole_one(client: OpenAI, fields: dict[str, Any]):
    [whole] = ask(client, **fields).choices[0].message.tool_calls
    with client.chat.completions.stream(
        messages=[{"role": "user", "content": QUESTION}],
        tools=TOOLS,
        **({"extra_body": NO_THINKING} | GREEDY | fields),
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    [call] = final.message.tool_calls or []
    assert (call.function.name, call.function.arguments) == (whole.function.name, whole.function.arguments)
    assert final.finish_reason == "tool_calls" and final.message.content is None
    pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert len(pieces) > 1 and "".join(piece.arguments_delta for piece in pieces) == whole.function.arguments


def test_told_not_to_call_the_model_does_not_see_the_tools(client: OpenAI):
    told = ask(client, tool_choice="none")
    assert not told.choices[0].message.tool_calls and told.choices[0].finish_reason == "stop"
    assert told.usage.prompt_tokens < ask(client, max_tokens=1).usage.prompt_tokens


def test_a_call_that_is_cut_off_says_so(client: OpenAI):
    tokens = ask(client).usage.completion_tokens
    choice = ask(client, max_tokens=tokens - 4).choices[0]
    assert choice.finish_reason == "length" and choice.message.tool_calls[0].function.name == "get_weather"


@pytest.mark.parametrize("extra", [{}, {"thinking_budget": 3}, NO_THINKING], ids=["thinking", "budget", "direct"])
@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")], ids=["required", "named"])
def test_a_call_that_must_be_made_is_made_and_streamed(client: OpenAI, choice: Any, reason: str, extra: dict[str, Any]):
    """Of one who just says hello, where the model would not call anything."""
    fields = {"tools": TWO_TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "extra_body": extra}
    hello: Any = [{"role": "user", "content": "Hello"}]
    whole = ask(client, hello, max_tokens=400, **fields).choices[0]
    [call] = whole.message.tool_calls
    assert whole.finish_reason == reason and whole.message.content is None
    assert call.function.name in ("get_time", "see_city") if choice == "required" else call.function.name == "see_city"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    with client.chat.completions.stream(messages=hello, **(GREEDY | fields | {"max_tokens": 400})) as stream:
        streamed = stream.get_final_completion().choices[0]
    [same] = streamed.message.tool_calls or []
    assert same.function.name == call.function.name and same.function.arguments == call.function.arguments
    assert streamed.finish_reason == reason


def test_strict_functions_are_held_to_their_schemas(client: OpenAI):
    strict = [{"type": "function", "function": each["function"] | {"strict": True}} for each in TWO_TOOLS]
    question: Any = [{"role": "user", "content": "See the city of Paris."}]
    message = ask(client, question, tools=strict, max_tokens=400).choices[0].message
    for call in message.tool_calls or ():
        assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    assert message.tool_calls or "<tool_call>" not in message.content


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS * 2}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
         "tools.0.function.parameters"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_tools_is_named(http: httpx.Client, fields: dict[str, Any], param: str):
    body = {"messages": [{"role": "user", "content": QUESTION}], "tools": TOOLS, **GREEDY, **fields}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param
