"""Fields that mean the same in chats as in completions."""

import dataclasses
from typing import Any

import msgspec
import pytest

from serve_app.config import Limits
from serve_app.http import parse_body
from serve_app.openai.chat import Chat
from serve_app.openai.chat_protocol import ChatBody
from serve_app.openai.endpoint import ServedModel
from serve_app.openai.errors import ApiError
from serve_app.openai.sampling import GenerationDefaults
from serve_app.openai.tokenize import TokenizeBody, tokenize
from tests.unit.test_openai_completions import MODEL, TOKENIZER, completions, run

PROMPT = TOKENIZER.encode_chat([{"role": "user", "content": "Hi"}])


def chat(model: ServedModel = MODEL, **fields: Any) -> Chat:
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]} | fields
    return Chat(parse_body(msgspec.json.encode(body), ChatBody), model)


def chat_of(text: str, **fields: Any) -> Chat:
    return chat(messages=[{"role": "user", "content": text}], **fields)


def test_restrictions_reach_the_engine():
    params = chat(allowed_token_ids=[5, 6], bad_words=["cat"], repetition_penalty=3.5).requests[0].params
    assert params.allowed_token_ids == (5, 6) and params.repetition_penalty == 3.5
    assert tuple(TOKENIZER.encode(" cat")) in params.bad_word_ids


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"truncate_prompt_tokens": 3}, PROMPT[-3:]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, PROMPT[:3]),
        ({"truncate_prompt_tokens": -1, "max_tokens": 61}, PROMPT[-3:]),
        ({"truncate_prompt_tokens": -1}, PROMPT),
    ],
    ids=str,
)
def test_prompts_are_truncated_on_request(fields: dict[str, Any], expected: list[int]):
    assert chat(**fields).requests[0].prompt_token_ids == expected


@pytest.mark.parametrize("text", ["a b " * 1000, "<|im_end|>1 2 3 4 " * 1000], ids=["plain", "special"])
def test_text_that_is_far_too_long_is_not_read_to_its_end(text: str):
    for make, param in ((completions, "prompt"), (chat_of, "messages")):
        with pytest.raises(ApiError, match="in the first 504,") as caught:
            make(text)
        assert (caught.value.param, caught.value.code) == (param, "context_length_exceeded")
        assert len(make(text, truncate_prompt_tokens=9).requests[0].prompt_token_ids) == 9
    limited = dataclasses.replace(MODEL, limits=Limits(prompt_tokens=20))
    with pytest.raises(ApiError) as caught:
        completions(text, limited)
    assert caught.value.code == "prompt_too_long"


def test_the_server_may_say_how_much_to_make():
    model = dataclasses.replace(MODEL, defaults=GenerationDefaults(max_tokens=60))
    assert chat(model).requests[0].params.max_tokens == 64 - len(PROMPT)
    assert chat(model, max_tokens=5).requests[0].params.max_tokens == 5
    assert chat().requests[0].params.max_tokens is None


def test_a_clients_id_names_the_response_and_nothing_else():
    made = chat(request_id="mine")
    [whole], _ = run(made, [[8]], [])
    assert whole["id"] == "chatcmpl-mine" and "mine" not in made.requests[0].request_id


def test_token_ids_and_their_names_and_usage_come_along():
    asked = {
        "return_token_ids": True,
        "return_prompt_text": True,
        "logprobs": True,
        "top_logprobs": 1,
        "return_tokens_as_token_ids": True,
    }
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    made = [[8, 9, 10], [11]]
    [whole], usage = run(chat(n=2, **asked), made, [])
    assert [choice["token_ids"] for choice in whole["choices"]] == made
    assert whole["prompt_token_ids"] == PROMPT and whole["prompt_text"].endswith("<|im_start|>assistant\n")
    streaming = chat(n=2, stream=True, **asked, **options)
    chunks, _ = run(streaming, made, [1])
    opening = streaming.first_chunks()
    assert opening[0]["prompt_token_ids"] == PROMPT and opening[0]["prompt_text"] == whole["prompt_text"]
    for index, choice in enumerate(whole["choices"]):
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [token_id for chunk in own for token_id in chunk["choices"][0]["token_ids"]] == made[index]
        content = [item for chunk in own for item in chunk["choices"][0]["logprobs"]["content"]]
        assert content == choice["logprobs"]["content"]
        assert [item["token"] for item in content] == [f"token_id:{token_id}" for token_id in made[index]]
        assert own[-1]["usage"]["completion_tokens"] == len(made[index])
        assert own[-1]["usage"]["prompt_tokens"] == usage["prompt_tokens"]


def test_other_servers_names_are_known():
    made = chat(n_predict=7, repeat_penalty=1.5, no_stop_trim=True, rid="mine")
    params = made.requests[0].params
    assert (params.max_tokens, params.repetition_penalty) == (7, 1.5)
    assert made.text_options.include_stop and run(made, [[8]], [])[0][0]["id"] == "chatcmpl-mine"
    with pytest.raises(ApiError, match="n_predict"):
        chat(n_predict=7, max_tokens=8)


def test_an_answer_that_goes_on_is_tokenized_as_in_a_chat():
    fields = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, I"}]}
    fields |= {"continue_final_message": True}
    found = tokenize(parse_body(msgspec.json.encode(fields), TokenizeBody), MODEL)
    assert found["tokens"] == chat(**fields).requests[0].prompt_token_ids
