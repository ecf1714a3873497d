"""EngineClient over real replicas in this process: requests go on where their replica is lost, and nothing shows.

Only Ray is missing: calls go to a replica's own methods, and are cut off as Ray cuts them off.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from ray.exceptions import ActorDiedError

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from serve_app import engine_client, fleet
from serve_app.engine_client import EngineClient
from serve_app.fleet import Fleet, Loss, ReplicaView, fleet_of
from serve_app.openai.errors import ApiError
from tests.bare_replica import BareReplica
from tests.tiny_models import make_tiny_qwen3

NUM_TOKENS = 150
ENGINE = {"kv_cache_memory": 2**22, "block_size": 4, "max_num_seqs": 8, "device": "cpu", "num_threads": 1}


class Host:
    """A replica, and the process around it, which can die or hang."""

    def __init__(self, replica: Any) -> None:
        self.replica = replica
        self.dead = asyncio.Event()
        self.runs = asyncio.Event()
        self.runs.set()
        self.num_calls = 0

    async def items(self, source: AsyncGenerator[bytes, None], error: Exception) -> AsyncGenerator[bytes, None]:
        """A stream as a caller in another process gets it."""
        death, item = asyncio.create_task(self.dead.wait()), None
        try:
            while True:
                item = asyncio.ensure_future(anext(source, None))
                await asyncio.wait([item, death], return_when=asyncio.FIRST_COMPLETED)
                if death.done():
                    raise error
                if (found := await item) is None:
                    return
                await self.runs.wait()
                yield found
        finally:
            for task in (death, item):
                if task is not None:
                    task.cancel()
            await asyncio.gather(*filter(None, (death, item)), return_exceptions=True)
            await source.aclose()

    def open_steps(self, ingress_id: str) -> AsyncGenerator[bytes, None]:
        return self.items(self.replica.steps(ingress_id), ConnectionError("reset"))


class Hosts:
    """Ray's part: chooses a replica for each call, as the router says."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.by_id: dict[str, Host] = {}

    def change(self, **hosts: Host) -> None:
        self.by_id = hosts
        self.fleet.replicas_changed({name: host.open_steps for name, host in hosts.items()})

    def call(self, handle: object, request_id: str, ingress_id: str, encoded: bytes) -> "Call":
        return Call(self._run(request_id, ingress_id, encoded))

    async def _run(self, request_id: str, ingress_id: str, encoded: bytes) -> AsyncGenerator[bytes, None]:
        attempt = self.fleet.attempts[request_id]
        while not (views := self.fleet.candidates(attempt)):
            await asyncio.sleep(0.001)
        replica_id = min(views, key=lambda view: view.num_attempts).replica_id
        host = self.by_id[replica_id]
        host.num_calls += 1
        self.fleet.accepted(request_id, replica_id)
        async with aclosing(
            host.items(host.replica.generate(request_id, ingress_id, encoded), ActorDiedError())
        ) as items:
            async for item in items:
                yield item


