"""Anthropic's messages: the chat that is asked for, and the blocks and events that become of its output."""

import json
from typing import Any

import msgspec
import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from serve_app.anthropic.messages import Messages, count_tokens
from serve_app.anthropic.protocol import CountTokensBody, MessagesBody, chat_values
from serve_app.http import parse_body
from serve_app.openai.errors import ApiError, overloaded
from tests.unit.scripted import events, named_events, whole
from tests.unit.test_openai_chat import SERVED, THOUGHT
from tests.unit.test_openai_completions import TOKENIZER
from tests.unit.test_openai_parsing import CUTS, OUTPUTS, WEATHER

HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [
    {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}},
    {"name": "now", "description": "The time", "input_schema": {"type": "object"}},
]
EVENT: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)


def body(messages: Any = HELLO, **fields: Any) -> MessagesBody:
    values = {"model": "demo", "max_tokens": 100, "messages": messages} | fields
    return parse_body(msgspec.json.encode(values), MessagesBody)


def message(messages: Any = HELLO, **fields: Any) -> Messages:
    return Messages(body(messages, **fields), SERVED)


def comparable(found: dict[str, Any]) -> dict[str, Any]:
    """Less what is new with every request."""
    blocks = [{name: value for name, value in block.items() if name != "id"} for block in found["content"]]
    usage = {name: found["usage"][name] for name in ("input_tokens", "cache_read_input_tokens", "output_tokens")}
    return {name: found[name] for name in ("role", "type", "stop_reason", "stop_sequence", "model")} | {
        "content": [{name: value for name, value in block.items() if value is not None} for block in blocks],
        "usage": usage,
    }


@settings(max_examples=60)
@given(OUTPUTS, CUTS, st.booleans(), st.booleans())
def test_a_stream_says_what_the_whole_message_says(text: str, cuts: list[int], is_cut_off: bool, has_tools: bool):
    fields = {"tools": TOOLS} if has_tools else {}
    found = events(message(stream=True, **fields), text, cuts, is_cut_off)
    expected = whole(message(**fields), text, is_cut_off)
    assert all(name == event["type"] for name, event in found)
    assert found[0][0] == "message_start" and found[-1][0] == "message_stop"
    # As Anthropic's own client puts it together; arguments that are no JSON it reads as far as it can.
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    has_broken_calls = any("INVALID_JSON" in block.get("input", ()) for block in expected["content"])
    if not has_broken_calls:
        for _, event in found:
            parsed = EVENT.validate_python(event)
            snapshot = accumulate_event(event=parsed, current_snapshot=snapshot, json_bufs=buffers)
        assert comparable(snapshot.to_dict()) == comparable(expected)
    Message.model_validate(expected)


def test_thinking_text_and_tools_are_blocks_in_their_order():
    found = whole(message(tools=TOOLS, thinking={"type": "adaptive"}), THOUGHT + "Wait. " + WEATHER)
    thinking, text, use = found["content"]
    assert thinking == {"type": "thinking", "thinking": "Hm, let me see.", "signature": ""}
    assert text["type"] == "text" and text["text"].strip() == "Wait."
    assert use["type"] == "tool_use" and use["name"] == "get_weather" and use["input"]["city"]
    assert found["stop_reason"] == "tool_use" and found["stop_sequence"] is None
    usage = found["usage"]
    assert usage["cache_read_input_tokens"] == 16 and usage["output_tokens"] > 0
    counted = parse_body(json.dumps({"model": "demo", "messages": HELLO, "tools": TOOLS}).encode(), CountTokensBody)
    whole_prompt = whole(message(tools=TOOLS), "x")["usage"]
    assert count_tokens(counted, SERVED) == {
        "input_tokens": whole_prompt["input_tokens"] + whole_prompt["cache_read_input_tokens"]
    }


