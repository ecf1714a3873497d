"""Completions: what the engine is asked for, and what becomes of its outputs, streamed or whole."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.request import EngineRequest, FinishReason, RequestOutput, TokenLogprobs
from engine.tokenizer import Tokenizer
from engine.weights.hub import resolve_model
from serve_app.config import Limits
from serve_app.http import parse_body
from serve_app.openai.completion_protocol import CompletionBody
from serve_app.openai.completions import Completions
from serve_app.openai.endpoint import Endpoint, ServedModel
from serve_app.openai.errors import ApiError
from serve_app.openai.generation import Generation
from serve_app.openai.prompts import FILL_ENDS
from serve_app.openai.sampling import GenerationDefaults
from serve_app.wire import ModelInfo

TOKENIZER = Tokenizer.from_dir(resolve_model("demo"))
END = TOKENIZER.token_to_id("<|im_end|>")
TEXT = TOKENIZER.encode("Hello there, žluťoučký kůň 🐎 and a test of it")
MODEL = ServedModel(
    "demo", 0, TOKENIZER, GenerationDefaults(), Limits(), ModelInfo(64, TOKENIZER.vocab_size, (END,), "fp_0", {})
)


def completions(prompt: Any = "Hello", model: ServedModel = MODEL, **fields: Any) -> Completions:
    return Completions(CompletionBody.model_validate({"model": "demo", "prompt": prompt} | fields), model)


def refusal(model: ServedModel = MODEL, **fields: Any) -> ApiError:
    """Why a body is refused."""
    body = msgspec.json.encode({"model": "demo", "prompt": "Hello"} | fields)
    with pytest.raises(ApiError) as caught:
        Completions(parse_body(body, CompletionBody), model)
    assert caught.value.status == 400
    return caught.value


class ScriptedClient:
    """An engine client whose choices' outputs are known beforehand, by the end of the request's id."""

    def __init__(self, outputs: dict[str, list[RequestOutput]]) -> None:
        self._outputs = outputs

    async def generate(self, request: EngineRequest) -> AsyncGenerator[RequestOutput, None]:
        for output in self._outputs[request.request_id.split("-", 2)[2]]:
            await asyncio.sleep(0)
            yield output


def entry(token_id: int, count: int) -> TokenLogprobs:
    """A made-up but reproducible log-probability, beside those of the likeliest tokens."""
    top = [(token_id * 7 + i) % TOKENIZER.vocab_size for i in range(count)]
    return TokenLogprobs(token_id, -((token_id % 50) / 8), 1 + token_id % 9, top, [-(i + 1) / 4 for i in range(count)])


def script(request: EngineRequest, token_ids: list[int], cuts: list[int]) -> list[RequestOutput]:
    """What an engine would say that made these tokens, cut into messages at some places."""
    params = request.params
    stop = next((i for i, token_id in enumerate(token_ids) if token_id == END), None)
    token_ids = token_ids if stop is None else token_ids[: stop + 1]
    bounds = [0, *sorted({cut % (len(token_ids) + 1) for cut in cuts}), len(token_ids)]
    found = []
    for start, end in pairwise(bounds):
        if start == end:
            continue
        part, is_last = token_ids[start:end], end == len(token_ids)
        scores = None if params.prompt_logprobs is None or start else request.prompt_token_ids[1:]
        found.append(
            RequestOutput(
                request.request_id,
                part,
                logprobs=None if params.logprobs is None else [entry(each, params.logprobs) for each in part],
                prompt_logprobs=None
                if scores is None
                else [entry(each, params.prompt_logprobs or 0) for each in scores],
                finish_reason=(FinishReason.LENGTH if stop is None else FinishReason.STOP) if is_last else None,
                stop_token_id=END if is_last and stop is not None else None,
                num_cached_tokens=16,
            )
        )
    return found


def run(endpoint: Endpoint, made: list[list[int]], cuts: list[int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The chunks of a stream, or the one response that is not streamed; and the usage."""
    outputs = {
        request.request_id.split("-", 2)[2]: script(request, made[index % len(made)], cuts)
        for index, request in enumerate(endpoint.requests)
    }

    async def answer() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        client: Any = ScriptedClient(outputs)
        generation = Generation(client, TOKENIZER, endpoint.requests, endpoint.text_options, endpoint.prompt_tokens)
        async with aclosing(generation.deltas()) as deltas:
            if not endpoint.stream:
                whole = endpoint.whole([delta async for delta in deltas], generation.usage)
                return [whole], whole["usage"]
            chunks = [chunk async for delta in deltas if (chunk := endpoint.chunk(delta)) is not None]
            return chunks, endpoint.usage_chunk(generation.usage)["usage"]

    return asyncio.run(answer())


