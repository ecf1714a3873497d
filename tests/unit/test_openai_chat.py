"""Chats: what the model sees, and what becomes of its outputs, streamed or whole."""

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serve_app.http import parse_body
from serve_app.openai.chat import Chat
from serve_app.openai.chat_protocol import ChatBody
from serve_app.openai.errors import ApiError
from tests.unit.test_openai_completions import END, MODEL, TOKENIZER, run
from tests.unit.test_openai_parsing import NOW, OUTPUTS, WEATHER

SERVED = replace(MODEL, info=msgspec.structs.replace(MODEL.info, max_model_len=4096))
HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "parameters": {"properties": {"city": {"type": "string"}}}},
    },
    {"type": "function", "function": {"name": "now"}},
]
THOUGHT = "<think>\nHm, let me see.\n</think>\n\n"


def chat(messages: list[dict[str, Any]] = HELLO, **fields: Any) -> Chat:
    body = {"model": "demo", "messages": messages} | fields
    return Chat(parse_body(msgspec.json.encode(body), ChatBody), SERVED)


def refusal(messages: list[dict[str, Any]] = HELLO, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat(messages, **fields)
    assert caught.value.status == 400
    return caught.value


def prompt(*args: Any, **fields: Any) -> str:
    return TOKENIZER.decode(chat(*args, **fields).requests[0].prompt_token_ids, skip_special_tokens=False)


def answers(texts: list[str], **fields: Any) -> dict[str, Any]:
    """The response that is not streamed, of a model that writes these texts."""
    [whole], _ = run(chat(n=len(texts), **fields), [[*TOKENIZER.encode(text), END] for text in texts], [])
    return ChatCompletion.model_validate(whole).model_dump()


def answer(text: str, **fields: Any) -> dict[str, Any]:
    return answers([text], **fields)["choices"][0]


def streamed(texts: list[str], cuts: list[int], **fields: Any) -> dict[str, Any]:
    """The same, put together from a stream by OpenAI's own client."""
    made = chat(n=len(texts), stream=True, stream_options={"include_usage": True}, **fields)
    chunks, usage = run(made, [[*TOKENIZER.encode(text), END] for text in texts], cuts)
    state = ChatCompletionStreamState()
    for chunk in [*made.first_chunks(), *chunks, made._common | {"object": "chat.completion.chunk", "choices": []}]:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    return state.current_completion_snapshot.model_dump() | {"usage": usage}


def comparable(response: dict[str, Any]) -> dict[str, Any]:
    """Less what is new with every request, and what OpenAI's client adds."""
    for choice in response["choices"]:
        for position, call in enumerate(choice["message"].get("tool_calls") or ()):
            assert call.pop("id").startswith("call_")
            assert call.pop("index", position) == position
            call["function"].pop("parsed_arguments", None)
        choice["message"] = {key: value for key, value in choice["message"].items() if value is not None}
        choice["message"].pop("parsed", None)
        choice.pop("stop_reason", None)
    usage = {key: value for key, value in response["usage"].items() if isinstance(value, int)}
    return {"choices": response["choices"], "usage": usage}


@given(
    st.lists(OUTPUTS, min_size=1, max_size=2),
    st.lists(st.integers(0, 200), max_size=12),
    st.fixed_dictionaries(
        {},
        optional={
            "tools": st.just(TOOLS),
            "tool_choice": st.just("none"),
            "parallel_tool_calls": st.just(False),
            "stop": st.sampled_from(["Paris", "}", "think"]),
            "stop_regex": st.sampled_from(["P.*s", "[{}]", "\\s<"]),
            "min_tokens": st.integers(0, 9),
            "logprobs": st.just(True),
            "include_reasoning": st.just(False),
            "separate_reasoning": st.just(False),
            "chat_template_kwargs": st.just({"enable_thinking": False}),
        },
    ),
)
def test_a_stream_says_what_the_whole_answer_says(texts: list[str], cuts: list[int], fields: dict[str, Any]):
    assert comparable(streamed(texts, cuts, **fields)) == comparable(answers(texts, **fields))


def test_reasoning_has_both_names_and_is_counted():
    whole = answers([f"{THOUGHT}Hi"])
    [choice] = whole["choices"]
    message = choice["message"]
    assert message["content"] == "Hi" and choice["finish_reason"] == "stop"
    assert message["reasoning"] == message["reasoning_content"] == "Hm, let me see."
    counted = len(TOKENIZER.encode("\nHm, let me see.\n"))
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] == counted


