"""Fleet: what step streams tell is kept right through gaps, breaks and silence; who may get requests."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping

import msgspec
import pytest

from engine.request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from serve_app import fleet as fleet_module
from serve_app.attempt import ReplicaAttempt, ReplicaLostError
from serve_app.fleet import Fleet, Loss
from serve_app.steps import ReplicaLoad, StepUpdate

LOAD = ReplicaLoad(0, 0, 0, num_free_blocks=8, num_blocks=8, step_s=0.01, prefill_tokens_per_s=0.0)


class Replica:
    """A step stream that says what it is told to say."""

    def __init__(self) -> None:
        self.items: asyncio.Queue[StepUpdate | Exception] = asyncio.Queue()
        self.num_opened = 0
        self.is_open = False

    async def open_steps(self, ingress_id: str) -> AsyncGenerator[bytes, None]:
        assert ingress_id == "ingress"
        self.num_opened += 1
        self.is_open = True
        try:
            while True:
                item = await self.items.get()
                if isinstance(item, Exception):
                    raise item
                yield msgspec.msgpack.encode(item)
        finally:
            self.is_open = False

    def say(
        self, seq: int, *outputs: RequestOutput, stored: str = "", evicted: str = "", is_snapshot: bool = False
    ) -> None:
        keys = ([key.encode() for key in text] for text in (stored, evicted))
        self.items.put_nowait(StepUpdate(seq, list(outputs), LOAD, *keys, is_snapshot=is_snapshot))


@pytest.fixture
async def fleet(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    monkeypatch.setattr(fleet_module, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(fleet_module, "SILENT_AFTER_S", 0.1)
    monkeypatch.setattr(fleet_module, "REOPEN_DELAY_S", 0.001)
    made = Fleet()
    made.attach("ingress", 16)
    yield made
    made.close()


def set_replicas(fleet: Fleet, **replicas: Replica) -> None:
    fleet.replicas_changed({name: replica.open_steps for name, replica in replicas.items()})


def begin(fleet: Fleet, name: str, replica_id: str, avoid: Mapping[str, float] | None = None) -> ReplicaAttempt:
    request = EngineRequest(request_id=name, prompt_token_ids=[1], params=SamplingParams())
    attempt = ReplicaAttempt(request, avoid or {})
    fleet.begin(attempt)
    fleet.accepted(name, replica_id)
    return attempt


async def until(condition: object) -> None:
    async with asyncio.timeout(60):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.001)


async def read(attempt: ReplicaAttempt) -> list[int]:
    return [token_id async for output in attempt.outputs(1.0) for token_id in output.token_ids]


async def test_outputs_come_to_their_requests(fleet: Fleet):
    replica = Replica()
    set_replicas(fleet, a=replica)
    attempts = [begin(fleet, name, "a") for name in "xy"]
    replica.say(0, RequestOutput("x", [1]), is_snapshot=True)
    replica.say(1, RequestOutput("y", [5, 6]), RequestOutput("stranger", [9]))
    replica.say(2, *(RequestOutput(name, [2], finish_reason=FinishReason.LENGTH) for name in "yx"))
    assert [await read(attempt) for attempt in attempts] == [[1, 2], [5, 6, 2]]


async def test_a_gap_is_filled_by_a_snapshot_of_a_new_stream(fleet: Fleet):
    replica = Replica()
    set_replicas(fleet, a=replica)
    attempt = begin(fleet, "x", "a")
    replica.say(0, stored="ab", is_snapshot=True)
    replica.say(1, RequestOutput("x", [1]), stored="c")
    replica.say(3, RequestOutput("x", [3]), evicted="a")
    replica.say(0, RequestOutput("x", [1, 2, 3]), stored="bcd", is_snapshot=True)
    replica.say(1, RequestOutput("x", [4], finish_reason=FinishReason.LENGTH), evicted="b")
    assert await read(attempt) == [1, 2, 3, 4]
    assert replica.num_opened == 2
    assert fleet.replicas["a"].block_keys == {b"c", b"d"}


@pytest.mark.parametrize("error", [ConnectionError("reset"), ValueError("whatever")])
async def test_a_stream_that_breaks_is_opened_again(fleet: Fleet, error: Exception):
    replica = Replica()
    set_replicas(fleet, a=replica)
    replica.say(0, is_snapshot=True)
    await until(lambda: fleet.replicas["a"].load is not None)
    replica.items.put_nowait(error)
    await until(lambda: fleet.replicas["a"].load is None)
    replica.say(0, is_snapshot=True)
    await until(lambda: fleet.replicas["a"].load is not None)


async def test_a_silent_replica_loses_its_requests_only_where_another_one_speaks(fleet: Fleet):
    silent, other = Replica(), Replica()
    set_replicas(fleet, silent=silent)
    attempt = begin(fleet, "x", "silent")
    silent.say(0, RequestOutput("x", [1]), is_snapshot=True)
    await until(lambda: fleet.replicas["silent"].load is not None and fleet.replicas["silent"].is_silent)
    assert attempt.failure is None
    set_replicas(fleet, silent=silent, other=other)
    other.say(0, is_snapshot=True)
    await until(lambda: attempt.failure is not None)
    with pytest.raises(ReplicaLostError, match=Loss.SILENT):
        await read(attempt)
    fleet.end(attempt)
    silent.say(1, RequestOutput("x", [2]))
    await until(lambda: not fleet.replicas["silent"].is_silent)
    assert attempt.num_received == 1


async def test_a_replica_that_leaves_is_followed_until_its_last_request_ends(fleet: Fleet):
    replica, other = Replica(), Replica()
    set_replicas(fleet, a=replica, b=other)
    attempt = begin(fleet, "x", "a")
    await until(lambda: replica.is_open)
    set_replicas(fleet, b=other)
    assert [view.replica_id for view in fleet.candidates()] == ["b"]
    replica.say(0, RequestOutput("x", [1], finish_reason=FinishReason.LENGTH), is_snapshot=True)
    assert await read(attempt) == [1]
    fleet.end(attempt)
    assert set(fleet.replicas) == {"b"}
    await until(lambda: not replica.is_open)


async def test_a_dead_replica_loses_its_requests(fleet: Fleet):
    set_replicas(fleet, a=Replica(), b=Replica())
    attempts = [begin(fleet, name, name) for name in "ab"]
    fleet.replica_left("a")
    assert [attempt.failure is not None for attempt in attempts] == [True, False]
    assert set(fleet.replicas) == {"b"}


async def test_those_that_answer_and_have_not_failed_a_request_come_first(fleet: Fleet):
    heard, unheard = Replica(), Replica()
    set_replicas(fleet, heard=heard, unheard=unheard)
    heard.say(0, is_snapshot=True)
    await until(lambda: fleet.replicas["heard"].load is not None)
    assert [view.replica_id for view in fleet.candidates()] == ["heard"]
    unheard.say(0, is_snapshot=True)
    await until(lambda: len(fleet.candidates()) == 2)
    now_s = time.monotonic()
    avoiding = begin(fleet, "x", "heard", avoid={"heard": now_s})
    assert [view.replica_id for view in fleet.candidates(avoiding)] == ["unheard"]


async def test_a_lost_replica_comes_back_when_it_has_answered_since(fleet: Fleet, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fleet_module, "BACK_AFTER_S", 0.05)
    replica = Replica()
    set_replicas(fleet, a=replica)
    replica.say(0, is_snapshot=True)
    await until(lambda: fleet.replicas["a"].load is not None)
    attempt = begin(fleet, "x", "a", avoid={"a": time.monotonic()})
    assert fleet.candidates(attempt) == []
    await asyncio.sleep(0.06)
    assert fleet.candidates(attempt) == []
    replica.say(1)
    await until(lambda: fleet.candidates(attempt) != [])


async def test_attempts_are_counted_where_they_are(fleet: Fleet):
    set_replicas(fleet, a=Replica(), b=Replica())
    attempt = begin(fleet, "x", "a")
    assert [fleet.replicas[name].num_attempts for name in "ab"] == [1, 0]
    fleet.assign("x", "b")
    assert [fleet.replicas[name].num_attempts for name in "ab"] == [0, 1]
    fleet.end(attempt)
    assert [fleet.replicas[name].num_attempts for name in "ab"] == [0, 0]


async def test_a_request_that_ray_sends_again_after_it_began_is_lost_rather_than_doubled(fleet: Fleet):
    set_replicas(fleet, a=Replica(), b=Replica())
    attempt = begin(fleet, "x", "a")
    attempt.put(RequestOutput("x", [1]))
    fleet.assign("x", "b")
    assert isinstance(attempt.failure, ReplicaLostError)
