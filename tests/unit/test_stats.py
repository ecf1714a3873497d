"""EngineStats: what is counted and timed, and the rate at which prompts are computed."""

import time

import pytest

from engine.llm import LLM
from engine.request import EngineRequest, SamplingParams
from engine.stats import PrefillRate
from tests.tiny_models import make_tiny_qwen3


@pytest.fixture(scope="module", params=[False, True], ids=["one at a time", "overlapped"])
def llm(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("stats")
    make_tiny_qwen3(path)
    fields = {"kv_cache_memory": "4MiB", "block_size": 4, "max_num_seqs": 4, "device": "cpu", "show_progress": False}
    return LLM(str(path), overlap_steps=request.param, **fields)


def test_stages_make_up_the_steps(llm):
    start = time.monotonic()
    llm.generate([[index] * 50 for index in range(8)], SamplingParams(max_tokens=5, ignore_eos=True))
    elapsed_s = time.monotonic() - start
    stats = llm.engine.stats()
    stages = [stats.schedule_s, stats.launch_s, stats.wait_s, stats.update_s]
    assert min(stages) > 0 and sum(stages) < elapsed_s
    assert stats.prefill_tokens_per_s > 8 * 49 / elapsed_s


def test_ends_are_counted_by_reason(llm):
    before = llm.engine.stats().num_finished
    llm.generate([[1], [2]], SamplingParams(max_tokens=2, ignore_eos=True))
    llm.generate([[3]], SamplingParams(stop_token_ids=tuple(range(llm.engine.vocab_size))))
    llm.engine.add_request(EngineRequest(request_id="r", prompt_token_ids=[1], params=SamplingParams()))
    llm.engine.abort("r")
    after = llm.engine.stats().num_finished
    assert {reason: after[reason] - before[reason] for reason in after} == {
        "stop": 1, "length": 2, "abort": 1, "error": 0,
    }  # fmt: skip


def test_blocks_that_requests_leave_are_told(llm):
    known = set(llm.engine._pool.keys())
    llm.engine.take_block_events()
    llm.generate([list(range(200, 240))], SamplingParams(max_tokens=1))
    stored, evicted = llm.engine.take_block_events()
    assert len(stored) >= 10
    assert (known | set(stored)) - set(evicted) == set(llm.engine._pool.keys())


def test_prefill_rate_follows_the_steps_with_many_prompt_tokens():
    rate = PrefillRate()
    assert rate.tokens_per_s == 0
    for _ in range(100):
        rate.add(8000, 0.1)
        rate.add(10, 0.01)  # a short prompt beside many decodes
    assert rate.tokens_per_s == pytest.approx(80_000, rel=0.05)
    for _ in range(200):
        rate.add(4000, 0.1)
    assert rate.tokens_per_s == pytest.approx(40_000, rel=0.1)
