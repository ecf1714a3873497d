"""Bodies of requests: what is accepted, what is refused by name, and that a hostile one costs little."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.http import parse_body
from serve_app.openai.chat_protocol import ChatBody
from serve_app.openai.completion_protocol import CompletionBody
from serve_app.openai.errors import ApiError
from serve_app.openai.protocol import GenerationBody

HELLO = [{"role": "user", "content": "Hello"}]
NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTEGERS = ("n", "max_tokens", "top_k", "seed", "min_tokens", "priority", "prompt_logprobs", "max_completion_tokens")
INTEGERS += ("truncate_prompt_tokens",)
BOOLEANS = ("stream", "ignore_eos", "skip_special_tokens", "logprobs", "add_generation_prompt", "return_token_ids")
BOOLEANS += ("return_tokens_as_token_ids", "include_stop_str_in_output", "spaces_between_special_tokens")


def chat(**fields: Any) -> ChatBody:
    return parse_body(json.dumps({"model": "demo", "messages": HELLO} | fields).encode(), ChatBody)


def completion(prompt: Any, **fields: Any) -> CompletionBody:
    return parse_body(json.dumps({"model": "demo", "prompt": prompt} | fields).encode(), CompletionBody)


def error(call: Any, *args: Any, **fields: Any) -> dict[str, Any]:
    """The error object that a client sees."""
    with pytest.raises(ApiError) as caught:
        call(*args, **fields)
    assert caught.value.status == 400
    return caught.value.body()["error"]


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", ["1", True, [], {}, "NaN"], ids=repr)
def test_numbers_are_numbers(field: str, value: Any):
    assert error(chat, **{field: value})["param"] == field


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", ["1", True, 1.5, 1.0, 2**80, [], {}], ids=repr)
def test_integers_are_integers(field: str, value: Any):
    assert error(chat, **{field: value})["param"] == field


@pytest.mark.parametrize("field", BOOLEANS)
@pytest.mark.parametrize("value", [1, 0, "true", []], ids=repr)
def test_booleans_are_booleans(field: str, value: Any):
    assert error(chat, **{field: value})["param"] == field


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_json_has_no_nan_and_no_infinity(number: str):
    body = f'{{"model": "demo", "messages": [], "temperature": {number}}}'.encode()
    assert error(parse_body, body, ChatBody)["code"] == "invalid_json"


@given(st.dictionaries(st.sampled_from(sorted(ChatBody.model_fields)), st.none()))
def test_null_is_the_same_as_leaving_out(nulls: dict[str, None]):
    given = {name: None for name in nulls if name not in ("model", "messages")}
    assert chat(**given) == chat()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*ChatBody.model_fields, *CompletionBody.model_fields, "other"]), JSON))
def test_any_json_is_accepted_or_refused_with_a_reason(values: dict[str, Any]):
    for model in (ChatBody, CompletionBody):
        try:
            parse_body(json.dumps(values).encode(), model)
        except ApiError as refusal:
            assert refusal.status == 400 and refusal.message


@given(st.binary(max_size=64))
def test_any_bytes_are_refused_with_a_reason(body: bytes):
    assert error(parse_body, body, ChatBody)["message"]


@pytest.mark.parametrize("brackets", ["[", '{"a":'])
def test_nesting_breaks_nothing(brackets: str):
    closing = {"[": "]", '{"a":': "}"}[brackets]
    for depth in (500, 5_000, 500_000):
        body = f'{{"model":{brackets * depth}1{closing * depth}}}'.encode()
        assert error(parse_body, body, ChatBody)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [*HELLO, {"role": "tool", "tool_call_id": "x"}]}, "messages.1.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "extra": 1}]}, "messages.0.extra"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]}, "tools.0.function.strict"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]},
                }
            },
            "tool_choice",
        ),
        ({"continue_final_message": True}, "continue_final_message"),
        (
            {
                "messages": [*HELLO, {"role": "assistant", "content": "x"}],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
            "add_generation_prompt",
        ),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, "reasoning_effort"),
        ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"other": 1}}, "chat_template_kwargs.other"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"stop": 1}, "stop"),
        ({"stop_token_ids": [1, "2"]}, "stop_token_ids.1"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"logit_bias": {str(number): 1 for number in range(1025)}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"top_logprobs": 0}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_error_says_where(fields: dict[str, Any], param: str):
    found = error(chat, **fields)
    assert found["param"] == param and param in found["message"]


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        ([[]], "prompt.0"),
        ([1, "a"], "prompt.1"),
        (["a", 1], "prompt.1"),
        ([[1, "a"]], "prompt.0.1"),
        ([[1], "a"], "prompt.1"),
        ([-1], "prompt.0"),
        ({}, "prompt"),
    ],
    ids=repr,
)
def test_a_wrong_prompt_is_pointed_at(prompt: Any, param: str):
    assert error(completion, prompt)["param"] == param


@pytest.mark.parametrize(
    "field",
    "prompt_embeds watermarking vllm_xargs kv_transfer_params repetition_detection "
    "stream_interval session_id lora_path extra_key return_hidden_states return_meta_info chat_template "
    "mirostat dry_multiplier typical_p".split(),
)
def test_what_other_servers_have_and_this_has_not_is_no_secret(field: str):
    for refuse in (chat, lambda **fields: completion("x", **fields)):
        found = error(refuse, **{field: 1})
        assert found["param"] == field and found["code"] == "unknown_parameter" and field in found["message"]


def test_prompts_in_every_form():
    assert completion("a").prompts == ["a"]
    assert completion(["a", "b"]).prompts == ["a", "b"]
    assert completion([1, 2]).prompts == [[1, 2]]
    assert completion([[1], [2, 3]]).prompts == [[1], [2, 3]]


@pytest.mark.parametrize(
    "values",
    [
        {f"field{number}": 1 for number in range(20_000)},
        {"messages": [{"role": "wizard"}] * 20_000},
        {"messages": [{"role": "user", "content": [1] * 20_000}]},
        {"stop_token_ids": ["x"] * 20_000},
        {"logit_bias": {f"x{number}": "y" for number in range(20_000)}},
        {"metadata": {f"x{number}": 1 for number in range(20_000)}},
        {"bad_words": [1] * 20_000},
        {"allowed_token_ids": [True] * 20_000},
        {"prompt": [True] * 20_000},
        {"prompt": [[True]] * 20_000},
    ],
    ids=lambda values: str(values)[:24],
)
def test_of_a_million_errors_one_is_reported(values: dict[str, Any]):
    for model in (ChatBody, CompletionBody):
        assert len(error(parse_body, json.dumps({"model": "demo"} | values).encode(), model)["message"]) < 300


def test_an_assistants_answer_comes_back_as_it_was_sent():
    """As clients dump it: with every field that OpenAI has, most of them null."""
    message = {"role": "assistant", "content": "x", "refusal": None, "audio": None, "function_call": None}
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    body = chat(messages=[*HELLO, message | {"annotations": None, "tool_calls": [call], "reasoning_content": "y"}])
    turn = body.messages[1].model_dump(exclude_none=True)
    assert turn["tool_calls"] == [{key: call[key] for key in ("id", "type", "function")}]
    assert turn["content"] == "x" and turn["reasoning_content"] == "y"


def test_every_field_but_a_few_can_be_left_out():
    required = {
        name
        for model in (ChatBody, CompletionBody)
        for name, field in model.model_fields.items()
        if field.is_required()
    }
    assert required == {"model", "messages", "prompt"}
    assert set(GenerationBody.model_fields) <= set(ChatBody.model_fields) & set(CompletionBody.model_fields)