class Call:
    def __init__(self, items: AsyncGenerator[bytes, None]) -> None:
        self._items = items

    def __aiter__(self) -> AsyncGenerator[bytes, None]:
        return self._items

    def cancel(self) -> None:
        """The task that reads it is being cancelled, and the generator with it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("client")
    make_tiny_qwen3(path)
    return str(path)


@pytest.fixture
async def hosts(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hosts]:
    """Two replicas."""
    monkeypatch.setattr(fleet, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(engine_client, "RESUME_RETRY_S", 0.02)
    fleet_of.cache_clear()
    made = Hosts(fleet_of("app", "engine"))
    as_is = SimpleNamespace(keep_on_this_loop=lambda _: None, over_grpc=lambda *_, **__: None, call=made.call)
    monkeypatch.setattr(engine_client, "ray_private", as_is)
    replicas = [await BareReplica.start(EngineConfig(model=checkpoint, **ENGINE), "tiny") for _ in range(2)]
    made.change(**{name: Host(replica) for name, replica in zip("ab", replicas, strict=True)})
    yield made
    made.fleet.close()
    for replica in replicas:
        await replica.stop()


@pytest.fixture
async def client(hosts: Hosts) -> EngineClient:
    handle: Any = SimpleNamespace(app_name="app", deployment_name="engine")
    return EngineClient(handle, "ingress", ENGINE["block_size"])


def request(name: str, prompt: int = 7, **params: Any) -> EngineRequest:
    values = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True} | params
    return EngineRequest(request_id=name, prompt_token_ids=[prompt, 3, 5], params=SamplingParams(**values))


async def collect(client: EngineClient, source: EngineRequest) -> list[RequestOutput]:
    async with aclosing(client.generate(source)) as outputs:
        return [output async for output in outputs]


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


async def start(client: EngineClient, *requests: EngineRequest) -> list["asyncio.Task[list[RequestOutput]]"]:
    """Run requests until each has some tokens."""
    tasks = [asyncio.create_task(collect(client, each)) for each in requests]
    async with asyncio.timeout(60):
        while not client.fleet.attempts or any(each.num_received < 5 for each in client.fleet.attempts.values()):
            await asyncio.sleep(0.001)
    return tasks


def victim_of(client: EngineClient) -> str:
    """A replica that has requests."""
    return next(each.replica_id for each in client.fleet.attempts.values() if each.replica_id is not None)


REQUESTS = [
    request("greedy", logprobs=2, prompt_logprobs=1),
    request("sampled", temperature=1.5, seed=4, repetition_penalty=1.2, prompt=9),
    request("other", prompt=11, frequency_penalty=0.5),
    request("stop", prompt=13, min_tokens=100, stop_token_ids=tuple(range(100, 200))),
]


@pytest.fixture(scope="module")
def undisturbed(checkpoint: str) -> list[list[RequestOutput]]:
    """What becomes of the requests when nothing happens."""

    async def run_all() -> list[list[RequestOutput]]:
        engine = AsyncEngine(EngineConfig(model=checkpoint, **ENGINE))
        found = await asyncio.gather(*(run(engine, each) for each in REQUESTS))
        await engine.stop()
        return found

    async def run(engine: AsyncEngine, source: EngineRequest) -> list[RequestOutput]:
        return [output async for output in engine.generate(source)]

    return asyncio.run(run_all())


def check_equal(found: list[list[RequestOutput]], expected: list[list[RequestOutput]]) -> None:
    assert [tokens(outputs) for outputs in found] == [tokens(outputs) for outputs in expected]
    for outputs, others in zip(found, expected, strict=True):
        assert outputs[-1].finish_reason is others[-1].finish_reason
        assert outputs[-1].stop_token_id == others[-1].stop_token_id
        assert len({output.num_cached_tokens for output in outputs}) == 1
        logprobs, other_logprobs = (
            [entry for output in each for entry in output.logprobs or []] for each in (outputs, others)
        )
        assert [entry.token_id for entry in logprobs] == [entry.token_id for entry in other_logprobs]
        assert sum(output.prompt_logprobs is not None for output in outputs) == sum(
            output.prompt_logprobs is not None for output in others
        )


async def test_nothing_shows_when_a_replica_dies(
    client: EngineClient, hosts: Hosts, undisturbed: list[list[RequestOutput]]
):
    tasks = await start(client, *REQUESTS)
    victim = victim_of(client)
    lost = [attempt for attempt in client.fleet.attempts.values() if attempt.replica_id == victim]
    hosts.by_id[victim].dead.set()
    check_equal(await asyncio.gather(*tasks), undisturbed)
    assert lost and client.num_migrations[Loss.DIED] == len(lost) == client.num_migrations.total()
    assert not client.fleet.attempts


async def test_nothing_shows_when_a_replica_hangs_and_what_it_says_later_is_ignored(
    client: EngineClient, hosts: Hosts, undisturbed: list[list[RequestOutput]], monkeypatch: pytest.MonkeyPatch
):
    tasks = await start(client, *REQUESTS)
    victim = hosts.by_id[victim_of(client)]
    victim.runs.clear()
    monkeypatch.setattr(fleet, "SILENT_AFTER_S", 0.5)
    found = await asyncio.gather(*tasks)
    victim.runs.set()
    check_equal(found, undisturbed)
    assert client.num_migrations[Loss.SILENT] >= 1
    again = msgspec.structs.replace(REQUESTS[0], request_id="again")
    assert tokens(await collect(client, again)) == tokens(undisturbed[0])


async def test_nothing_shows_when_an_engine_fails(
    client: EngineClient, hosts: Hosts, undisturbed: list[list[RequestOutput]], monkeypatch: pytest.MonkeyPatch
):
    tasks = await start(client, *REQUESTS)
    fail(hosts.by_id[victim_of(client)], monkeypatch)
    check_equal(await asyncio.gather(*tasks), undisturbed)
    assert client.num_migrations[Loss.ENGINE_FAULT] >= 1


def fail(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(host.replica._engine._engine.runner, "launch", fault)


async def test_a_request_does_not_take_every_replica_with_it(
    client: EngineClient, hosts: Hosts, monkeypatch: pytest.MonkeyPatch
):
    third = await BareReplica.start(hosts.by_id["a"].replica._engine.config, "tiny")
    hosts.change(**hosts.by_id, c=Host(third))
    for host in hosts.by_id.values():
        fail(host, monkeypatch)
    with pytest.raises(ApiError) as error:
        await collect(client, request("poison"))
    assert error.value.status == 503
    assert sorted(host.num_calls for host in hosts.by_id.values()) == [0, 1, 1]
    assert client.num_given_up == 1
    await third.stop()


@pytest.mark.parametrize(("was_queueing", "most"), [(False, 2), (True, 3)])
def test_requests_that_only_waited_are_no_suspects(was_queueing: bool, most: int):
    course = engine_client._Course(request("x"))
    num_attempts, goes_on = 0, True
    while goes_on:
        attempt = course.next_attempt()
        attempt.replica = ReplicaView(f"r{num_attempts}", lambda _: _silence(""), 0.0, was_queueing=was_queueing)
        goes_on = course.goes_on(attempt, Loss.DIED)
        num_attempts += 1
    assert num_attempts == most


async def test_a_request_that_is_at_fault_stays_where_it_is(client: EngineClient, hosts: Hosts):
    with pytest.raises(ApiError) as error:
        await collect(client, request("bad", prompt=10**6))
    assert error.value.status == 400
    assert sum(host.num_calls for host in hosts.by_id.values()) == 1 and not client.num_migrations.total()


async def test_what_is_too_large_to_send_is_told_so_and_not_sent(
    client: EngineClient, hosts: Hosts, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_client, "MOST_REQUEST_BYTES", 10)
    with pytest.raises(ApiError) as error:
        await collect(client, request("long"))
    assert (error.value.status, error.value.code) == (413, "request_too_large")
    assert error.value.message.endswith("expected at most 10")
    assert not any(host.num_calls for host in hosts.by_id.values()) and not client.fleet.attempts


async def test_a_call_that_fails_for_no_known_reason_ends_its_request(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
):
    async def nonsense() -> AsyncGenerator[bytes, None]:
        yield b"no EngineResult"

    def call(handle: object, request_id: str, *_: object) -> Call:
        client.fleet.accepted(request_id, "a")
        return Call(nonsense())

    monkeypatch.setattr(engine_client.ray_private, "call", call)
    with pytest.raises(ApiError) as error:
        await collect(client, request("r"))
    assert error.value.status == 500 and not client.fleet.attempts


async def test_one_that_has_begun_waits_for_another_replica(
    client: EngineClient, hosts: Hosts, undisturbed: list[list[RequestOutput]]
):
    first, second = hosts.by_id["a"], hosts.by_id["b"]
    hosts.change(a=first)
    tasks = await start(client, REQUESTS[0])
    first.dead.set()
    client.fleet.replica_left("a")
    await asyncio.sleep(0.1)
    assert not tasks[0].done()
    hosts.change(b=second)
    assert tokens(await tasks[0]) == tokens(undisturbed[0])


async def test_one_that_has_not_begun_is_told_that_there_is_no_replica(
    client: EngineClient, hosts: Hosts, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_client, "ROUTING_TIMEOUT_S", 0.05)
    hosts.change()
    with pytest.raises(ApiError) as error:
        await collect(client, request("r"))
    assert error.value.status == 503 and not client.fleet.attempts


async def test_whoever_asks_for_adapters_is_told_that_there_is_no_replica(monkeypatch: pytest.MonkeyPatch):
    async def forever() -> list[str]:
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(engine_client, "ROUTING_TIMEOUT_S", 0.05)
    client: Any = SimpleNamespace(_adapters=SimpleNamespace(remote=forever))
    with pytest.raises(ApiError) as caught:
        await EngineClient.adapters(client)
    assert caught.value.status == 503 and caught.value.retry_after_s


async def test_leaving_aborts(client: EngineClient, hosts: Hosts):
    tasks = await start(client, *REQUESTS)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(60):
        while any([(await host.replica.stats())["num_running"] for host in hosts.by_id.values()]):
            await asyncio.sleep(0.001)
    assert not client.fleet.attempts and not any(view.num_attempts for view in client.fleet.replicas.values())


async def test_the_result_has_what_no_stream_told(client: EngineClient, hosts: Hosts):
    expected = tokens(await collect(client, REQUESTS[0]))
    by_id = hosts.by_id
    hosts.change()
    for host in by_id.values():
        host.open_steps = _silence  # type: ignore[method-assign]
    hosts.change(**by_id)
    [output] = await collect(client, REQUESTS[0])
    assert output.token_ids == expected and output.finish_reason is FinishReason.LENGTH


async def _silence(ingress_id: str) -> AsyncGenerator[bytes, None]:
    await asyncio.Event().wait()
    yield b""