def test_the_events_of_a_text():
    names = [name for name, _ in events(message(stream=True), "Hello")]
    assert names == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_why_it_stopped():
    assert whole(message(), "Hello")["stop_reason"] == "end_turn"
    assert whole(message(), "Hello", is_cut_off=True)["stop_reason"] == "max_tokens"
    stopped = whole(message(stop_sequences=["there"]), "Hello there you")
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "there")
    assert stopped["content"][0]["text"] == "Hello "


def test_arguments_that_are_no_json_are_told():
    broken = '<tool_call>\n{"name": "get_weather", "arguments": {"city": Paris}}\n</tool_call>'
    [use] = whole(message(tools=TOOLS), broken)["content"]
    assert use["input"] == {"INVALID_JSON": '{"city": Paris}'}


def test_a_fault_is_an_event_that_ends_the_stream():
    [(name, event)] = named_events(message(stream=True).error_event(overloaded("full")))
    assert name == "error" and event == {"type": "error", "error": {"type": "rate_limit_error", "message": "full"}}


def test_what_was_given_back_goes_in_again():
    first = whole(message(tools=TOOLS, thinking={"type": "adaptive"}), THOUGHT + "Wait. " + WEATHER)["content"]
    used = next(block["id"] for block in first if block["type"] == "tool_use")
    result = [
        {
            "type": "tool_result",
            "tool_use_id": used,
            "content": [{"type": "text", "text": "no city"}],
            "is_error": True,
        },
        {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}},
    ]
    turns = [*HELLO, {"role": "assistant", "content": first}, {"role": "user", "content": result}]
    found = chat_values(body(turns, system=[{"type": "text", "text": "Be brief."}]))["messages"]
    assert [turn["role"] for turn in found] == ["system", "user", "assistant", "tool", "user"]
    assert found[2]["reasoning"] == "Hm, let me see." and found[2]["tool_calls"][0]["id"] == used
    assert found[3]["content"] == "Error: no city" and found[3]["tool_call_id"] == used
    assert found[4]["content"] == "And?"


def test_thinking_is_off_unless_it_is_asked_for():
    def end_of_prompt(**fields: Any) -> str:
        return TOKENIZER.decode(message(**fields).requests[0].prompt_token_ids[-8:], skip_special_tokens=False)

    assert end_of_prompt() == end_of_prompt(thinking={"type": "disabled"})
    assert "</think>" in end_of_prompt() and "</think>" not in end_of_prompt(thinking={"type": "adaptive"})


def test_effort_is_a_budget():
    def budget(effort: str) -> Any:
        made = message(thinking={"type": "adaptive", "display": "summarized"}, output_config={"effort": effort})
        return made.requests[0].params.thinking

    assert budget("low").num_tokens < budget("medium").num_tokens and budget("max") is None


def test_the_form_of_the_answer_is_a_grammar():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    made = message(output_config={"format": {"type": "json_schema", "schema": schema}})
    assert made.constraint is not None and made.constraint.param == "output_config.format.schema"
    assert made.requests[0].params.grammar is not None


def test_a_tool_that_must_be_used_is_a_grammar():
    for choice in ({"type": "any"}, {"type": "tool", "name": "now"}):
        made = message(tools=TOOLS, tool_choice=choice)
        assert made.constraint is not None and made.requests[0].params.grammar is not None
    assert message(tools=TOOLS, tool_choice={"type": "none"}).constraint is None


def test_an_answer_that_has_begun_goes_on():
    made = message([*HELLO, {"role": "assistant", "content": "Well, I"}])
    prompt = TOKENIZER.decode(made.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith("Well, I")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"output_config": {"effort": "low"}}, "output_config"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "output_config.format.schema"),
        ({"stop_sequences": list("abcde")}, "stop_sequences"),
        ({"temperature": 3}, "temperature"),
        ({"n": 2}, "n"),
        ({"container": "x"}, "container"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_wrong_or_not_supported_is_named(fields: dict[str, Any], param: str):
    with pytest.raises(ApiError) as caught:
        message(**{"messages": HELLO} | fields)
    assert caught.value.status == 400 and caught.value.param == param
