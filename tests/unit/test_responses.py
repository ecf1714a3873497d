"""Responses: the chat that is asked for, and the items and events that become of its output."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from serve_app.http import parse_body
from serve_app.openai.errors import ApiError, unavailable
from serve_app.openai.responses import Responses
from serve_app.openai.responses_protocol import ResponsesBody, chat_values
from tests.unit.scripted import events, named_events, whole
from tests.unit.test_openai_chat import SERVED, THOUGHT
from tests.unit.test_openai_completions import TOKENIZER
from tests.unit.test_openai_parsing import CUTS, OUTPUTS, WEATHER

TOOLS = [
    {"type": "function", "name": "get_weather", "parameters": {"properties": {"city": {"type": "string"}}}},
    {"type": "function", "name": "now"},
]
EVENT = TypeAdapter(ResponseStreamEvent)


def body(wanted: Any = "Hello", **fields: Any) -> ResponsesBody:
    return parse_body(msgspec.json.encode({"model": "demo", "input": wanted} | fields), ResponsesBody)


def responses(wanted: Any = "Hello", **fields: Any) -> Responses:
    return Responses(body(wanted, **fields), SERVED)


def refusal(wanted: Any = "Hello", **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        responses(wanted, **fields)
    return caught.value


def messages(*items: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return chat_values(body(list(items), **fields))["messages"]


def comparable(response: dict[str, Any]) -> dict[str, Any]:
    """Less what is new with every request."""
    plain = {name: value for name, value in response.items() if name not in ("id", "created_at")}
    plain["output"] = [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in response["output"]]
    return plain


@settings(max_examples=60)
@given(OUTPUTS, CUTS, st.booleans(), st.booleans())
def test_a_stream_says_what_the_whole_response_says(text: str, cuts: list[int], is_cut_off: bool, has_tools: bool):
    fields = {"tools": TOOLS} if has_tools else {}
    found = events(responses(stream=True, **fields), text, cuts, is_cut_off)
    expected = whole(responses(**fields), text, is_cut_off)
    assert [event["sequence_number"] for _, event in found] == list(range(len(found)))
    assert all(name == event["type"] for name, event in found)
    last, final = found[-1]
    assert last == f"response.{final['response']['status']}"
    assert comparable(final["response"]) == comparable(expected)
    items = final["response"]["output"]
    assert reassembled(found) == [item.get("arguments") or item["content"][0]["text"] for item in items]
    assert [event["item"] for name, event in found if name == "response.output_item.done"] == items
    for _, event in found:
        EVENT.validate_python(event)


def reassembled(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """The text of every item, by its deltas."""
    texts: list[str] = []
    for name, event in found:
        if name == "response.output_item.added":
            assert event["output_index"] == len(texts)
            texts.append("")
        elif name.endswith(".delta"):
            assert event["output_index"] == len(texts) - 1
            texts[-1] += event["delta"]
    return texts


def test_reasoning_text_and_calls_are_items_in_their_order():
    found = whole(responses(tools=TOOLS), THOUGHT + "Wait. " + WEATHER)
    reasoning, text, call = found["output"]
    assert reasoning["type"] == "reasoning" and reasoning["content"] == [
        {"type": "reasoning_text", "text": "Hm, let me see."}
    ]
    assert text["role"] == "assistant" and text["content"][0]["text"].strip() == "Wait."
    assert call["type"] == "function_call" and call["name"] == "get_weather"
    assert json.loads(call["arguments"])["city"]
    assert found["status"] == "completed" and found["error"] is None
    usage = found["usage"]
    assert usage["output_tokens_details"]["reasoning_tokens"] > 0 and usage["input_tokens_details"]["cached_tokens"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert Response.model_validate(found).output_text.strip() == "Wait."


def test_an_output_that_is_cut_off_is_incomplete():
    found = whole(responses(), "Hello", is_cut_off=True)
    assert found["status"] == "incomplete" and found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found["output"][0]["status"] == "incomplete"


def test_the_events_of_a_text():
    names = [name for name, _ in events(responses(stream=True), "Hello")]
    assert names == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_a_fault_is_an_event_that_ends_the_stream():
    [(name, event)] = named_events(responses(stream=True).error_event(unavailable("gone")))
    assert name == "response.failed" and event["response"]["error"] == {"code": "server_error", "message": "gone"}
    assert EVENT.validate_python(event).type == name


def test_what_was_given_back_goes_in_again_as_one_turn():
    first = whole(responses(tools=TOOLS), THOUGHT + "Wait. " + WEATHER)["output"]
    answer = {"type": "function_call_output", "call_id": first[-1]["call_id"], "output": "sunny"}
    found = messages({"role": "user", "content": "Weather?"}, *first, answer, instructions="Be brief.")
    assert [message["role"] for message in found] == ["system", "user", "assistant", "tool"]
    turn = found[2]
    assert turn["reasoning"] == "Hm, let me see." and turn["content"].strip() == "Wait."
    assert turn["tool_calls"][0]["id"] == found[3]["tool_call_id"] == first[-1]["call_id"]


def test_a_turn_ends_where_another_begins():
    def said(text: str) -> dict[str, Any]:
        return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}

    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]}
    call = {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"}
    turns = messages(said("a"), said("b"), thought, call, call, thought, {"role": "user", "content": "x"}, said("c"))
    assert [sorted(turn) for turn in turns] == [
        ["content", "role"],
        ["content", "role"],
        ["reasoning", "role", "tool_calls"],
        ["reasoning", "role"],
        ["content", "role"],
        ["content", "role"],
    ]
    assert len(turns[2]["tool_calls"]) == 2


def test_the_prompt_is_that_of_the_chat_it_stands_for():
    made = responses([{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}], instructions="Be brief.")
    prompt = TOKENIZER.decode(made.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt.index("Be brief.") < prompt.index("Hi")
    params = responses(temperature=0.5, max_output_tokens=7, seed=3).requests[0].params
    assert (params.temperature, params.max_tokens, params.seed) == (0.5, 7, 3)


def test_the_form_of_the_answer_is_a_grammar():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    wanted = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    made = responses(text={"format": wanted})
    assert made.constraint is not None and made.requests[0].params.grammar is not None
    assert whole(made, '{"a": 1}')["text"]["format"] == wanted
    assert responses().constraint is None
    assert responses(tools=TOOLS, tool_choice="required").constraint is not None
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": TOOLS[0]["name"]}]}
    made = responses(tools=TOOLS, tool_choice=allowed)
    assert made.constraint is not None and whole(made, "x")["tool_choice"] == allowed


def test_hints_that_need_nothing_change_nothing():
    hints = {"include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"}}
    made = responses(stream_options={"include_obfuscation": False}, **hints)
    assert made.requests[0].prompt_token_ids == responses().requests[0].prompt_token_ids
    assert comparable(whole(made, THOUGHT + "Hi")) == comparable(whole(responses(), THOUGHT + "Hi"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "x"}, "conversation"),
        ({"background": True}, "background"),
        ({"include": ["message.output_text.logprobs"]}, "include.0"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format.schema"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"wanted": []}, "input"),
        ({"wanted": 5}, "input"),
        ({"wanted": "x y " * 5000}, "input"),
        (
            {"wanted": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0.type",
        ),
        ({"wanted": [{"role": "wizard", "content": "x"}]}, "input.0.role"),
        ({"wanted": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"wanted": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input.0.arguments"),
        ({"wanted": [{"type": "function_call_output", "call_id": "c", "output": 5}]}, "input.0.output"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_wrong_or_not_supported_is_named(fields: dict[str, Any], param: str):
    error = refusal(**fields)
    assert error.status == 400 and error.param == param
