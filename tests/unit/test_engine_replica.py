"""EngineReplica without Ray around it: the real engine, and the messages that an ingress gets."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from engine.config import EngineConfig
from engine.errors import CheckpointError
from engine.request import EngineRequest, FinishReason, SamplingParams
from serve_app.replica import EngineReplica
from serve_app.wire import ModelInfo, RefusalKind, ReplicaMessage

Replica = EngineReplica.func_or_class  # type: ignore[attr-defined]
PROMPT = [5, 6, 7]
pytestmark = pytest.mark.filterwarnings("ignore:coroutine 'EngineReplica.__del__' was never awaited")
"""Ray Serve awaits it; the garbage collector, in the end, does not."""


async def start(**config: Any) -> Any:
    """As Ray Serve starts one."""
    values = {"kv_cache_memory": 2**25, "num_threads": 1, "max_num_seqs": 1, "max_num_waiting": 1} | config
    made = Replica.__new__(Replica)
    await made.__init__(EngineConfig(**values), "demo")
    return made


@pytest.fixture
async def replica() -> AsyncIterator[Any]:
    made = await start()
    yield made
    await made.__del__()


def request(request_id: str, prompt: list[int] = PROMPT, **params: Any) -> bytes:
    values = {"max_tokens": 4, "ignore_eos": True} | params
    return msgspec.msgpack.encode(
        EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=SamplingParams(**values))
    )


async def messages(replica: Any, encoded: bytes) -> list[ReplicaMessage]:
    return [msgspec.msgpack.decode(item, type=ReplicaMessage) async for item in replica.generate(encoded)]


async def test_a_request_is_acknowledged_then_answered(replica: Any):
    first, *rest = await messages(replica, request("r"))
    assert first == ReplicaMessage()
    assert sum(len(message.output.token_ids) for message in rest) == 4
    assert rest[-1].output.finish_reason is FinishReason.LENGTH


async def test_a_request_that_cannot_run_is_refused_with_its_reason(replica: Any):
    _, message = await messages(replica, request("r", prompt=[10**6]))
    assert message.refusal.kind is RefusalKind.BAD_REQUEST and message.refusal.param == "prompt"


async def test_more_than_may_wait_are_refused(replica: Any):
    """One runs and one waits."""
    running, waiting = (replica.generate(request(f"r{number}", max_tokens=4000)) for number in range(2))
    for _ in range(2):
        await anext(running)
    await anext(waiting)
    first_output = asyncio.create_task(anext(waiting))
    await asyncio.sleep(0)
    _, message = await messages(replica, request("another"))
    assert message.refusal.kind is RefusalKind.OVERLOADED
    first_output.cancel()
    await asyncio.gather(first_output, return_exceptions=True)
    await running.aclose()


async def test_an_engine_that_has_stopped_is_unavailable_and_not_healthy(replica: Any):
    await replica.check_health()
    await replica.__del__()
    _, message = await messages(replica, request("r"))
    assert message.refusal.kind is RefusalKind.UNAVAILABLE
    with pytest.raises(Exception, match="stopped"):
        await replica.check_health()


async def test_it_tells_all_that_an_ingress_needs(replica: Any):
    info = msgspec.msgpack.decode(await replica.info(), type=ModelInfo)
    assert info.max_model_len == 4096 and info.vocab_size > 1000 and len(info.eos_token_ids) == 2
    assert {"tokenizer.json", "generation_config.json"} <= set(info.files)
    assert not any("safetensors" in name for name in info.files)
    assert info.fingerprint.startswith("fp_")
    assert (await replica.stats())["num_running"] == 0
    assert await replica.request_state("nobody") is None


async def test_why_it_cannot_start_is_said_in_the_terminal(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(CheckpointError):
        await start(model="/nowhere/at/all")
    [line] = capfd.readouterr().out.splitlines()
    assert line.startswith("the engine cannot start:") and "/nowhere/at/all" in line
