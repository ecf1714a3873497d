"""Placer: what the fleet tells decides where attempts go, and nothing is left of them when they have ended."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from engine.block_pool import block_keys
from engine.request import EngineRequest, FinishReason, RequestOutput, SamplingParams, prefix_salt
from serve_app.attempt import ReplicaAttempt
from serve_app.fleet import Fleet
from serve_app.placer import TOKENS_AT_ONCE, Placer
from serve_app.steps import ReplicaLoad, StepUpdate

BLOCK = 16
IDLE = ReplicaLoad(0, 0, 0, 1000, 1000, 0.02, 10_000.0)
PROMPT = list(range(3200))


async def _no_steps(ingress_id: str) -> AsyncGenerator[bytes, None]:
    raise ConnectionError(ingress_id)
    yield b""


def make_fleet(**stored: list[bytes]) -> Fleet:
    """Idle replicas with these keys in their caches."""
    fleet = Fleet()
    fleet.block_size = BLOCK
    fleet.replicas_changed(dict.fromkeys(stored, _no_steps))
    for replica_id, keys in stored.items():
        fleet.apply(replica_id, StepUpdate(0, [], IDLE, keys, [], is_snapshot=True))
    return fleet


def begin(fleet: Fleet, request_id: str, token_ids: list[int] = PROMPT, **changes: Any) -> ReplicaAttempt:
    params = changes.pop("params", SamplingParams())
    request = EngineRequest(request_id=request_id, prompt_token_ids=token_ids, params=params, **changes)
    attempt = ReplicaAttempt(request, frozenset())
    fleet.begin(attempt)
    return attempt


def rank(fleet: Fleet, placer: Placer, attempt: ReplicaAttempt) -> list[str]:
    return [view.replica_id for view in asyncio.run(placer.rank(attempt, fleet.candidates(attempt)))]


def tell(fleet: Fleet, replica_id: str, request_id: str, num_cached_tokens: int) -> None:
    output = RequestOutput(
        request_id=request_id, token_ids=[1], finish_reason=FinishReason.LENGTH, num_cached_tokens=num_cached_tokens
    )
    fleet.apply(replica_id, StepUpdate(1, [output], IDLE, [], []))


@pytest.mark.parametrize(
    "changes", [{}, {"cache_salt": "tenant"}, {"adapter": "style"}, {"cache_salt": "tenant", "adapter": "style"}]
)
def test_a_request_goes_where_its_own_prefix_is(changes):
    salt = prefix_salt(changes.get("cache_salt", ""), changes.get("adapter", ""))
    other = block_keys(PROMPT, BLOCK, "another tenant")
    fleet = make_fleet(a=other, b=block_keys(PROMPT, BLOCK, salt), c=other)
    placer = Placer(fleet, seed=0)
    attempt = begin(fleet, "r", **changes)
    assert rank(fleet, placer, attempt)[0] == "b"
    fleet.assign("r", "b")
    tell(fleet, "b", "r", 3184)
    fleet.end(attempt)
    assert placer.counters.num_predicted_cached_tokens == 3184 and placer.counters.num_cached_tokens == 3184


def test_keys_of_long_prompts_are_made_in_parts_and_with_what_was_produced():
    token_ids = [index % 5000 for index in range(2 * TOKENS_AT_ONCE + 100)]
    keys = block_keys(token_ids + [7] * 61, BLOCK, "")
    fleet = make_fleet(a=[], b=keys, c=[])
    placer = Placer(fleet, seed=0)
    fleet.assign("r", rank(fleet, placer, begin(fleet, "r", token_ids, output_token_ids=[7] * 61))[0])
    tell(fleet, "b", "r", 0)
    assert placer.counters.num_predicted_cached_tokens == len(keys) * BLOCK


def test_prompt_logprobs_skip_the_cache():
    fleet = make_fleet(a=block_keys(PROMPT, BLOCK, ""))
    placer = Placer(fleet, seed=0)
    attempt = begin(fleet, "r", params=SamplingParams(prompt_logprobs=1))
    assert rank(fleet, placer, attempt) == ["a"]
    fleet.assign("r", "a")
    tell(fleet, "a", "r", 0)
    assert placer.counters.num_prompt_tokens == 3200 and placer.counters.num_predicted_cached_tokens == 0


def test_a_result_that_overtakes_the_step_stream_is_a_first_token_too():
    fleet = make_fleet(a=block_keys(PROMPT, BLOCK, ""))
    placer = Placer(fleet, seed=0)
    attempt = begin(fleet, "r")
    rank(fleet, placer, attempt)
    fleet.assign("r", "a")
    output = RequestOutput("r", [1], finish_reason=FinishReason.LENGTH, num_cached_tokens=3184)
    fleet.put_result(attempt, output)
    fleet.apply("a", StepUpdate(1, [output], IDLE, [], []))
    assert sum(placer.counters.by_reason.values()) == 1 and placer.counters.num_cached_tokens == 3184


def test_without_prefix_caches_equal_prompts_do_not_stay_together():
    fleet = make_fleet(a=[], b=[])
    fleet.block_size = None
    placer = Placer(fleet, seed=0)
    chosen = [rank(fleet, placer, begin(fleet, f"r{index}"))[0] for index in range(6)]
    assert chosen.count("a") == 3


def test_an_attempt_counts_where_it_was_sent_until_it_has_a_token_or_ends():
    fleet = make_fleet(a=[], b=[])
    placer = Placer(fleet, seed=0)
    attempts = [begin(fleet, name) for name in ("full", "ended")]
    first, second = rank(fleet, placer, attempts[0])
    placer.sent("full", second)  # the first one refused
    fleet.assign("full", second)
    # The prefix is on its way there, and so is whoever shares it.
    assert rank(fleet, placer, attempts[1]) == [second, first]
    fleet.end(attempts[1])
    other = begin(fleet, "other", list(range(5000, 8200)))
    assert rank(fleet, placer, other)[0] == first
    fleet.end(other)
    tell(fleet, second, "full", 0)
    placer.sent("full", first)  # too late to matter
    for attempt in (begin(fleet, f"later {index}", list(range(9000, 9100))) for index in range(20)):
        rank(fleet, placer, attempt)
        fleet.end(attempt)
    fleet.end(attempts[0])
    assert not placer._asked and not placer._placement.num_in_flight and not fleet.attempts


def test_an_attempt_that_ends_while_its_keys_are_made_leaves_nothing():
    fleet = make_fleet(a=[], b=[])
    placer = Placer(fleet, seed=0)
    attempt = begin(fleet, "r", list(range(3 * TOKENS_AT_ONCE)))

    async def end_meanwhile() -> None:
        ranking = asyncio.create_task(placer.rank(attempt, fleet.candidates(attempt)))
        await asyncio.sleep(0)
        fleet.end(attempt)
        await ranking

    asyncio.run(end_meanwhile())
    assert not placer._asked and not placer._placement.num_in_flight
