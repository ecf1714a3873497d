"""Replicas are lost under load, in every way there is: each stream goes on to its end, and says what it would have.

Three replicas behind two ingresses. How long the streams stood still is printed.
"""

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.integration.faults import DEADLY_PROMPT
from tests.integration.server import Server

SERVE = (
    "env",
    "RAY_SERVE_ENABLE_HA_PROXY=1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED=1",
    sys.executable,
    "-m",
    "serve_app.run",
    "{}",
)
ENGINE = {"kv_cache_memory": "64MiB", "max_num_seqs": 64, "num_threads": 1, "dtype": "float32"}
SERVICE = {"slo": {"ttft_s": 60}}
NUM_REPLICAS = 3
NUM_STREAMS = 64
NUM_TOKENS = 96
PATIENCE_S = 120.0
REPLICA = "ServeReplica:qwen3:EngineReplica"


class FleetServer(Server):
    """Three replicas that can be made to fail, and two ingresses, for good."""

    def _configuration(self, *changes: dict[str, Any]) -> str:
        values = yaml.safe_load(super()._configuration(*changes))
        application = values["applications"][0]
        application["import_path"] = "tests.integration.faults:build_app"
        for deployment in application["deployments"]:
            deployment.pop("autoscaling_config", None)
            deployment["num_replicas"] = 2 if deployment["name"] == "Ingress" else NUM_REPLICAS
            deployment["ray_actor_options"] = {"num_cpus": 0.1}
        return yaml.safe_dump(values)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="q3m-"))
    with FleetServer(folder, SERVE, ENGINE, service=SERVICE) as running:
        yield running
    shutil.rmtree(folder)


@pytest.fixture
async def replicas(fleet: Server) -> list[int]:
    """Process ids of the replicas, when all of them answer and every ingress knows them."""
    await until(lambda: known_by(fleet, NUM_REPLICAS), "three replicas that both ingresses know")
    return fleet.processes_named(REPLICA)


@pytest.fixture(scope="module")
def undisturbed(fleet: Server) -> list[str]:
    """What the streams say when nothing happens."""
    return [stream.text for stream in asyncio.run(run_streams(fleet))]


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {PATIENCE_S:.0f} s"
        await asyncio.sleep(0.1)


def known_by(fleet: Server, num_replicas: int) -> bool:
    """Whether both ingresses hear from so many replicas. A connection of its own may get to either."""
    heard: dict[str, int] = {}
    for _ in range(8):
        found = httpx.get(f"{fleet.url}/status", timeout=30).json()
        replicas = found["models"][0]["replicas"]
        heard[found["ingress"]] = sum(each["age_s"] is not None and each["age_s"] < 2 for each in replicas)
    return len(heard) == 2 and set(heard.values()) == {num_replicas}


class Stream:
    """What came of a completion."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.text = ""
        self.times: list[float] = []
        self.finish_reason: str | None = None
        self.last_line = ""

    @property
    def longest_gap_s(self) -> float:
        return max(second - first for first, second in pairwise(self.times))


async def run_stream(client: httpx.AsyncClient, number: int, begun: asyncio.Semaphore | None = None) -> Stream:
    """Every other one is greedy; the rest is sampled."""
    sampling = {"temperature": 1, "seed": number} if number % 2 else {"temperature": 0, "repetition_penalty": 1.3}
    body = {"model": "demo", "prompt": f"{number}. The", "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body | sampling) as response:
        stream = Stream(response.status_code)
        async for data in _data_of(response):
            stream.last_line = data
            if data != "[DONE]":
                choice = json.loads(data)["choices"][0]
                stream.text += choice["text"]
                stream.finish_reason = choice["finish_reason"] or stream.finish_reason
                stream.times.append(time.monotonic())
                if begun is not None and len(stream.times) == 3:
                    begun.release()
    return stream


async def _data_of(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


async def run_streams(fleet: Server, disturb: Callable[[], None] | None = None) -> list[Stream]:
    """All streams side by side; when each has begun, something happens."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    begun = asyncio.Semaphore(0)
    async with httpx.AsyncClient(base_url=fleet.url, timeout=PATIENCE_S, limits=limits) as client:
        tasks = [asyncio.create_task(run_stream(client, number, begun)) for number in range(NUM_STREAMS)]
        if disturb is not None:
            async with asyncio.timeout(PATIENCE_S):
                for _ in tasks:
                    await begun.acquire()
            disturb()
        return await asyncio.gather(*tasks)


def check(streams: list[Stream], undisturbed: list[str]) -> None:
    assert {(stream.status, stream.finish_reason, stream.last_line) for stream in streams} == {
        (200, "length", "[DONE]")
    }
    assert [stream.text for stream in streams] == undisturbed


def report(capsys: pytest.CaptureFixture[str], what: str, streams: list[Stream]) -> None:
    gaps = sorted(stream.longest_gap_s for stream in streams)
    with capsys.disabled():
        print(f"\n{what} under {NUM_STREAMS} streams: stood still {gaps[-1]:.2f} s at most, {gaps[0]:.2f} s at least")


async def test_a_replica_that_hangs(
    fleet: Server, undisturbed: list[str], replicas: list[int], capsys: pytest.CaptureFixture[str]
):
    victim = replicas[0]
    try:
        streams = await run_streams(fleet, lambda: os.kill(victim, signal.SIGSTOP))
    finally:
        os.kill(victim, signal.SIGCONT)
    check(streams, undisturbed)
    report(capsys, "SIGSTOP of a replica", streams)


async def test_a_replica_that_is_killed_and_whose_successor_does_not_start(
    fleet: Server, undisturbed: list[str], replicas: list[int], capsys: pytest.CaptureFixture[str]
):
    no_start = fleet.config.parent / "no-start"
    no_start.touch()
    streams = await run_streams(fleet, lambda: os.kill(replicas[0], signal.SIGKILL))
    check(streams, undisturbed)
    report(capsys, "SIGKILL of a replica", streams)
    await until(lambda: "no device is free" in fleet.log.read_text(), "failed start")
    check(await run_streams(fleet), undisturbed)
    no_start.unlink()


async def test_a_prompt_that_ends_engines_takes_two_and_no_other_request_with_it(
    fleet: Server, undisturbed: list[str], replicas: list[int], capsys: pytest.CaptureFixture[str]
):
    answers: list[httpx.Response] = []

    def send() -> None:
        body = {"model": "demo", "prompt": DEADLY_PROMPT, "max_tokens": 4}
        answers.append(httpx.post(f"{fleet.url}/v1/completions", json=body, timeout=PATIENCE_S))

    sender = threading.Thread(target=send)
    streams = await run_streams(fleet, sender.start)
    check(streams, undisturbed)
    sender.join()
    assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "service_unavailable"
    report(capsys, "two engine faults", streams)
    assert fleet.log.read_text().count("an illegal memory access was encountered") == 0, "no internals on the terminal"
