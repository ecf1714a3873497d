"""KvAwareRouter in Ray Serve's own routing loop: the placer's order, and Ray's limits."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from engine.block_pool import block_keys
from engine.request import EngineRequest, SamplingParams
from serve_app import router as router_module
from serve_app.attempt import ReplicaAttempt
from serve_app.fleet import Fleet, fleet_of
from serve_app.placer import placer_of
from serve_app.router import KvAwareRouter
from serve_app.steps import ReplicaLoad, StepUpdate

DEPLOYMENT = DeploymentID(name="engine", app_name="app")
BLOCK = 16
PROMPT = list(range(3200))
MOST = 2


class Replica:
    """Ray's RunningReplica, as far as a router looks at it."""

    max_ongoing_requests = MOST

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.num_ongoing = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.num_ongoing


async def _no_steps(replica: Replica, ingress_id: str) -> AsyncGenerator[bytes, None]:
    raise ConnectionError(ingress_id)
    yield b""


class Setup:
    """A router, its fleet, and three idle replicas, of which b has the prompt in its cache."""

    def __init__(self) -> None:
        self.router = KvAwareRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
        self.router.initialize_state()
        self.replicas = {name: Replica(name) for name in "abc"}
        self.router.update_replicas(list(self.replicas.values()))  # type: ignore[arg-type]
        self.fleet: Fleet = fleet_of("app", "engine")
        self.fleet.block_size = BLOCK
        idle = ReplicaLoad(0, 0, 0, 1000, 1000, 0.02, 10_000.0)
        for name in self.replicas:
            keys = block_keys(PROMPT, BLOCK, "") if name == "b" else []
            self.fleet.apply(name, StepUpdate(0, [], idle, keys, [], is_snapshot=True))

    def begin(self, request_id: str) -> ReplicaAttempt:
        request = EngineRequest(request_id=request_id, prompt_token_ids=PROMPT, params=SamplingParams())
        attempt = ReplicaAttempt(request, frozenset())
        self.fleet.begin(attempt)
        return attempt

    async def route(self, request_id: str, method: str = "generate") -> str:
        """Where Ray sends a call, which the replica accepts."""
        metadata = RequestMetadata(request_id=request_id, internal_request_id=request_id, call_method=method)
        pending = PendingRequest([request_id], {}, metadata)
        replica: Any = await self.router._choose_replica_for_request(pending)
        self.router.on_send_request(replica.replica_id)
        replica.num_ongoing += 1
        self.router.on_request_routed(pending, replica.replica_id, None)
        return replica.replica_id.unique_id


@pytest.fixture
async def setup(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Setup]:
    fleet_of.cache_clear()
    placer_of.cache_clear()
    monkeypatch.setattr(router_module, "_open_steps", _no_steps)
    yield Setup()
    fleet_of.cache_clear()
    placer_of.cache_clear()


async def test_a_request_goes_where_its_prefix_is_until_that_replica_is_full(setup: Setup):
    attempts = [setup.begin(str(index)) for index in range(3)]
    chosen = [await setup.route(str(index)) for index in range(3)]
    assert chosen[:MOST] == ["b"] * MOST and chosen[MOST] in "ac"
    assert [attempt.replica_id for attempt in attempts] == chosen
    # The ledger has it where it went: who has no place at b follows it there.
    setup.begin("3")
    assert await setup.route("3") == chosen[MOST]


async def test_where_all_are_full_a_request_waits_for_the_first_that_has_room(setup: Setup):
    for index in range(3 * MOST):
        setup.begin(str(index))
        await setup.route(str(index))
    setup.begin("late")
    late = asyncio.create_task(setup.route("late"))
    await asyncio.sleep(0.1)
    assert not late.done()
    full = setup.replicas["c"]
    full.num_ongoing -= 1
    setup.router.decrement_queue_len_cache(full.replica_id)
    async with asyncio.timeout(60):
        assert await late == "c"


async def test_other_calls_go_to_any_replica_and_leave_nothing(setup: Setup):
    assert await setup.route("call", "info") in "abc"
    attempt = setup.begin("gone")
    setup.fleet.end(attempt)
    assert await setup.route("gone") in "abc"
    assert not setup.fleet.attempts and not placer_of("app", "engine")._placement.num_in_flight
