"""/v1/completions through the `openai` client."""

from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from engine.tokenizer import Tokenizer
from engine.weights.hub import resolve_model

WILD = {"temperature": 2, "top_p": 1, "seed": 3, "extra_body": {"top_k": 0, "ignore_eos": True}}
"""Choices differ."""
PROMPT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(resolve_model("demo"))


def complete(client: OpenAI, prompt: Any = PROMPT, **fields: Any) -> Any:
    return client.completions.create(prompt=prompt, **({"model": "demo", "temperature": 0} | fields))


def test_a_completion_is_sixteen_tokens_unless_told_otherwise(client: OpenAI):
    answer = complete(client, extra_body={"ignore_eos": True})
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].logprobs is None


def test_text_and_ids_are_the_same_prompt(client: OpenAI, tokenizer: Tokenizer):
    ids = tokenizer.encode(PROMPT)
    texts = [complete(client, prompt).choices[0].text for prompt in (PROMPT, [PROMPT], ids, [ids])]
    assert len(set(texts)) == 1


def test_choices_are_ordered_by_prompt(client: OpenAI):
    prompts = [PROMPT, "1 2 3 4", "the"]
    answer = complete(client, prompts, n=2, max_tokens=6)
    assert [choice.index for choice in answer.choices] == list(range(6))
    alone = [complete(client, prompt, max_tokens=6).choices[0].text for prompt in prompts]
    assert [choice.text for choice in answer.choices] == [text for text in alone for _ in range(2)]
    assert answer.usage.prompt_tokens == sum(complete(client, prompt).usage.prompt_tokens for prompt in prompts)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"echo": True},
        {"echo": True, "logprobs": 2},
        {"n": 2, "temperature": 1, "seed": 5, "logprobs": 1, "echo": True},
        {"stop": ["e", "o "], "logprobs": 0, "max_tokens": 40},
        {"stop": "zz", "logprobs": 0, "max_tokens": 40, "extra_body": {"stop_regex": ["[!?.]", "\\w+, "]}},
        {"n": 2, "extra_body": {"return_token_ids": True, "return_tokens_as_token_ids": True}, "logprobs": 0},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"suffix": "and after", "extra_body": {"min_tokens": 4, "include_stop_str_in_output": True}, "stop": " "},
    ],
    ids=str,
)
def test_a_stream_says_what_the_whole_completion_says(client: OpenAI, fields: dict[str, Any]):
    whole = complete(client, **fields)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = complete(client, **fields, stream=True, stream_options=options)
    assert [choice.model_dump() for choice in whole.choices] == reassembled(chunks)
    # The second time, the prompt's blocks may come from the cache.
    assert counts(last.usage) == counts(whole.usage) and last.choices == []
    assert all(chunk.usage.prompt_tokens == last.usage.prompt_tokens for chunk in chunks)
    ends = [chunk.usage.completion_tokens for chunk in chunks if chunk.choices[0].finish_reason]
    assert sum(ends) == last.usage.completion_tokens


def counts(usage: Any) -> tuple[int, int, int]:
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def reassembled(chunks: list[Any]) -> list[dict[str, Any]]:
    """The choices that a stream's chunks make together."""
    found: dict[int, dict[str, Any]] = {}
    for choice in (choice.model_dump() for chunk in chunks for choice in chunk.choices):
        whole = found.setdefault(choice["index"], {})
        for name, value in choice.items():
            if name in ("text", "token_ids") and name in whole:
                whole[name] += value
            elif name == "logprobs" and whole.get(name) is not None:
                whole[name] = {column: whole[name][column] + value[column] for column in value}
            else:
                whole[name] = value
    return [found[index] for index in sorted(found)]


def test_greedy_choices_are_the_same_and_sampled_ones_are_not(client: OpenAI):
    greedy = complete(client, n=3)
    assert len({choice.text for choice in greedy.choices}) == 1
    assert greedy.usage.completion_tokens == 3 * complete(client).usage.completion_tokens
    first, again = (complete(client, "the", n=3, **WILD) for _ in range(2))
    assert len({choice.text for choice in first.choices}) == 3
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]