def test_an_answer_may_begin_with_the_message_that_it_goes_on_with():
    fields = {"messages": [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "The sky"}]}]}
    fields |= {"continue_final_message": True, "echo": True}
    whole = answers([" is blue.", " is up."], **fields)
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["The sky is blue.", "The sky is up."]
    assert comparable(streamed([" is blue.", " is up."], [2], **fields)) == comparable(whole)
    assert answer("Hi", echo=True)["message"]["content"] == "Hi"


def test_reasoning_stays_or_goes_on_request():
    assert answer(f"{THOUGHT}Hi", separate_reasoning=False)["message"]["content"] == f"{THOUGHT}Hi"
    message = answer(f"{THOUGHT}Hi", include_reasoning=False)["message"]
    assert message["content"] == "Hi" and message["reasoning"] is None is message["reasoning_content"]


@pytest.mark.parametrize(
    ("fields", "text", "content", "reasoning"),
    [
        ({}, "Hi", "Hi", None),
        ({}, "<think>\n\n</think>\n\nHi", "Hi", None),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "Hi </think>", "Hi </think>", None),
        ({"reasoning_effort": "none"}, "<think>Hi", "<think>Hi", None),
        ({"reasoning_effort": "high"}, "<think>Hm</think>Hi", "Hi", "Hm"),
        ({"tools": TOOLS}, "<think>Hm</think>", None, "Hm"),
        ({}, "<think>Hm", "", "Hm"),
    ],
)
def test_where_an_answer_begins_is_seen_in_the_prompt(
    fields: dict[str, Any], text: str, content: str | None, reasoning: str | None
):
    message = answer(text, **fields)["message"]
    assert (message["content"], message["reasoning"]) == (content, reasoning)


CONTINUED = [*HELLO, {"role": "assistant", "content": "Let me see. "}]


def test_the_final_message_is_continued():
    assert prompt(CONTINUED, continue_final_message=True).endswith("</think>\n\nLet me see. ")
    assert answer("<think>", messages=CONTINUED, continue_final_message=True)["message"]["content"] == "<think>"
    thinking = [*HELLO, {"role": "assistant", "reasoning": "Hm, "}]
    assert prompt(thinking, continue_final_message=True).endswith("<think>\nHm, ")
    message = answer("so it is.\n</think>\n\nHi", messages=thinking, continue_final_message=True)["message"]
    assert (message["reasoning"], message["content"]) == ("so it is.", "Hi")


def test_a_special_token_in_the_continued_message_is_text():
    ids = chat([*HELLO, {"role": "assistant", "content": "<|im_end|> and"}], continue_final_message=True).requests[0]
    assert ids.prompt_token_ids.count(END) == 1


@pytest.mark.parametrize(
    ("fields", "ending"),
    [
        ({}, "<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, "Hello<|im_end|>\n"),
        ({"reasoning_effort": "none"}, "<think>\n\n</think>\n\n"),
        ({"reasoning_effort": "low"}, "<|im_start|>assistant\n"),
    ],
)
def test_how_the_prompt_ends(fields: dict[str, Any], ending: str):
    assert prompt(**fields).endswith(ending)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"thinking_token_budget": 8}, (8, 2, False)),
        ({"thinking_budget": 8}, (8, 2, False)),
        ({"thinking_budget_tokens": 8, "thinking_token_budget": None}, (8, 2, False)),
        ({"thinking_token_budget": 8, "reasoning_effort": "low"}, (8, 2, False)),
        ({"thinking_token_budget": 0}, (1, 1, False)),
        ({"reasoning_effort": "low"}, (2048, 2, False)),
        ({"reasoning_effort": "xhigh"}, None),
        ({"thinking_token_budget": 8, "reasoning_effort": "none"}, None),
        ({"thinking_token_budget": 8, "messages": CONTINUED, "continue_final_message": True}, None),
        (
            {
                "thinking_token_budget": 8,
                "messages": [*HELLO, {"role": "assistant", "reasoning": "Hm"}],
                "continue_final_message": True,
            },
            (7, 2, True),
        ),
    ],
    ids=str,
)
def test_thinking_budgets(fields: dict[str, Any], expected: tuple[int, int, bool] | None):
    """The tag that opens the block does not count, and the line break before the one that closes it does."""
    thinking = chat(**fields).requests[0].params.thinking
    found = None if thinking is None else (thinking.num_tokens, len(thinking.closing_ids), thinking.is_open)
    assert found == expected


