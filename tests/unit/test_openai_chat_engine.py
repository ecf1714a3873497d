"""Chats with a real engine behind them: forced and strict calls, budgets, and streams that say what the whole says."""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
import pytest_asyncio
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from serve_app.openai.generation import Generation
from tests.unit.test_openai_chat import HELLO, TOKENIZER, chat, comparable
from tests.unit.test_openai_generation import LocalClient

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": CITY}} for name in ("get_time", "see_city")]
STRICT = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS]  # type: ignore[operator]
ONE = {"tools": TOOLS, "parallel_tool_calls": False}
NAMED = {"type": "function", "function": {"name": "get_time"}}
PARIS = [{"role": "user", "content": "See the city of Paris."}]
SUM = [{"role": "user", "content": "What is 12 + 3?"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[LocalClient]:
    engine = AsyncEngine(EngineConfig(kv_cache_memory=16 * 2**20, max_num_seqs=4, num_threads=1, show_progress=False))
    yield LocalClient(engine)
    await engine.stop()


async def answer(client: LocalClient, **fields: Any) -> dict[str, Any]:
    """A chat's response, which is the same when it is streamed."""
    whole, streamed = [
        await run(client, temperature=0, max_tokens=200, stream=stream, **fields) for stream in (False, True)
    ]
    assert comparable(streamed) == comparable(json.loads(json.dumps(whole)))
    return whole


async def run(client: LocalClient, **fields: Any) -> dict[str, Any]:
    made: Any = chat(**fields)
    state, found = ChatCompletionStreamState(), []
    generation = Generation(client, TOKENIZER, made.requests, made.text_options, made.prompt_tokens)  # type: ignore[arg-type]
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            found.append(delta)
            if made.stream:
                for chunk in [*(made.first_chunks() if len(found) == 1 else ()), made.chunk(delta)]:
                    if chunk is not None:
                        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    if not made.stream:
        return ChatCompletion.model_validate(made.whole(found, generation.usage)).model_dump()
    return state.current_completion_snapshot.model_dump() | {"usage": generation.usage.body()}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("thinking", [{}, {"thinking_budget": 2}, {"reasoning_effort": "none"}], ids=str)
@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")], ids=["required", "named"])
async def test_a_call_that_must_be_made_is_made(
    client: LocalClient, choice: Any, reason: str, thinking: dict[str, Any]
):
    """Of one who just says hello."""
    response = await answer(client, messages=HELLO, tool_choice=choice, **ONE, **thinking)
    [choice_made] = response["choices"]
    [call] = choice_made["message"]["tool_calls"]
    assert choice_made["finish_reason"] == reason and choice_made["message"]["content"] is None
    assert call["function"]["name"] == ("get_time" if choice is NAMED else call["function"]["name"])
    assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome")
    num_reasoning = response["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert num_reasoning <= thinking.get("thinking_budget", 0 if "reasoning_effort" in thinking else 100)


@pytest.mark.asyncio(loop_scope="module")
async def test_strict_functions_are_held_to_their_schemas(client: LocalClient):
    free = await answer(client, messages=PARIS, tools=TOOLS, reasoning_effort="none")
    held = await answer(client, messages=PARIS, tools=STRICT, reasoning_effort="none")
    for response, cities in ((free, {"Paris", "Oslo", "Rome"}), (held, {"Oslo", "Rome"})):
        for call in response["choices"][0]["message"]["tool_calls"] or ():
            assert json.loads(call["function"]["arguments"])["city"] in cities


@pytest.mark.asyncio(loop_scope="module")
async def test_a_budget_cuts_the_reasoning_and_not_the_answer(client: LocalClient):
    free = await answer(client, messages=SUM)
    assert free["usage"]["completion_tokens_details"]["reasoning_tokens"] > 5
    short = await answer(client, messages=SUM, thinking_token_budget=5)
    assert short["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5
    message = short["choices"][0]["message"]
    assert message["content"] and free["choices"][0]["message"]["reasoning"].startswith(message["reasoning"])