def test_the_best_are_of_those_that_n_would_make(client: OpenAI):
    made = complete(client, "the", n=4, logprobs=0, **WILD)
    best = complete(client, "the", n=2, best_of=4, **WILD)
    likeliest = sorted(made.choices, key=lambda choice: -sum(choice.logprobs.token_logprobs))
    assert [choice.text for choice in best.choices] == [choice.text for choice in likeliest[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.usage.completion_tokens == made.usage.completion_tokens == 64


def test_a_search_answers_with_the_likeliest_first(client: OpenAI, tokenizer: Tokenizer):
    asked = {"use_beam_search": True, "ignore_eos": True, "return_token_ids": True}
    found = complete(client, n=3, max_tokens=5, extra_body=asked)
    prompt = tokenizer.encode(PROMPT)
    scored = complete(
        client, [prompt + choice.token_ids for choice in found.choices], max_tokens=0, echo=True, logprobs=0
    )
    sums = [sum(choice.logprobs.token_logprobs[-5:]) for choice in scored.choices]
    assert len(set(sums)) == 3 and sums == sorted(sums, reverse=True)
    assert found.usage.completion_tokens == 15 and found.usage.prompt_tokens == len(prompt)


def test_restrictions_hold(client: OpenAI, tokenizer: Tokenizer):
    digits = tokenizer.encode("0123456789")
    only = complete(client, temperature=1, extra_body={"allowed_token_ids": digits, "return_token_ids": True})
    assert set(only.choices[0].token_ids) <= set(digits)
    assert only.choices[0].prompt_token_ids == tokenizer.encode(PROMPT)
    scores = complete(client, logprobs=1, extra_body={"logprob_token_ids": digits}).choices[0].logprobs
    for token, top in zip(scores.tokens, scores.top_logprobs, strict=True):
        assert set(top) == {*"0123456789", token}
    plain = complete(client).choices[0].text
    word = plain.split()[0]
    assert word not in complete(client, extra_body={"bad_words": [word]}).choices[0].text
    biased = complete(client, max_tokens=1, logit_bias={str(digits[3]): 100})
    assert biased.choices[0].text == "3"


def test_a_truncated_prompt_is_what_is_left(client: OpenAI, tokenizer: Tokenizer):
    ids = tokenizer.encode("the quick brown fox")
    answer = complete(client, ids, extra_body={"truncate_prompt_tokens": 3})
    assert answer.usage.prompt_tokens == 3
    assert answer.choices[0].text == complete(client, ids[-3:]).choices[0].text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"logprob_token_ids": [5]}, "logprob_token_ids"),
        ({"logprob_token_ids": [10**6], "logprobs": 1}, "logprob_token_ids"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"use_beam_search": True, "stop": "x"}, "stop"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_by_name(client: OpenAI, fields: dict[str, Any], param: str):
    with pytest.raises(BadRequestError) as caught:
        complete(client, extra_body=fields)
    assert caught.value.body["param"] == param and param in caught.value.body["message"]


def test_echo_with_logprobs_scores_the_prompt(client: OpenAI, tokenizer: Tokenizer):
    """As evaluation harnesses ask: ids in, the log-probability of every token but the first out."""
    prompt = "the quick brown fox žluťoučký"
    ids = tokenizer.encode(prompt)
    choice = complete(client, ids, echo=True, logprobs=1, max_tokens=1).choices[0]
    scores = choice.logprobs
    assert choice.text.startswith(prompt)
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset) == len(ids) + 1
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    for token, logprob, top in zip(scores.tokens[1:], scores.token_logprobs[1:], scores.top_logprobs[1:], strict=True):
        assert logprob <= 0 and top[token] == logprob and 1 <= len(top) <= 2
    offsets = scores.text_offset
    assert offsets[0] == 0 and offsets == sorted(offsets) and offsets[-1] <= len(choice.text)
    for position, (offset, token) in enumerate(zip(offsets, scores.tokens, strict=True)):
        if not token.startswith("bytes:"):
            assert choice.text[offset : offset + len(token)] == token, position


def test_nothing_but_the_prompt_can_be_asked_for(client: OpenAI, tokenizer: Tokenizer):
    ids = tokenizer.encode("the quick brown fox")
    answer = complete(client, ids, echo=True, logprobs=0, max_tokens=0)
    assert answer.choices[0].text == "the quick brown fox"
    assert len(answer.choices[0].logprobs.tokens) == len(ids)
    assert answer.usage.completion_tokens == 0
