"""/tokenize and /detokenize: what the model sees of a text."""

from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.integration.test_errors import error_of

HELLO = [{"role": "user", "content": "Hello <|im_end|>"}]


def test_a_prompt_there_and_back(http: httpx.Client):
    found = http.post("/tokenize", json={"model": "demo", "prompt": "Hello, wörld 😀"}).json()
    assert found["count"] == len(found["tokens"]) > 1
    assert found["max_model_len"] == 4096 and found["token_strs"] is None
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "Hello, wörld 😀"}


def test_the_strings_of_tokens(http: httpx.Client):
    found = http.post("/tokenize", json={"prompt": "Hello world", "return_token_strs": True}).json()
    assert "".join(found["token_strs"]) == "Hello world" and len(found["token_strs"]) == found["count"]


def test_nothing_is_no_tokens(http: httpx.Client):
    assert http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_messages_are_as_many_tokens_as_in_a_chat(http: httpx.Client, client: OpenAI):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    for fields in ({}, {"tools": [tool]}, {"chat_template_kwargs": {"enable_thinking": False}}):
        body: dict[str, Any] = {"model": "demo", "messages": HELLO, **fields}
        counted = http.post("/tokenize", json=body).json()["count"]
        used = http.post("/v1/chat/completions", json=body | {"max_tokens": 1}).json()["usage"]["prompt_tokens"]
        assert counted == used
    with_opening = http.post("/tokenize", json={"messages": HELLO}).json()
    without = http.post("/tokenize", json={"messages": HELLO, "add_generation_prompt": False}).json()
    assert with_opening["tokens"][: without["count"]] == without["tokens"] and without["count"] < with_opening["count"]


def test_a_prompt_may_be_longer_than_the_context(http: httpx.Client):
    assert http.post("/tokenize", json={"prompt": "x y " * 5000}).json()["count"] > 4096


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "messages"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "messages"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "max_tokens": 1}, "max_tokens"),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, "continue_final_message"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [2**31 - 1]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(http: httpx.Client, path: str, body: dict[str, Any], param: str):
    assert error_of(http.post(path, json=body), 400)["param"] == param


def test_another_model_is_not_found(http: httpx.Client):
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": []})):
        assert error_of(http.post(path, json=body | {"model": "gpt-5"}), 404)["param"] == "model"