def reassembled(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices that a stream's chunks make together."""
    found: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        whole = found.setdefault(choice["index"], {"index": choice["index"]})
        assert whole.get("finish_reason") is None, "nothing comes after the end"
        for name, value in choice.items():
            if name in ("text", "token_ids"):
                whole[name] = whole[name] + value if name in whole else value
            elif name == "logprobs" and value is not None:
                parts = whole.setdefault("logprobs", {column: [] for column in value})
                whole["logprobs"] = {column: parts[column] + value[column] for column in value}
            else:
                whole[name] = value
    return [found[index] for index in sorted(found)]


TOKEN_IDS = st.lists(st.sampled_from(TEXT) | st.integers(0, TOKENIZER.vocab_size - 1), min_size=1, max_size=12)
FIELDS = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["kůň and", ["a", "žluť"], TEXT[:3], [TEXT[:1], TEXT[1:4]]])},
    optional={
        "n": st.integers(1, 3),
        "echo": st.booleans(),
        "logprobs": st.integers(0, 3),
        "stop": st.lists(st.sampled_from(["e", "there", "kůň", "a t", "🐎"]), min_size=1, max_size=3),
        "stop_regex": st.sampled_from(["[xyz]", "t.*e", ["\\s\\w", "ů"]]),
        "min_tokens": st.integers(0, 6),
        "include_stop_str_in_output": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "return_token_ids": st.booleans(),
        "return_tokens_as_token_ids": st.booleans(),
        "truncate_prompt_tokens": st.sampled_from([-1, 1, 2]),
        "max_tokens": st.sampled_from([0, 12]),
    },
)


CUTS = st.lists(st.integers(0, 100), max_size=6)


@given(FIELDS, st.lists(TOKEN_IDS, min_size=1, max_size=4), CUTS, CUTS)
def test_a_stream_reassembled_is_the_whole(
    fields: dict[str, Any], made: list[list[int]], cuts: list[int], other_cuts: list[int]
):
    if fields.get("max_tokens") == 0:
        fields |= {"echo": True, "min_tokens": 0}
    [whole], usage = run(completions(**fields), made, cuts)
    chunks, usage_of_stream = run(completions(**fields, stream=True), made, other_cuts)
    assert reassembled(chunks) == whole["choices"]
    assert usage_of_stream == usage
    if fields.get("return_token_ids"):
        assert usage["completion_tokens"] == sum(len(choice["token_ids"]) for choice in whole["choices"])
    for choice in whole["choices"]:
        if choice["logprobs"] is not None:
            offsets = choice["logprobs"]["text_offset"]
            assert len({len(column) for column in choice["logprobs"].values()}) == 1
            assert offsets == sorted(offsets) and (not offsets or offsets[-1] <= len(choice["text"]) + 64)


@given(st.lists(TOKEN_IDS, min_size=2, max_size=2), CUTS)
def test_continuous_usage_counts_each_choice_up_to_the_whole(made: list[list[int]], cuts: list[int]):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks, usage = run(completions(n=2, stream=True, stream_options=options), made, cuts)
    last = {}
    for chunk in chunks:
        [choice], found = chunk["choices"], chunk["usage"]
        assert found["completion_tokens"] > last.get(choice["index"], {"completion_tokens": 0})["completion_tokens"]
        assert found["prompt_tokens"] == usage["prompt_tokens"]
        last[choice["index"]] = found
    assert sum(found["completion_tokens"] for found in last.values()) == usage["completion_tokens"]
    assert last[0]["prompt_tokens_details"] == usage["prompt_tokens_details"] == {"cached_tokens": 16}


def test_best_of_answers_with_the_likeliest():
    """Logprobs are -((id % 50) / 8), so these means are -1, -0.5, nothing at all, and -0.25."""
    made = [[8, 8], [4, 4, 4], [END], [0, 4]]
    endpoint = completions(n=2, best_of=4, return_token_ids=True)
    assert len(endpoint.requests) == 4 and all(request.params.logprobs == 0 for request in endpoint.requests)
    [whole], usage = run(endpoint, made, [])
    assert [(choice["index"], choice["token_ids"]) for choice in whole["choices"]] == [(0, [0, 4]), (1, [4, 4, 4])]
    assert all(choice["logprobs"] is None for choice in whole["choices"])
    assert usage["completion_tokens"] == 2 + 3 + 1 + 2


