"""Token ids to text, the same however they are cut into messages; choices side by side; what a choice leaves behind."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.errors import QueueFullError
from engine.request import EngineRequest, FinishReason, RequestOutput, SamplingParams, TokenLogprobs
from engine.tokenizer import Tokenizer
from engine.weights.hub import resolve_model
from serve_app.openai.errors import ApiError, overloaded
from serve_app.openai.generation import Delta, Generation, TextOptions, Usage, _Reader

TOKENIZER = Tokenizer.from_dir(resolve_model("demo"))
END = TOKENIZER.token_to_id("<|im_end|>")
TEXT = TOKENIZER.encode("Hello there, žluťoučký kůň 🐎 and a test of it")


class LocalClient:
    """EngineClient without Ray: the engine is in this process."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    async def generate(self, request: EngineRequest) -> AsyncGenerator[RequestOutput, None]:
        try:
            async with aclosing(self.engine.generate(request)) as outputs:
                async for output in outputs:
                    yield output
        except QueueFullError:
            raise overloaded() from None


@pytest.fixture
async def client() -> AsyncIterator[LocalClient]:
    engine = AsyncEngine(
        EngineConfig(kv_cache_memory=16 * 2**20, max_num_seqs=4, max_num_waiting=4, num_threads=1, show_progress=False)
    )
    yield LocalClient(engine)
    await engine.stop()


def request(number: int = 0, prompt: list[int] = TEXT, **params: Any) -> EngineRequest:
    values = {"temperature": 0, "max_tokens": 8, "ignore_eos": True} | params
    return EngineRequest(request_id=f"r{number}", prompt_token_ids=prompt, params=SamplingParams(**values))


def generation(client: LocalClient, *requests: EngineRequest, **options: Any) -> Generation:
    return Generation(client, TOKENIZER, list(requests), TextOptions(**options), prompt_tokens=0)


async def read_all(stream: AsyncIterator[Delta]) -> list[Delta]:
    return [delta async for delta in stream]


def entry(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -1.0, 1, [], [])


def outputs(token_ids: list[int], cuts: list[int], stops_by_token: bool) -> list[RequestOutput]:
    """One request's output, cut into messages at some places, the last of them with the finish reason."""
    bounds = [0, *sorted({cut % (len(token_ids) + 1) for cut in cuts}), len(token_ids)]
    parts = [token_ids[start:end] for start, end in pairwise(bounds) if start < end]
    found = [RequestOutput("r", part, logprobs=list(map(entry, part)), num_cached_tokens=16) for part in parts]
    reason = FinishReason.STOP if stops_by_token else FinishReason.LENGTH
    stop = token_ids[-1] if stops_by_token else None
    last = found.pop()
    return [*found, RequestOutput("r", last.token_ids, last.logprobs, None, reason, stop, num_cached_tokens=16)]


def read(parts: list[RequestOutput], stop: list[str], **options: Any) -> tuple[Any, ...]:
    reader = _Reader(0, request(stop=tuple(stop)), TOKENIZER, TextOptions(**options))
    usage, deltas = Usage(), []
    for part in parts:
        deltas.append(reader.read(part, usage))
        if deltas[-1].finish_reason is not None:
            break
    logprobs = [found.token_id for delta in deltas for found in delta.logprobs]
    text = "".join(delta.text for delta in deltas)
    return text, logprobs, deltas[-1].finish_reason, deltas[-1].stop_reason, usage


TOKEN_IDS = st.lists(st.sampled_from(TEXT) | st.integers(0, TOKENIZER.vocab_size - 1), min_size=1, max_size=24)


