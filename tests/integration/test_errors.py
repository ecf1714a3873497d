"""What is wrong with a request is said in OpenAI's shape, with the right status, and nothing breaks."""

import json
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": HELLO, "max_tokens": 2} | fields


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": "Hello", "max_tokens": 2} | fields


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, after checks of all that must hold for any."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}
    error = body["error"]
    assert isinstance(error["message"], str) and isinstance(error["type"], str)
    assert isinstance(error["code"], str) and isinstance(error["param"], str | None)
    for internal in ("Traceback", "serve_app", "ray", "pydantic", "msgspec", "Error", ".py"):
        assert internal not in error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e400}, None),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"seed": "x"}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": list("abcde")}, "stop"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include": True}}, "stream_options"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "mood": "y"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x", "audio": {"id": "y"}}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
        ({"tools": [{"type": "web"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template": "x"}, "chat_template"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"best_of": 2}, "best_of"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_bad_field_of_a_chat_is_named(http: httpx.Client, fields: dict[str, Any], param: str | None):
    response = http.post(CHAT, content=json.dumps(chat(**fields)))
    error = error_of(response, 400)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"].split(".")[0].split("[")[0] == param
        assert param in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"] * 1000}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": 1}, "echo"),
        ({"messages": HELLO}, "messages"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_bad_field_of_a_completion_is_named(http: httpx.Client, fields: dict[str, Any], param: str):
    error = error_of(http.post(COMPLETIONS, json=completion(**fields)), 400)
    assert error["param"].split(".")[0].split("[")[0] == param
    assert param in error["message"]


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_missing_field_is_named(http: httpx.Client, field: str):
    body = chat()
    del body[field]
    assert error_of(http.post(CHAT, json=body), 400)["param"] == field


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"model":"demo","messages":[{"role":"user","content":"Hello"}],"temperature":NaN}',
        b'{"model":"demo","messages":[{"role":"user","content":"Hello"}],"temperature":Infinity}',
        b'{"model":"demo","messages":' + b"[" * 100_000,
        b'{"model":"demo","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 40_000 + b"1" + b"}" * 40_000,
    ],
    ids=lambda body: body[:24].decode(errors="replace"),
)
def test_a_body_that_is_no_json_object_is_refused(http: httpx.Client, body: bytes):
    error_of(http.post(CHAT, content=body), 400)


def test_deeply_nested_tools_are_refused(http: httpx.Client):
    parameters: dict[str, Any] = {}
    for _ in range(200):
        parameters = {"properties": parameters}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    error_of(http.post(CHAT, json=chat(tools=tools)), 400)


def test_a_body_that_is_too_long_is_refused(http: httpx.Client):
    error_of(http.post(CHAT, content=b" " * 400_000), 413)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_what_does_not_fit_the_context_is_refused(http: httpx.Client, field: str):
    body = {"model": "demo", "messages": HELLO, field: 4096}
    error = error_of(http.post(CHAT, json=body), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == field
    error = error_of(http.post(CHAT, json=chat(messages=[{"role": "user", "content": "x y " * 5000}])), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
    error = error_of(http.post(COMPLETIONS, json=completion(prompt=[5] * 4096)), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"


def test_an_unknown_model_is_not_found(client: OpenAI, http: httpx.Client):
    for path, body in ((CHAT, chat(model="gpt-5")), (COMPLETIONS, completion(model="gpt-5"))):
        error = error_of(http.post(path, json=body), 404)
        assert error["code"] == "model_not_found" and error["param"] == "model"
    error_of(http.get("/v1/models/gpt-5"), 404)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_unknown_paths_and_methods(http: httpx.Client):
    assert error_of(http.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(http.get(CHAT), 405)["code"] == "method_not_allowed"
    error_of(http.delete("/v1/models"), 405)


def test_more_than_can_wait_is_refused_with_a_time_to_come_back(http: httpx.Client, free_engine: Any):
    """8 run and 48 wait; the rest of 100 is refused, and with it the whole request."""
    response = http.post(COMPLETIONS, json=completion(prompt=["Hello"] * 100, max_tokens=1000, ignore_eos=True))
    error = error_of(response, 429)
    assert error["code"] == "rate_limit_exceeded" and int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("value", [b"\xff", b"\xc3\x28", "ä".encode()])
def test_headers_that_are_no_text_are_no_fault_of_the_server(http: httpx.Client, value: bytes):
    error = error_of(http.get("/v1/models", headers={b"X-Request-Id": value}), 400)
    assert error["code"] == "invalid_header"
    for name in (b"X-Session-Id", b"Serve_Multiplexed_Model_Id", b"X-Request-Timeout-Seconds", b"User-Agent"):
        assert http.get("/v1/models", headers={name: value}).status_code == 200


def test_the_clients_own_errors(client: OpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=HELLO, temperature=9)  # type: ignore[arg-type]
    assert caught.value.param == "temperature" and "temperature" in caught.value.message
