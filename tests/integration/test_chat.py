"""/v1/chat/completions through the `openai` client. Greedy, so that answers can be compared."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from openai import OpenAI

from engine.tokenizer import Tokenizer
from engine.weights.hub import resolve_model

GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0}
LONG_TEXT = "the quick brown fox jumps over the lazy dog and " * 12


def ask(client: OpenAI, text: str = "Hello", **fields: Any) -> Any:
    return client.chat.completions.create(messages=[{"role": "user", "content": text}], **(GREEDY | fields))


def read(stream: Iterator[Any]) -> dict[str, Any]:
    """A stream of one choice, put together again."""
    chunks = list(stream)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    logprobs = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    return {
        "ids": {chunk.id for chunk in chunks},
        "role": choices[0].delta.role,
        "text": "".join(choice.delta.content or "" for choice in choices),
        "logprobs": logprobs,
        "finish_reasons": [choice.finish_reason for choice in choices if choice.finish_reason],
        "usage": [chunk.usage for chunk in chunks if chunk.usage],
    }


def test_an_answer_has_all_that_clients_look_at(client: OpenAI):
    answer = ask(client)
    choice = answer.choices[0]
    assert answer.object == "chat.completion" and answer.model == "demo" and answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint
    assert choice.index == 0 and choice.message.role == "assistant" and choice.message.refusal is None
    assert choice.message.content and choice.finish_reason == "stop" and choice.logprobs is None
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens > 0 and usage.prompt_tokens_details.cached_tokens >= 0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 5},
        {"stop": ["demo", "never there"]},
        {"logprobs": True, "top_logprobs": 3},
        {"extra_body": {"ignore_eos": True, "min_tokens": 10}, "max_tokens": 60},
        {"temperature": 0.9, "seed": 7, "max_tokens": 40},
    ],
    ids=["plain", "length", "stop", "logprobs", "past the end", "seed"],
)
def test_a_stream_says_what_the_whole_answer_says(client: OpenAI, fields: dict[str, Any]):
    whole = ask(client, **fields)
    streamed = read(ask(client, **fields, stream=True, stream_options={"include_usage": True}))
    choice = whole.choices[0]
    assert streamed["text"] == choice.message.content
    assert streamed["role"] == "assistant" and len(streamed["ids"]) == 1
    assert streamed["finish_reasons"] == [choice.finish_reason]
    assert [entry.token for entry in streamed["logprobs"]] == [
        entry.token for entry in (choice.logprobs.content if choice.logprobs else [])
    ]
    [usage] = streamed["usage"]
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_the_events_of_a_stream(http: httpx.Client):
    body = {**GREEDY, "messages": [{"role": "user", "content": "Hello"}], "stream": True, "max_tokens": 4}
    response = http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    first = httpx.Response(200, content=events[0].removeprefix("data: ")).json()
    last = httpx.Response(200, content=events[-3].removeprefix("data: ")).json()
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0]["finish_reason"] == "length"
    assert '"usage"' not in response.text


def test_a_body_needs_no_content_type(http: httpx.Client):
    """`curl -d` says that it sends a form."""
    body = '{"model":"demo","messages":[{"role":"user","content":"Hello"}],"max_tokens":2}'
    for headers in ({"content-type": "application/x-www-form-urlencoded"}, {}):
        assert http.post("/v1/chat/completions", content=body, headers=headers).status_code == 200


def test_content_in_parts_and_null_fields_are_plain_text(client: OpenAI):
    parts = [{"type": "text", "text": "Hello"}]
    whole = client.chat.completions.create(
        messages=[{"role": "user", "content": parts}], **GREEDY, stop=None, logit_bias=None, user="someone"
    )
    assert whole.choices[0].message.content == ask(client).choices[0].message.content


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(client: OpenAI):
    text = ask(client).choices[0].message.content
    word = text.split()[-2]
    stopped = ask(client, stop=[word, "never there"])
    choice = stopped.choices[0]
    assert choice.message.content == text[: text.index(word)]
    assert choice.finish_reason == "stop" and choice.stop_reason == word
    assert stopped.usage.completion_tokens < ask(client).usage.completion_tokens


def test_a_stop_token_ends_the_answer(client: OpenAI):
    text = ask(client).choices[0].message.content
    token_id = Tokenizer.from_dir(resolve_model("demo")).encode(text)[3]
    choice = ask(client, extra_body={"stop_token_ids": [token_id]}).choices[0]
    assert choice.finish_reason == "stop" and choice.stop_reason == token_id
    assert text.startswith(choice.message.content) and choice.message.content != text


def test_logprobs_have_the_true_bytes_of_the_answer(client: OpenAI):
    fields = {"separate_reasoning": False}  # so that the content is the whole output
    answer = ask(client, "Repeat after me: žluťoučký kůň", logprobs=True, top_logprobs=2, extra_body=fields)
    choice = answer.choices[0]
    content = choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace") == choice.message.content
    for entry in content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        # Greedy: the token is the likeliest one, with the same number.
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)


def test_choices_have_seeds_of_their_own(client: OpenAI):
    free = {"ignore_eos": True, "top_k": 0}
    fields = {"temperature": 2, "top_p": 1, "seed": 11, "max_tokens": 48, "extra_body": free}
    both = ask(client, n=2, **fields)
    texts = [choice.message.content for choice in both.choices]
    assert [choice.index for choice in both.choices] == [0, 1]
    assert texts[0] != texts[1]
    # Beginnings only: arithmetic differs in the last bits with the size of the batch, and this hot it shows in the end.
    again = [choice.message.content[:16] for choice in ask(client, n=2, **fields).choices]
    assert [text[:16] for text in texts] == again
    assert ask(client, **fields).choices[0].message.content[:16] == again[0]
    assert both.usage.completion_tokens == 96


def test_choices_come_side_by_side_in_a_stream(client: OpenAI):
    texts = {0: "", 1: "", 2: ""}
    finished = []
    for chunk in ask(client, n=3, stream=True, max_tokens=10):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                finished.append(choice.index)
    assert sorted(finished) == [0, 1, 2]
    assert set(texts.values()) == {ask(client, max_tokens=10).choices[0].message.content}


def test_an_equal_beginning_comes_from_the_cache(client: OpenAI):
    first, second = (ask(client, LONG_TEXT, max_tokens=2).usage for _ in range(2))
    assert second.prompt_tokens_details.cached_tokens > first.prompt_tokens_details.cached_tokens
    assert second.prompt_tokens_details.cached_tokens < second.prompt_tokens == first.prompt_tokens
    salted = ask(client, LONG_TEXT, max_tokens=2, extra_body={"cache_salt": "another tenant"}).usage
    assert salted.prompt_tokens_details.cached_tokens == 0


def test_32_chats_at_once_get_the_answers_they_get_alone(client: OpenAI):
    questions = [f"Repeat after me: word {number} and {number * 7}" for number in range(32)]
    alone = [ask(client, question).choices[0].message.content for question in questions[:4]]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda question: read(ask(client, question, stream=True)), questions))
    assert [answer["text"] for answer in together[:4]] == alone
    assert all(answer["finish_reasons"] == ["stop"] and answer["text"] for answer in together)


def test_thinking_is_told_apart_and_can_be_turned_off(client: OpenAI):
    question = "What is 2 + 3?"
    answer = ask(client, question)
    message = answer.choices[0].message
    assert message.content.startswith("2 + 3 = 5")
    assert message.reasoning == message.reasoning_content and message.reasoning
    assert "think>" not in message.content + message.reasoning
    counted = answer.usage.completion_tokens_details.reasoning_tokens
    assert 0 < counted < answer.usage.completion_tokens
    for off in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        direct = ask(client, question, extra_body=off)
        assert direct.choices[0].message.content.startswith("2 + 3 = 5")
        assert direct.choices[0].message.reasoning is None
        assert direct.usage.completion_tokens_details.reasoning_tokens == 0
    raw = ask(client, question, extra_body={"separate_reasoning": False}).choices[0].message
    assert raw.content.startswith("<think>\n") and raw.content.endswith(f"</think>\n\n{message.content}")


def test_thinking_is_streamed_under_both_names(client: OpenAI):
    whole = ask(client, "What is 2 + 3?")
    chunks = list(ask(client, "What is 2 + 3?", stream=True, stream_options={"include_usage": True}))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    reasoning = "".join(getattr(delta, "reasoning", None) or "" for delta in deltas)
    assert reasoning == "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert reasoning == whole.choices[0].message.reasoning
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens_details == whole.usage.completion_tokens_details


def test_reasoning_can_be_sent_back_under_both_names(client: OpenAI):
    """The template drops it from turns before the last question, so that it costs nothing there."""
    question: Any = {"role": "user", "content": "What is 2 + 3?"}
    message = ask(client, "What is 2 + 3?").choices[0].message.model_dump()
    counts = set()
    for left_out in ("reasoning", "reasoning_content", ""):
        turn: Any = {key: value for key, value in message.items() if key != left_out}
        messages: Any = [question, turn, {"role": "user", "content": "And 3 + 4?"}]
        counts.add(client.chat.completions.create(messages=messages, **GREEDY).usage.prompt_tokens)
    assert len(counts) == 1


def test_thinking_ends_when_its_budget_is_spent(client: OpenAI):
    question = "What is 12 + 3?"
    free = ask(client, question)
    assert free.usage.completion_tokens_details.reasoning_tokens > 5
    for name in ("thinking_token_budget", "thinking_budget"):
        short = ask(client, question, extra_body={name: 5})
        assert short.usage.completion_tokens_details.reasoning_tokens == 5
        message = short.choices[0].message
        assert message.content and free.choices[0].message.reasoning.startswith(message.reasoning)
    streamed = read(ask(client, question, extra_body={"thinking_budget": 5}, stream=True))
    assert streamed["text"] == message.content


def test_a_message_is_continued(client: OpenAI):
    text = ask(client).choices[0].message.content
    messages: Any = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": text[:5]}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    answer = client.chat.completions.create(messages=messages, **GREEDY, extra_body=fields)
    assert answer.choices[0].message.content and not answer.choices[0].message.content.startswith(text[:5])


def test_an_answer_can_be_sent_back(client: OpenAI):
    """Both as the client's object and as all of its fields, those that are null included."""
    question: Any = {"role": "user", "content": "Hello"}
    message = ask(client).choices[0].message
    for turn in (message, message.model_dump()):
        messages: Any = [question, turn, {"role": "user", "content": "Who are you?"}]
        assert client.chat.completions.create(messages=messages, **GREEDY).choices[0].message.content
