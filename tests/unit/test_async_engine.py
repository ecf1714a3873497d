"""AsyncEngine: the thread contract. Streams, aborts, crashes, the end."""

import asyncio
import threading

import pytest

from engine import AsyncEngine, EngineConfig
from engine.async_engine import EngineStatus, StepReport
from engine.errors import EngineDeadError, QueueFullError, RequestError
from engine.llm import LLM
from engine.output_buffer import OutputBuffer
from engine.request import EngineRequest, FinishReason, RequestOutput, RequestStatus, SamplingParams
from tests.tiny_models import make_tiny_qwen3

FIELDS = {"kv_cache_memory": 2**22, "block_size": 4, "max_num_seqs": 4, "show_progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("async")
    make_tiny_qwen3(path)
    return path


@pytest.fixture
async def engine(checkpoint):
    engine = AsyncEngine(EngineConfig(model=str(checkpoint), **FIELDS))
    yield engine
    await engine.stop()


def request(name: str, prompt=(1, 2, 3), max_tokens=12, **fields) -> EngineRequest:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(request_id=name, prompt_token_ids=list(prompt), params=params, **fields)


async def collect(engine: AsyncEngine, source: EngineRequest) -> RequestOutput:
    buffer = OutputBuffer()
    async for output in engine.generate(source):
        buffer.put(output)
    return buffer.whole()


async def until_idle(engine: AsyncEngine) -> None:
    for _ in range(30_000):
        if engine.stats().num_running == engine.stats().num_waiting == engine.stats().num_owned_blocks == 0:
            return
        await asyncio.sleep(0.002)
    raise AssertionError("the engine still holds requests")


async def test_concurrent_streams_equal_offline_outputs(engine, checkpoint):
    prompts = [[index, index + 1, index + 2] for index in range(10)]
    outputs = await asyncio.gather(*(collect(engine, request(str(p[0]), p)) for p in prompts))
    offline = LLM(str(checkpoint), **FIELDS).generate(prompts, request("x").params)
    assert [output.token_ids for output in outputs] == [completion.token_ids for completion in offline]
    assert all(output.finish_reason is FinishReason.LENGTH for output in outputs)


async def test_a_slow_reader_gets_everything_merged(engine):
    stream = engine.generate(request("slow", max_tokens=300))
    first = await anext(stream)
    await until_idle(engine)
    rest = [output async for output in stream]
    outputs = [first, *rest]
    # The last token may still have been on its way when the engine was idle.
    assert len(outputs) <= 3 and outputs[-1].finish_reason is FinishReason.LENGTH
    assert sum(len(output.token_ids) for output in outputs) == 300


async def test_leaving_the_iteration_aborts(engine):
    stream = engine.generate(request("left", max_tokens=400))
    await anext(stream)
    await stream.aclose()
    await until_idle(engine)
    assert engine.request_state("left").finish_reason is FinishReason.ABORT


async def test_cancelling_a_waiting_request_aborts_it(engine):
    long = [asyncio.create_task(collect(engine, request(f"long{i}", max_tokens=400))) for i in range(4)]
    waiting = asyncio.create_task(collect(engine, request("waiting", max_tokens=400)))
    while engine.stats().num_running < 4 or engine.stats().num_waiting < 1:
        await asyncio.sleep(0.001)
    assert engine.request_state("waiting").status is RequestStatus.WAITING
    for task in (waiting, *long):
        task.cancel()
    await asyncio.gather(waiting, *long, return_exceptions=True)
    await until_idle(engine)


async def test_abort_by_id_ends_the_stream(engine):
    stream = engine.generate(request("r", max_tokens=400))
    await anext(stream)
    assert engine.abort("r") and not engine.abort("r")
    last = [output async for output in stream][-1]
    assert last.finish_reason is FinishReason.ABORT
    await until_idle(engine)


async def test_bad_requests_and_ids_in_use_are_refused(engine):
    with pytest.raises(RequestError, match="no tokens"):
        await collect(engine, request("bad", prompt=()))
    stream = engine.generate(request("same", max_tokens=400))
    await anext(stream)
    with pytest.raises(RequestError, match="in use"):
        await collect(engine, request("same"))
    await stream.aclose()


async def test_the_queue_is_bounded(checkpoint):
    engine = AsyncEngine(EngineConfig(model=str(checkpoint), max_num_waiting=3, **FIELDS))
    tasks = [asyncio.create_task(collect(engine, request(str(index), max_tokens=200))) for index in range(40)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [result for result in results if isinstance(result, QueueFullError)]
    served = [result for result in results if isinstance(result, RequestOutput)]
    assert len(refused) + len(served) == 40 and refused
    assert all(len(result.token_ids) == 200 for result in served)
    await engine.stop()


async def test_a_crash_fails_every_request_with_its_reason(engine, monkeypatch):
    streams = [engine.generate(request(f"r{index}", max_tokens=400)) for index in range(6)]
    tasks = [asyncio.create_task(anext(stream)) for stream in streams[:4]]
    await asyncio.gather(*tasks)

    def fault(*_):
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine._engine.runner, "launch", fault)
    outputs = await asyncio.gather(*(_last(stream) for stream in streams[:4]))
    assert {output.finish_reason for output in outputs} == {FinishReason.ERROR}
    assert {output.error for output in outputs} == {"engine fault: RuntimeError: device lost"}
    assert engine.status is EngineStatus.DEAD
    with pytest.raises(EngineDeadError, match="device lost"):
        engine.check_health()
    with pytest.raises(EngineDeadError, match="device lost"):
        await _last(streams[5])


async def _last(stream) -> RequestOutput:
    output = None
    async for output in stream:  # noqa: B007
        pass
    return output


async def test_stop_ends_requests_and_thread(checkpoint):
    engine = AsyncEngine(EngineConfig(model=str(checkpoint), **FIELDS))
    stream = engine.generate(request("r", max_tokens=400))
    await anext(stream)
    await engine.stop()
    assert (await _last(stream)).finish_reason is FinishReason.ABORT
    assert engine.status is EngineStatus.STOPPED
    assert "engine" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(EngineDeadError, match="stopped"):
        engine.check_health()
    await engine.stop()


async def test_one_wake_up_of_the_loop_per_step(engine):
    loop = asyncio.get_running_loop()
    calls = 0
    original = loop.call_soon_threadsafe

    def counting(*args, **kwargs):
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    loop.call_soon_threadsafe = counting
    try:
        await asyncio.gather(*(collect(engine, request(str(index), max_tokens=20)) for index in range(4)))
    finally:
        del loop.call_soon_threadsafe
    assert calls <= engine.stats().num_steps


async def test_a_listener_sees_every_step_after_its_outputs(checkpoint):
    reports: list[StepReport] = []
    outputs: list[RequestOutput] = []
    num_outputs: list[int] = []

    def listen(report: StepReport) -> None:
        reports.append(report)
        num_outputs.append(len(outputs))

    engine = AsyncEngine(EngineConfig(model=str(checkpoint), **FIELDS), listen)
    await engine.submit(request("r", prompt=range(1, 20), max_tokens=8), outputs.append)
    while not (outputs and outputs[-1].finish_reason):
        await asyncio.sleep(0.001)
    await engine.stop()
    assert num_outputs == sorted(num_outputs) and num_outputs[-1] == len(outputs) == 8
    assert [report.stats.num_steps for report in reports] == sorted({report.stats.num_steps for report in reports})
    stored = {key for report in reports for key in report.stored}
    assert len(stored) >= 19 // FIELDS["block_size"]


async def test_a_dropped_request_ends_without_another_output(engine):
    outputs: list[RequestOutput] = []
    await engine.submit(request("r", max_tokens=400), outputs.append)
    while not outputs:
        await asyncio.sleep(0.001)
    assert engine.drop("r") and not engine.drop("r")
    num_outputs = len(outputs)
    await until_idle(engine)
    assert len(outputs) == num_outputs and engine.request_state("r").finish_reason is FinishReason.ABORT