@given(
    TOKEN_IDS,
    st.lists(st.integers(0, 100), max_size=8),
    st.lists(st.sampled_from(["e", "there", "kůň", "a t", "🐎", "zz"]), max_size=3),
    st.booleans(),
    st.booleans(),
)
def test_how_outputs_are_cut_changes_nothing(
    token_ids: list[int], cuts: list[int], stop: list[str], stops_by_token: bool, include_stop: bool
):
    whole = read(outputs(token_ids, [], stops_by_token), stop, include_stop=include_stop)
    assert read(outputs(token_ids, cuts, stops_by_token), stop, include_stop=include_stop) == whole
    text, logprobs, reason, stop_reason, usage = whole
    assert usage.cached_tokens == 16 and 1 <= usage.completion_tokens <= len(token_ids)
    if stop_reason is None or isinstance(stop_reason, int):
        shown = token_ids[:-1] if stops_by_token else token_ids
        assert text == TOKENIZER.decode(shown) and logprobs == shown and usage.completion_tokens == len(token_ids)
        assert not any(word in text for word in stop)
    else:
        assert reason == "stop" and stop_reason in stop
        assert text.endswith(stop_reason) if include_stop else stop_reason not in text
        assert logprobs == token_ids[: usage.completion_tokens]


def test_the_token_that_ends_the_output_is_counted_but_not_shown():
    text, logprobs, reason, stop_reason, usage = read(outputs([*TEXT, END], [3], True), [])
    assert (text, reason, stop_reason) == (TOKENIZER.decode(TEXT), "stop", END)
    assert logprobs == TEXT and usage.completion_tokens == len(TEXT) + 1


def test_special_tokens_are_shown_on_request():
    parts = outputs([*TEXT[:2], END, *TEXT[2:]], [], False)
    assert read(parts, [])[0] == TOKENIZER.decode(TEXT)
    assert "<|im_end|>" in read(parts, [], skip_special_tokens=False)[0]


@pytest.mark.parametrize(("reason", "status"), [(FinishReason.ERROR, 500), (FinishReason.ABORT, 503)])
def test_an_engines_failure_is_an_error_without_internals(reason: FinishReason, status: int):
    failed = RequestOutput("r", [], finish_reason=reason, error="engine fault: KeyError: /home/somebody")
    with pytest.raises(ApiError) as caught:
        read([failed], [])
    assert caught.value.status == status and "KeyError" not in str(caught.value.body())


async def test_choices_come_in_order_of_their_making_and_each_ends_once(client: LocalClient):
    made = generation(client, *(request(number, max_tokens=number + 2) for number in range(4)), choices_per_prompt=2)
    deltas = await read_all(made.deltas())
    assert [delta.index for delta in deltas[:4]] == [0, 1, 2, 3]
    assert sorted(delta.index for delta in deltas if delta.finish_reason == "length") == [0, 1, 2, 3]
    assert made.usage.completion_tokens == 2 + 3 + 4 + 5


async def test_cached_tokens_count_once_for_each_prompt(client: LocalClient):
    await read_all(generation(client, request(0, TEXT * 3)).deltas())
    alone = generation(client, request(1, TEXT * 3))
    await read_all(alone.deltas())
    made = generation(client, *(request(number, TEXT * 3) for number in (2, 3)), choices_per_prompt=2)
    await read_all(made.deltas())
    assert made.usage.cached_tokens == alone.usage.cached_tokens > 0


@pytest.mark.parametrize("count", [1, 3])
async def test_leaving_early_aborts_every_choice(client: LocalClient, count: int):
    made = generation(client, *(request(number, max_tokens=1000) for number in range(count)))
    async with aclosing(made.deltas()) as deltas:
        await anext(deltas)
        assert client.engine.stats().num_running == count
    await until_free(client.engine)


async def test_a_stop_string_aborts_the_request_in_the_engine(client: LocalClient):
    made = generation(client, request(max_tokens=1000, stop=tuple("abcdefghijklmnopqrstuvwxyz")))
    assert (await read_all(made.deltas()))[-1].finish_reason == "stop"
    assert made.usage.completion_tokens < 1000
    await until_free(client.engine)


async def test_a_refused_choice_takes_the_others_with_it_before_any_of_them_is_heard(client: LocalClient):
    """The engine runs 4, and 4 may wait."""
    made = generation(client, *(request(number, max_tokens=1000) for number in range(30)))
    with pytest.raises(ApiError) as caught:
        await anext(made.deltas())
    assert caught.value.status == 429 and caught.value.retry_after_s is not None
    await until_free(client.engine)


async def until_free(engine: AsyncEngine) -> None:
    async with asyncio.timeout(60):
        while (stats := engine.stats()).num_owned_blocks or stats.num_running or stats.num_waiting:
            await asyncio.sleep(0.01)