def test_best_of_keeps_prompts_apart_and_scores_them_once():
    endpoint = completions(["a", "the"], n=1, best_of=2, echo=True, logprobs=1, prompt_logprobs=0)
    assert [request.params.prompt_logprobs for request in endpoint.requests] == [1, None, 1, None]
    [whole], _ = run(endpoint, [[8], [4], [0], [8]], [])
    first, second = whole["choices"]
    assert first["text"] == "a" + TOKENIZER.decode([4]) and second["text"] == "the" + TOKENIZER.decode([0])
    for choice, prompt in ((first, "a"), (second, "the")):
        ids = TOKENIZER.encode(prompt)
        assert len(choice["prompt_logprobs"]) == len(ids) and len(choice["logprobs"]["tokens"]) == len(ids) + 1


def test_echoed_and_prompt_logprobs_have_their_own_counts():
    [whole], _ = run(completions(TEXT[:4], echo=True, logprobs=1, prompt_logprobs=3), [[8]], [])
    [choice] = whole["choices"]
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [2] * 4
    assert [len(top) for top in choice["prompt_logprobs"][1:]] == [4] * 3
    [whole], _ = run(completions(TEXT[:4], echo=True, logprobs=3, prompt_logprobs=0), [[8]], [])
    assert [len(top) for top in whole["choices"][0]["prompt_logprobs"][1:]] == [1] * 3


def test_without_a_choice_to_make_best_of_is_n():
    endpoint = completions(n=2, best_of=2, stream=True)
    assert len(endpoint.requests) == 2 and endpoint.requests[0].params.logprobs is None


def test_an_expression_ends_the_text_and_is_named():
    made = [TOKENIZER.encode("one two 3 four")]
    [whole], usage = run(completions(stop_regex=["zz", " \\d"], stop="four"), made, [])
    [choice] = whole["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one two", "stop", " \\d")
    assert usage["completion_tokens"] < len(made[0])


@pytest.mark.parametrize("fields", [{"stop": "a"}, {"stop_regex": "[aA]"}], ids=str)
def test_no_text_ends_an_output_before_its_least_tokens(fields: dict[str, Any]):
    made = TOKENIZER.encode("a b a c")
    [whole], usage = run(completions(min_tokens=1, **fields), [made], [])
    assert whole["choices"][0]["text"] == "a b "
    assert TOKENIZER.decode(made[: usage["completion_tokens"]]) == "a b a"


def test_the_prompts_text_comes_along():
    [whole], _ = run(completions([TEXT[:1], TEXT[:3]], n=2, return_prompt_text=True), [[8]], [])
    texts = [TOKENIZER.decode(TEXT[:count]) for count in (1, 1, 3, 3)]
    assert [choice["prompt_text"] for choice in whole["choices"]] == texts


def test_token_ids_name_tokens():
    [whole], _ = run(completions(logprobs=1, return_tokens_as_token_ids=True), [[8, 9]], [])
    assert whole["choices"][0]["logprobs"]["tokens"] == ["token_id:8", "token_id:9"]
    assert set(whole["choices"][0]["logprobs"]["top_logprobs"][0]) == {"token_id:8", "token_id:56"}


def test_a_suffix_makes_the_prompt_one_to_fill_in():
    prefix, suffix, middle = (TOKENIZER.token_to_id(f"<|fim_{name}|>") for name in ("prefix", "suffix", "middle"))
    before, after = TOKENIZER.encode("def f("), TOKENIZER.encode("): pass")
    for prompt in ("def f(", before):
        [request] = completions(prompt, suffix="): pass", stop_token_ids=[5]).requests
        assert request.prompt_token_ids == [prefix, *before, suffix, *after, middle]
        assert request.params.stop_token_ids == (5, *(TOKENIZER.token_to_id(token) for token in FILL_ENDS))
    [plain] = completions("def f(", suffix="").requests
    assert plain.prompt_token_ids == before and plain.params.stop_token_ids == ()
    assert completions("", suffix="x").requests[0].prompt_token_ids[0] == prefix
    assert completions("a", suffix="x", ignore_eos=True).requests[0].params.stop_token_ids == ()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, TEXT[:10]),
        ({"truncate_prompt_tokens": 4}, TEXT[6:10]),
        ({"truncate_prompt_tokens": 4, "truncation_side": "right"}, TEXT[:4]),
        ({"truncate_prompt_tokens": 10}, TEXT[:10]),
        ({"truncate_prompt_tokens": -1, "max_tokens": 60}, TEXT[6:10]),
        ({"truncate_prompt_tokens": -1, "max_tokens": 60, "truncation_side": "right"}, TEXT[:4]),
        ({"truncate_prompt_tokens": -1}, TEXT[:10]),
    ],
    ids=str,
)
def test_prompts_are_truncated_on_request(fields: dict[str, Any], expected: list[int]):
    endpoint = completions(TEXT[:10], **fields, echo=True)
    assert endpoint.requests[0].prompt_token_ids == expected and endpoint.prompt_tokens == len(expected)
    [whole], _ = run(endpoint, [[8]], [])
    assert whole["choices"][0]["text"] == TOKENIZER.decode(expected) + TOKENIZER.decode([8])


