"""What a sick engine does: steps that hang, steps that run out of memory; and that it is ready only once it works."""

import asyncio
import re
import threading

import pytest
import torch

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.errors import EngineDeadError
from engine.llm_engine import MAX_FAILED_STEPS, LLMEngine
from engine.outcome import LaunchedStep
from engine.request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from tests.tiny_models import make_tiny_qwen3

FIELDS = {"kv_cache_memory": "2MiB", "block_size": 4, "max_num_seqs": 4, "show_progress": False, "device": "cpu"}
BAD_TOKEN = 3


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("health")
    make_tiny_qwen3(folder)
    return str(folder)


def make_request(name: str, prompt: list[int], priority: int = 0, **params: object) -> EngineRequest:
    values = SamplingParams(**({"temperature": 0.8, "seed": 1, "max_tokens": 12, "ignore_eos": True} | params))
    return EngineRequest(request_id=name, prompt_token_ids=prompt, params=values, priority=priority)


def run(engine: LLMEngine, outputs: dict[str, list[RequestOutput]]) -> dict[str, list[int]]:
    """Step until there is nothing to do; `outputs` gets all that comes."""
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return {name: [token_id for output in own for token_id in output.token_ids] for name, own in outputs.items()}


def allocate_too_much(*_: object) -> None:
    torch.empty(2**60)


def fail_on_cuda(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize("fail", [allocate_too_much, fail_on_cuda])
@pytest.mark.parametrize("fields", [{}, {"overlap_steps": True}, {"num_speculative_tokens": 3}], ids=str)
def test_out_of_memory_ends_the_largest_request_of_the_step_alone(path, fields, fail):
    """Others in the step, running ones and such as it admits, go on to the same end as without."""
    engine = LLMEngine(EngineConfig(model=path, **FIELDS, **fields))
    others = [make_request("long", [5, 6, 7, 8] * 5), make_request("short", [9]), make_request("late", [1, 2] * 4)]
    bad = make_request("bad", [BAD_TOKEN] * 24)
    for request in others:
        engine.add_request(request)
    expected = run(engine, {})

    def fail_on_bad_token(_model: object, inputs: tuple[torch.Tensor]) -> None:
        if (inputs[0].input_ids == BAD_TOKEN).sum() > 4:
            fail()

    engine.runner.model.register_forward_pre_hook(fail_on_bad_token)
    outputs: dict[str, list[RequestOutput]] = {}
    for request in others[:2]:
        engine.add_request(request)
    for _ in range(3):
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    engine.add_request(bad)
    engine.add_request(others[2])
    found = run(engine, outputs)
    [end] = outputs["bad"]
    assert end.finish_reason is FinishReason.ERROR and end.token_ids == [] and end.error_param is None
    assert "out of memory in a step of" in end.error and "24 of them this request's: " in end.error
    assert {name: found[name] for name in expected} == expected
    assert {name: own[-1].finish_reason for name, own in outputs.items() if name != "bad"} == dict.fromkeys(
        expected, FinishReason.LENGTH
    )
    stats = engine.stats()
    assert (stats.num_owned_blocks, stats.num_running, stats.num_finished[FinishReason.ERROR]) == (0, 0, 1)


def test_an_engine_that_can_do_nothing_any_more_says_so(path):
    engine = LLMEngine(EngineConfig(model=path, **FIELDS))
    engine.runner.model.register_forward_pre_hook(allocate_too_much)
    ended = []
    for index in range(MAX_FAILED_STEPS):
        engine.add_request(make_request(str(index), [1, 2]))
        ended += [output.finish_reason for output in engine.step()]
    assert ended == [FinishReason.ERROR] * MAX_FAILED_STEPS and not engine.has_work
    engine.add_request(make_request("last", [1, 2]))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        engine.step()


def test_other_faults_are_nobodys_in_particular(path):
    engine = LLMEngine(EngineConfig(model=path, **FIELDS))
    engine.runner.model.register_forward_pre_hook(lambda *_: {}["missing"])
    engine.add_request(make_request("r", [1, 2]))
    with pytest.raises(KeyError):
        engine.step()


async def until(check) -> None:
    for _ in range(30_000):
        if check():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("nothing changed for a minute")


async def test_a_step_that_does_not_return_is_told(path):
    engine = AsyncEngine(EngineConfig(model=path, **FIELDS, step_timeout_s=0.05))
    released = threading.Event()
    engine._engine.runner.model.register_forward_pre_hook(lambda *_: released.wait(120) and None)
    running = asyncio.ensure_future(anext(engine.generate(make_request("r", [1, 2]))))

    def is_stuck() -> bool:
        try:
            engine.check_health()
        except EngineDeadError as error:
            assert re.search(r"a step has not returned for \d+ s, expected at most 0.05 \(step_timeout_s\)", str(error))
            return True
        return False

    await until(is_stuck)
    with pytest.raises(EngineDeadError, match="has not returned"):
        await anext(engine.generate(make_request("next", [1, 2])))
    released.set()
    assert (await running).token_ids
    await until(lambda: not is_stuck())
    await engine.stop()


async def test_an_idle_engine_is_healthy(path):
    engine = AsyncEngine(EngineConfig(model=path, **FIELDS, step_timeout_s=0.001))
    await asyncio.sleep(0.01)
    engine.check_health()
    await engine.stop()


def test_an_engine_is_there_only_after_its_warm_up(path, monkeypatch):
    """Ray calls a replica ready when its constructor has returned."""
    result, steps = LaunchedStep.result, []
    monkeypatch.setattr(LaunchedStep, "result", lambda launched: steps.append(result(launched)) or steps[-1])
    LLMEngine(EngineConfig(model=path, **FIELDS))
    assert steps and steps[0].is_finite == [True]
    monkeypatch.setattr(LaunchedStep, "result", fail_on_cuda)
    with pytest.raises(torch.OutOfMemoryError):
        AsyncEngine(EngineConfig(model=path, **FIELDS))