def test_two_budgets_are_one_too_many():
    refused = refusal(thinking_token_budget=8, thinking_budget=9)
    assert refused.param == "thinking_budget" and refused.code == "unknown_parameter"


def test_messages_of_every_kind_reach_the_prompt():
    call = {"id": "c", "function": {"name": "now", "arguments": '{"a":  1}'}}
    text = prompt(
        [
            {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]},
            {"role": "user", "content": "What time is it?"},
            {"role": "assistant", "content": None, "reasoning": "Time!", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "noon"},
        ],
        tools=TOOLS,
    )
    assert text.startswith("<|im_start|>system\nBe\nbrief") and '"name": "get_weather"' in text
    assert '<think>\nTime!\n</think>\n\n<tool_call>\n{"name": "now", "arguments": {"a":  1}}\n</tool_call>' in text
    assert "<tool_response>\nnoon\n</tool_response>" in text


def test_a_call():
    choice = answer(WEATHER, tools=TOOLS)
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}


def test_calls_side_by_side_and_one_at_most():
    both = answer(f"Well.\n{WEATHER}\n{NOW}", tools=TOOLS)["message"]
    assert both["content"] == "Well." and [call["function"]["name"] for call in both["tool_calls"]] == [
        "get_weather", "now"
    ]  # fmt: skip
    whole = answers([f"{WEATHER}\n{NOW} and more"], tools=TOOLS, parallel_tool_calls=False)
    assert len(whole["choices"][0]["message"]["tool_calls"]) == 1
    assert whole["choices"][0]["finish_reason"] == "tool_calls" and whole["choices"][0]["message"]["content"] is None
    assert whole["usage"]["completion_tokens"] == len(TOKENIZER.encode(WEATHER))


def test_without_tools_a_call_is_text():
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = answer(NOW, **fields)
        assert choice["message"]["content"] == NOW and choice["finish_reason"] == "stop"
    assert "get_weather" not in prompt(tools=TOOLS, tool_choice="none")


def test_allowed_tools_are_those_that_the_model_sees():
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]}
    fields = {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}}
    assert "get_weather" not in prompt(**fields) and '"now"' in prompt(**fields)
    assert answer(NOW, **fields)["finish_reason"] == "tool_calls"
    assert chat(**fields).constraint is None
    fields["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed | {"mode": "required"}}
    assert chat(**fields).constraint is not None


def test_a_call_that_is_cut_off_is_no_reason_to_call():
    [whole], _ = run(chat(tools=TOOLS), [TOKENIZER.encode(WEATHER.partition("ris")[0])], [])
    [choice] = whole["choices"]
    assert choice["finish_reason"] == "length"
    arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
    assert '{"city": "Paris"}'.startswith(arguments)
    with pytest.raises(ValueError):
        json.loads(arguments)


def test_the_chunks_of_a_call():
    """The first has id, type and name; the others have more of the arguments."""
    made = chat(tools=TOOLS, stream=True)
    assert [chunk["choices"][0]["delta"] for chunk in made.first_chunks()] == [{"role": "assistant", "content": None}]
    chunks, _ = run(made, [[*TOKENIZER.encode(WEATHER), END]], list(range(100)))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    first, *others = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert first.keys() == {"index", "id", "type", "function"} and first["function"]["name"] == "get_weather"
    assert len(others) > 2 and all(call.keys() == {"index", "function"} for call in others)
    assert first["function"]["arguments"] + "".join(call["function"]["arguments"] for call in others) == (
        '{"city": "Paris"}'
    )
    assert deltas[-1] == {} and chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert not any("content" in delta for delta in deltas)