def test_truncating_is_for_any_length():
    assert len(completions(TEXT * 10, truncate_prompt_tokens=-1).requests[0].prompt_token_ids) == 64 - 16


def test_the_server_may_say_how_much_to_make():
    model = dataclasses.replace(MODEL, defaults=GenerationDefaults(max_tokens=40))
    found = [completions(TEXT[:length], model).requests[0].params.max_tokens for length in (10, 30)]
    assert found == [40, 34]
    assert completions(TEXT[:10], model, max_tokens=3).requests[0].params.max_tokens == 3
    assert len(completions(TEXT * 10, model, truncate_prompt_tokens=-1).requests[0].prompt_token_ids) == 64 - 40


def test_a_clients_id_names_the_response_and_nothing_else():
    first, second = (completions(request_id="mine") for _ in range(2))
    [whole], _ = run(first, [[8]], [])
    assert whole["id"] == "cmpl-mine"
    assert first.requests[0].request_id != second.requests[0].request_id


def test_n_choices_have_seeds_of_their_own():
    seeds = [request.params.seed for request in completions(["a", "b"], n=3, seed=7).requests]
    assert seeds[:3] == seeds[3:] and len(set(seeds[:3])) == 3 and seeds[0] == 7


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"n": 17}, "n"),
        ({"prompt": ["a"] * 17, "n": 16}, "prompt"),
        ({"best_of": 17}, "best_of"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"suffix": "x", "echo": True}, "suffix"),
        ({"suffix": "x", "truncate_prompt_tokens": 3}, "suffix"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"stream_options": {"continuous_usage_stats": True}, "stream": True}, "stream_options.continuous_usage_stats"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words.0"),
        ({"bad_words": [f"{number} is one of many " * 8 for number in range(128)]}, "bad_words"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 64}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop_regex": ["a", "b", "c", "d", "e"]}, "stop_regex"),
        ({"stop_regex": "x" * 257}, "stop_regex"),
        ({"stop_regex": "(a"}, "stop_regex"),
        ({"stop_regex": "a", "stop": ["b" * 1000]}, "stop_regex"),
        ({"store": True}, "store"),
        ({"request_id": "two words"}, "request_id"),
        ({"logprob_token_ids": [5]}, "logprob_token_ids"),
        ({"tools": []}, "tools"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_done_is_refused_by_name(fields: dict[str, Any], param: str):
    assert refusal(**fields).param == param


def test_all_prompts_together_are_limited():
    model = dataclasses.replace(MODEL, limits=Limits(prompt_tokens=20))
    completions([TEXT[:10]] * 2, model, n=3)
    found = refusal(model, prompt=[TEXT[:10]] * 3)
    assert found.param == "prompt" and found.code == "prompt_too_long" and "30" in found.message


def test_an_adapter_is_asked_for_by_the_models_name():
    model = dataclasses.replace(MODEL, has_adapters=True)
    assert [request.adapter for request in completions(model=model, n=2).requests] == ["", ""]
    body = CompletionBody(model="demo:sql-1.5", prompt="Hello")
    adapted = Completions(body, model)
    assert adapted.requests[0].adapter == "sql-1.5"
    for name in ("demo:", "demo:../x", "demo:a:b", "other", "demo.sql", "demo:" + "a" * 65, "sql"):
        with pytest.raises(ApiError, match="expected 'demo' or 'demo:ADAPTER'") as caught:
            Completions(CompletionBody(model=name, prompt="Hello"), model)
        assert (caught.value.status, caught.value.param) == (404, "model")
    with pytest.raises(ApiError, match=r"'demo:sql' does not exist here, expected 'demo'$"):
        Completions(CompletionBody(model="demo:sql", prompt="Hello"), MODEL)


def test_filling_in_needs_a_tokenizer_that_knows_how():
    class Plain:
        """A tokenizer without special tokens."""

        def token_to_id(self, token: str) -> None: ...
        def encode(self, text: str, **_: Any) -> list[int]:
            return TOKENIZER.encode(text)

    other: Any = Plain()
    model = ServedModel("demo", 0, other, GenerationDefaults(), Limits(), MODEL.info)
    found = refusal(model=model, suffix="x")
    assert found.param == "suffix" and "<|fim_prefix|>" in found.message


def test_fields_of_the_clients_own_change_nothing():
    own = {"user": "u", "metadata": {"k": "v"}, "safety_identifier": "s", "prompt_cache_key": "p", "store": False}
    plain, marked = (completions(**fields).requests[0] for fields in ({}, own | {"service_tier": "auto"}))
    assert plain.params == marked.params and plain.prompt_token_ids == marked.prompt_token_ids
