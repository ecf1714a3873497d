"""EngineReplica without Ray around it: the real engine, and what an ingress gets: results and step streams."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from engine.config import EngineConfig
from engine.errors import CheckpointError, EngineDeadError
from engine.output_buffer import OutputBuffer
from engine.request import EngineRequest, FinishReason, SamplingParams
from serve_app.steps import StepUpdate
from serve_app.wire import EngineResult, ModelInfo, RefusalKind
from tests.bare_replica import BareReplica

PROMPT = [5, 6, 7]
INGRESS = "ingress"


async def start(**config: Any) -> BareReplica:
    values = {"kv_cache_memory": 2**25, "num_threads": 1, "max_num_seqs": 1, "max_num_waiting": 1} | config
    return await BareReplica.start(EngineConfig(**values), "demo")


@pytest.fixture
async def replica() -> AsyncIterator[Any]:
    made = await start()
    yield made
    await made.stop()


def request(request_id: str, prompt: list[int] = PROMPT, **params: Any) -> bytes:
    values = {"max_tokens": 4, "ignore_eos": True} | params
    return msgspec.msgpack.encode(
        EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=SamplingParams(**values))
    )


async def run(replica: Any, request_id: str, ingress_id: str = INGRESS, **fields: Any) -> EngineResult:
    [item] = [item async for item in replica.generate(request_id, ingress_id, request(request_id, **fields))]
    return msgspec.msgpack.decode(item, type=EngineResult)


async def steps(replica: Any, ingress_id: str = INGRESS) -> AsyncGenerator[StepUpdate, None]:
    async with aclosing(replica.steps(ingress_id)) as items:
        async for item in items:
            yield msgspec.msgpack.decode(item, type=StepUpdate)


async def read(updates: AsyncGenerator[StepUpdate, None], request_id: str, num_tokens: int) -> OutputBuffer:
    """Read a stream until so many tokens of a request have come."""
    buffer = OutputBuffer()
    async for update in updates:
        for output in update.outputs:
            if output.request_id == request_id:
                (buffer.put_whole if update.is_snapshot else buffer.put)(output)
        if len(buffer.token_ids) >= num_tokens:
            break
    return buffer


async def test_stream_and_result_tell_the_same(replica: Any):
    async with aclosing(steps(replica)) as updates:
        first = await anext(updates)
        assert first.is_snapshot and first.seq == 0 and first.load.num_running == 0
        running = asyncio.create_task(run(replica, "r", logprobs=1))
        streamed = await read(updates, "r", 4)
        result = (await running).output
    assert streamed.whole() == result and result.finish_reason is FinishReason.LENGTH
    assert len(result.token_ids) == len(result.logprobs) == 4


async def test_each_ingress_hears_of_its_own_requests_but_of_the_load_of_all(replica: Any):
    async with aclosing(steps(replica, "one")) as one, aclosing(steps(replica, "other")) as other:
        await anext(one), await anext(other)
        running = asyncio.create_task(run(replica, "r", "one", max_tokens=300))
        heard = await anext(other)
        while not heard.load.num_running:
            heard = await anext(other)
            assert not heard.outputs
        assert len((await read(one, "r", 300)).token_ids) == 300
        await running


async def test_a_stream_opened_anew_tells_all_and_ends_the_one_before(replica: Any):
    running = asyncio.create_task(run(replica, "r", max_tokens=300))
    first = steps(replica)
    assert len((await read(first, "r", 10)).token_ids) >= 10
    second = steps(replica)
    streamed = await read(second, "r", 300)
    assert [update async for update in first] == []
    assert streamed.whole() == (await running).output
    await second.aclose()


async def test_blocks_in_the_cache_are_told(replica: Any):
    prompt = list(range(5, 5 + 64))
    async with aclosing(steps(replica)) as updates:
        running = asyncio.create_task(run(replica, "r", prompt=prompt, max_tokens=300))
        keys: set[bytes] = set()
        async for update in updates:
            assert not keys.intersection(update.stored)
            keys.update(update.stored)
            if any(output.finish_reason for output in update.outputs):
                break
        await running
    assert len(keys) >= 64 // 16
    snapshot = await anext(again := steps(replica))
    assert set(snapshot.stored) == keys
    await again.aclose()


async def test_a_request_that_cannot_run_is_refused_with_its_reason(replica: Any):
    refusal = (await run(replica, "r", prompt=[10**6])).refusal
    assert refusal.kind is RefusalKind.BAD_REQUEST and refusal.param == "prompt"


async def test_an_id_in_use_is_refused_and_its_owner_goes_on(replica: Any):
    running = asyncio.create_task(run(replica, "r", max_tokens=300))
    await asyncio.sleep(0)
    for ingress_id in (INGRESS, "other"):
        assert (await run(replica, "r", ingress_id)).refusal.kind is RefusalKind.BAD_REQUEST
    assert len((await running).output.token_ids) == 300


async def test_more_than_may_wait_are_refused_and_cancelling_frees(replica: Any):
    """One runs and one waits."""
    tasks = [asyncio.create_task(run(replica, "running", max_tokens=4000))]
    async with aclosing(steps(replica)) as updates:
        await read(updates, "running", 1)
    tasks.append(asyncio.create_task(run(replica, "waiting", max_tokens=4000)))
    await asyncio.sleep(0)
    assert (await run(replica, "another")).refusal.kind is RefusalKind.OVERLOADED
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    while (await replica.stats())["num_running"]:
        await asyncio.sleep(0.001)
    assert (await run(replica, "another")).output is not None


async def test_an_engine_that_ends_gives_its_requests_up_without_a_last_output(replica: Any):
    await replica.check_health()
    updates = steps(replica)
    running = asyncio.create_task(run(replica, "r", max_tokens=4000))
    await read(updates, "r", 1)
    await replica.stop()
    assert (await running).refusal.kind is RefusalKind.ENGINE_ENDED
    async for update in updates:
        assert not any(output.finish_reason for output in update.outputs)
    assert (await run(replica, "another")).refusal.kind is RefusalKind.UNAVAILABLE
    with pytest.raises(EngineDeadError, match="stopped"):
        await replica.check_health()


async def test_it_tells_all_that_an_ingress_needs(replica: Any):
    info = msgspec.msgpack.decode(await replica.info(), type=ModelInfo)
    assert info.max_model_len == 4096 and info.vocab_size > 1000 and len(info.eos_token_ids) == 2
    assert {"tokenizer.json", "generation_config.json"} <= set(info.files)
    assert not any("safetensors" in name for name in info.files)
    assert info.fingerprint.startswith("fp_")
    assert (await replica.stats())["num_running"] == 0


async def test_why_it_cannot_start_is_said_in_the_terminal(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(CheckpointError):
        await start(model="/nowhere/at/all")
    [line] = capfd.readouterr().out.splitlines()
    assert line.startswith("the engine cannot start:") and "/nowhere/at/all" in line
